"""What contributors are told, and what runs the checks for them, agrees with what is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import parts
from tests.support.environment import ROOT
from tests.support.project import PYTHONS

MAKEFILE = (ROOT / "Makefile").read_text()


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def commands(target: str) -> list[str]:
    """What a target of the Makefile runs."""
    recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert recipe is not None
    lines = [line.strip().removeprefix("@") for line in recipe[1].splitlines()]
    return [line.replace("$(BIN)", ".venv/bin") for line in lines]


def test_the_hooks_of_a_commit_are_the_commands_of_make_check() -> None:
    config = read(".pre-commit-config.yaml")
    assert [repo["repo"] for repo in config["repos"]] == ["local"]  # no versions of their own
    (repo,) = config["repos"]
    hooks = [hook for hook in repo["hooks"] if "commit-msg" not in hook.get("stages", [])]
    assert [hook["entry"] for hook in hooks] == commands("check")
    for hook in hooks:
        assert (hook["language"], hook["pass_filenames"]) == ("system", False)
        assert "python" in hook["types_or"]


@pytest.mark.parametrize(
    ("message", "refused"),
    [
        ("x" * 72, False),
        ("x" * 73, True),
        (f"Short\n\n{'x' * 100}\n", False),
        (f"{'x' * 73}\n\nwhy\n", True),
    ],
)
def test_a_subject_of_more_than_72_characters_is_refused(message: str, refused: bool) -> None:
    (hook,) = (
        hook
        for hook in read(".pre-commit-config.yaml")["repos"][0]["hooks"]
        if hook.get("stages") == ["commit-msg"]
    )
    assert (hook["language"], hook["args"]) == ("pygrep", ["--multiline"])
    assert bool(re.search(hook["entry"], message, re.MULTILINE)) == refused


def test_the_workflow_runs_what_must_hold_with_every_python_that_is_supported() -> None:
    (job,) = read(".github/workflows/ci.yml")["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == PYTHONS
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "SECURITY.md"])
def test_what_a_document_names_is_there(document: str) -> None:
    text = (ROOT / document).read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    named = re.findall(r"`((?:tests|src|docs|tools)/[\w./-]*|[\w-]+\.(?:toml|txt|md))`", text)
    assert links
    assert [name for name in [*links, *named] if not Path(ROOT, name).exists()] == []
    targets = set(re.findall(r"\bmake ([a-z-]+)", text))
    rules = {
        target
        for line in re.findall(r"^([a-z][a-z -]*):", MAKEFILE, re.MULTILINE)
        for target in line.split()
    }
    assert targets <= rules


def test_contributors_are_told_of_every_part_of_the_tests() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == list(parts.PARTS)
