"""What `make test-full` remembers, and that its parts leave nothing out."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests import parts
from tests.support.environment import ROOT
from tests.support.waiting import SECONDS


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parts that were run; `memory` fails."""
    asked: list[str] = []
    monkeypatch.setattr(parts, "FOLDER", tmp_path)
    monkeypatch.setattr(parts, "state", lambda: "now")
    monkeypatch.setattr(
        parts, "run", lambda name, options: (asked.append(name), int(name == "memory"))[1]
    )
    return asked


def test_only_what_has_not_passed_is_run_again_unless_a_file_has_changed(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parts.main([]) == 1
    assert asked == list(parts.PARTS)
    asked.clear()
    assert parts.main([]) == 1
    assert asked == ["memory"]
    assert "shapes: passed in 0.0 min, and nothing has changed" in capsys.readouterr().out
    asked.clear()
    monkeypatch.setattr(parts, "state", lambda: "later")
    assert parts.main([]) == 1
    assert asked == list(parts.PARTS)


def test_a_part_that_is_asked_for_is_run_though_it_has_passed(
    asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert [parts.main(["shapes"]) for _ in range(2)] == [0, 0]
    assert asked == ["shapes", "shapes"]
    assert parts.main(["all"]) == 2
    assert "There is no part 'all'; there are quick, pipelines," in capsys.readouterr().err


def test_the_state_is_that_of_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "ROOT", tmp_path)
    monkeypatch.setattr(parts, "FOLDER", tmp_path / "build")
    assert parts.state() != parts.state(), "not in a clone: nothing is remembered"
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True, timeout=SECONDS)
    (tmp_path / ".gitignore").write_text("build/\n")
    states = [parts.state()]
    (tmp_path / "file").write_text("one")
    states.append(parts.state())
    (tmp_path / "file").write_text("two")
    states.append(parts.state())
    assert len(set(states)) == 3
    (tmp_path / "build" / "report").touch()
    assert parts.state() == states[-1]


def test_the_files_of_the_parts_exist() -> None:
    paths = [path for name, paths in parts.NAMED.items() if name != "adversarial" for path in paths]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert len(set(paths)) == len(paths)
