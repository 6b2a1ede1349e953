"""The page of measurements is what the committed files say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import performance
from benchmarks.measure import Spread


def test_the_page_is_written_from_the_files() -> None:
    page = performance.PAGE.read_text()
    assert performance.written(page) == page
    files = {path.stem for path in (performance.DOCS / "benchmarks").glob("*.json")}
    assert set(re.findall(r"<!-- (\S+) -->\n", page)) - {"end"} == files


def test_another_figure_in_a_file_gives_another_page(monkeypatch: pytest.MonkeyPatch) -> None:
    page, content = performance.PAGE.read_text(), performance.read(performance.LADDER)
    row = content["parts"]["equal-closed"]["sections"][0]["tables"][0][0]
    row["images/s"] = {**row["images/s"], "median": 123.0}
    monkeypatch.setattr(
        performance,
        "read",
        lambda name, read=performance.read: content if name == performance.LADDER else read(name),
    )
    assert "| step | 123 " in performance.written(page)


def test_the_image_has_a_bar_for_each_contestant(tmp_path: Path) -> None:
    shown: list[tuple[list[str], list[float]]] = []

    class Axes:
        def barh(self, names: list[str], widths: list[float], **_: object) -> None:
            shown.append((names, widths))

    rate = Spread.of([2.0, 4.0, 3.0])
    performance._bars(Axes(), [{"contestant": "step", "images/s": rate}])
    assert shown == [(["Stepweave"], [3.0])]
    performance.draw(performance.read(performance.LADDER), tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size > 5000
