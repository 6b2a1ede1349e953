"""Writes the tables of docs/performance.md and docs/performance.png from the files in
docs/benchmarks: `python -m benchmarks.performance`.

`ladder.json` is a summary of `python -m benchmarks.ladder`; the other files are of `python -m
benchmarks.gpu`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.ladder.contestants import OURS
from benchmarks.ladder.tables import OVERLOADED, arrivals
from benchmarks.measure import Part, Row, Spread, Value

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, IMAGE = DOCS / "performance.md", DOCS / "performance.png"
LADDER = "ladder"
COLUMNS = {  # of a scenario of the ladder: as they are kept, and as they are shown
    "contestant": "contestant",
    "images/s": "images a second",
    "CPU s per image": "CPU s an image",
    "mean s": "mean s",
    "p95 s": "p95 s",
    "short mean s": "mean s of 6 steps",
    OVERLOADED: "overloaded",
    "failed": "failed",
    "wrong": "wrong",
    "ratio of throughput": "throughput, ratio",
    "ratio of mean": "mean, ratio",
    "ratio of p95": "p95, ratio",
}
FLOORS = {"floor / time": "in as many rows", "best floor / time": "in the best number of rows"}
BARS = {"equal-closed": "Equal requests", "mixed-closed": "Mixed steps, sizes and guidance"}
FACTS = ("gpu", "cpu", "cpus", "torch_threads", "load_average", "python", "torch", "diffusers")

Content = Mapping[str, Any]


def read(name: str) -> Content:
    content: Content = json.loads((DOCS / "benchmarks" / f"{name}.json").read_text())
    return content


def value(kept: Any) -> Value:
    """A figure as it was before it was kept."""
    return Spread(**kept) if isinstance(kept, dict) else kept


def tables(section: Content) -> Iterator[list[Row]]:
    for table in section["tables"]:
        yield [{name: value(kept) for name, kept in row.items()} for row in table]


def facts(content: Content) -> str:
    known = content["environment"]
    return ", ".join(
        [content["date"][:10], *(f"{name} {known[name]}" for name in FACTS if name in known)]
    )


def ladder(content: Content) -> str:
    """A table for each scenario, and one of the floors."""
    found, floors = [facts(content)], []
    for scenario, part in content["parts"].items():
        for section in part["sections"] if scenario != "contestants" else ():
            (rows,) = tables(section)
            kept = [name for name in COLUMNS if name in rows[0]]
            if part["rate"] is None:
                kept.remove(OVERLOADED)  # of open loops
            shown = [{COLUMNS[name]: row[name] for name in kept} for row in rows]
            about = f"**{scenario}**, {arrivals(part['rate'])}."
            found.append(Part(about, (shown,)).markdown())
            floors += [
                {"scenario": scenario} | {new: row.get(old) for old, new in FLOORS.items()}
                for row in rows
                if row["contestant"] == OURS
            ]
    about = "**The floor.** Bare calls of the modules, as a share of the time of Stepweave's run."
    return "\n\n".join([*found, Part(about, (floors,)).markdown()])


def gpu(content: Content) -> str:
    """All parts of a benchmark on a GPU."""
    parts = [
        Part(f"**{name}.** {section['about']}", tuple(tables(section))).markdown()
        for name, part in content["parts"].items()
        for section in part["sections"]
    ]
    return "\n\n".join([facts(content), *parts])


def written(page: str) -> str:
    """The page, with what is between `<!-- NAME -->` and `<!-- end -->` made again."""

    def section(mark: re.Match[str]) -> str:
        name = mark[1]
        made = ladder(read(name)) if name == LADDER else gpu(read(name))
        return f"<!-- {name} -->\n\n{made}\n\n<!-- end -->"

    return re.sub(r"<!-- (\S+) -->\n.*?<!-- end -->", section, page, flags=re.DOTALL)


def draw(content: Content, path: Path) -> None:
    """Images a second by contestant, in the closed loops; lines are extremes over the seeds."""
    figure, panels = plt.subplots(1, len(BARS), figsize=(10, 3.6), layout="constrained")
    for axes, (scenario, title) in zip(panels, BARS.items(), strict=True):
        sections = content["parts"].get(scenario, {}).get("sections", [])
        rows = [row for section in sections for table in tables(section) for row in table]
        _bars(axes, rows)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("Images a second")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(axes: Any, rows: Sequence[Row]) -> None:
    rates = [(str(row["contestant"]), row["images/s"]) for row in rows]
    known = [(name, rate) for name, rate in rates if isinstance(rate, Spread)]
    known.sort(key=lambda each: each[1].median)
    names, spreads = [name for name, _ in known], [rate for _, rate in known]
    axes.barh(
        ["Stepweave" if name == OURS else name for name in names],
        [rate.median for rate in spreads],
        xerr=[
            [rate.median - rate.low for rate in spreads],
            [rate.high - rate.median for rate in spreads],
        ],
        capsize=2,
        color=["#d9822b" if name == OURS else "#9db4c8" for name in names],
    )


def main() -> None:
    PAGE.write_text(written(PAGE.read_text()))
    draw(read(LADDER), IMAGE)
    print(f"wrote {PAGE} and {IMAGE}")


if __name__ == "__main__":
    main()
