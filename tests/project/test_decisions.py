"""The records of decisions are short, of one form, and listed; what they name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.environment import ROOT

FOLDER = ROOT / "docs" / "decisions"
RECORDS = sorted(path for path in FOLDER.glob("*.md") if path.name != "README.md")
HEADINGS = ["## Context", "## Decision", "## Consequences", "## What would change it"]


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_a_record_is_short_has_the_four_parts_and_is_listed(record: Path) -> None:
    lines = record.read_text().splitlines()
    assert len(lines) <= 40
    assert re.match("# .", lines[0])
    assert [line for line in lines if line.startswith("##")] == HEADINGS
    assert (FOLDER / "README.md").read_text().count(f"]({record.name})") == 1


def test_the_index_lists_only_records_that_are_there() -> None:
    listed = re.findall(
        r"^\| \[[^\]]+\]\(([\w-]+\.md)\) \|", (FOLDER / "README.md").read_text(), re.M
    )
    assert sorted(listed) == [record.name for record in RECORDS]
    assert len(listed) >= 6


@pytest.mark.parametrize("page", sorted(FOLDER.glob("*.md")), ids=lambda path: path.stem)
def test_links_and_files_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    named = re.findall(r"`((?:tests|tools|benchmarks|docs|k8s)/[\w./-]*)`", text)
    ours = re.findall(
        r"`((?:api|compat|engine|serving|store|telemetry|certification)/[\w./-]*)`", text
    )
    assert links
    assert [link for link in links if not (FOLDER / link).exists()] == []
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert [name for name in ours if not (ROOT / "src" / "stepweave" / name).exists()] == []
