"""The links between the documents lead somewhere, and README stays short."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.support.environment import ROOT

PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        ROOT / "k8s" / "README.md",
        ROOT / "models" / "shapes" / "README.md",
    ]
)
README_LINES = 150


@cache
def tokens(path: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(path.read_text())


@cache
def anchors(path: Path) -> frozenset[str]:
    """The anchors that GitHub gives to the headings of a page."""
    seen: Counter[str] = Counter()
    found = set()
    blocks = tokens(path)
    for heading, inline in zip(blocks, blocks[1:], strict=False):
        if heading.type == "heading_open":
            text = "".join(
                part.content
                for part in inline.children or ()
                if part.type in ("text", "code_inline")
            )
            name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.add(f"{name}-{seen[name]}" if seen[name] else name)
            seen[name] += 1
    return frozenset(found)


def links(path: Path) -> Iterator[str]:
    for block in tokens(path):
        for part in block.children or ():
            target = part.attrGet("href") or part.attrGet("src")
            if target is not None:
                yield str(target)


def broken(path: Path) -> Iterator[str]:
    """Links to files or headings of the project that do not exist."""
    for target in links(path):
        parts = urlsplit(target)
        if not parts.scheme:
            to = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not to.exists():
                yield f"{target}: no such file"
            elif parts.fragment and parts.fragment not in anchors(to):
                yield f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_within_the_project_leads_somewhere(page: Path) -> None:
    assert list(broken(page)) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# Some `code`, and *more*\n\n## Twice\n\n## Twice\n")
    page.write_text(
        "# Here\n"
        "[a](other.md) [b](other.md#some-code-and-more) [c](other.md#twice-1) [d](#here)\n"
        "[e](https://example.org/none) `[f](none.md)`\n"
    )
    assert list(broken(page)) == []
    wrong = tmp_path / "wrong.md"
    wrong.write_text("[a](none.md) ![b](none.png) [c](other.md#twice-2) [d](#here)\n")
    assert [line.split(":")[0] for line in broken(wrong)] == [
        "none.md",
        "none.png",
        "other.md#twice-2",
        "#here",
    ]


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {(ROOT / urlsplit(target).path).resolve() for target in links(ROOT / "README.md")}
    assert set((ROOT / "docs").glob("*.md")) - linked == set()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES
