"""The code in the documents runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.environment import ROOT
from tools.shapes.checker import wrong_parts


@pytest.mark.parametrize(
    ("document", "count", "images"),
    [("docs/scope.md", 6, 8), ("docs/engine.md", 6, 4), ("docs/scheduling.md", 1, 2)],
)
def test_the_blocks_of_a_document_run_in_order(
    document: str, count: int, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    blocks = re.findall(
        r"^```python\n(.*?)^```$", Path(document).read_text(), re.MULTILINE | re.DOTALL
    )
    assert len(blocks) == count
    names: dict[str, object] = {"__name__": document}
    for block in blocks:
        exec(compile(block, document, "exec"), names)
    assert len(names["images"]) == images  # type: ignore[arg-type]
    if document == "docs/engine.md":  # the first example's, with its settings
        for image in names["images"]:  # type: ignore[attr-defined]
            assert wrong_parts(image, "a large red star on a blue background") == []
