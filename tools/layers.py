"""The layers of src/stepweave: which package may import which.

`python -m tools.layers` draws docs/architecture.svg from the imports. Tests check the imports, the
diagram, and the list in docs/architecture.md.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "src" / "stepweave"
DIAGRAM = ROOT / "docs" / "architecture.svg"

# packages and top-level modules, from the bottom to the top; each imports only from rows below
LAYERS = (
    ("errors", "reasons", "contained", "resource"),
    ("parameters",),
    ("outcome", "config"),
    ("threads",),
    ("compat", "scheduling"),
    ("scope", "planning"),
    ("previews", "batching", "truncation"),
    ("certification",),
    ("memory",),
    ("views",),
    ("jobs",),
    ("recovery", "baselines"),
    ("engine",),
    ("images", "store"),
    ("calls",),
    ("loading",),
    ("adapters",),
    ("telemetry", "download"),
    ("serving",),
    ("api",),
    ("cli", "service"),
    ("__main__",),
)
FOUNDATION_ROWS = 4  # drawn as one box, since every package may import them
READ_FIRST = ("engine", "scheduling", "scope")
SERVER = (
    "images",
    "store",
    "calls",
    "loading",
    "adapters",
    "telemetry",
    "download",
    "serving",
    "api",
    "cli",
    "service",
    "__main__",
)
PURPOSES = {
    "compat": "what diffusers shares",
    "scheduling": "which calls are next",
    "scope": "a view for each request",
    "planning": "costs and predictions",
    "previews": "unfinished images",
    "batching": "many calls into one",
    "truncation": "prompts that are cut",
    "certification": "whether calls may share",
    "memory": "what fits, what waits",
    "views": "views for the engine",
    "jobs": "a job and its thread",
    "recovery": "jobs that restart",
    "baselines": "modes without steps",
    "engine": "the step loop",
    "images": "image files, uploads",
    "calls": "what a call takes",
    "loading": "a model, ready to run",
    "adapters": "what is beside a model",
    "store": "job records, image files",
    "telemetry": "metrics and logs",
    "download": "a model from the hub",
    "serving": "from request to answer",
    "api": "every HTTP surface",
    "cli": "the command line",
    "service": "what BentoML serves",
    "__main__": "python -m stepweave",
}

WIDTH, HEIGHT, PASSAGE = 172, 44, 10  # pixels: of a box, and the width of a line through a row
GAP, ROW = 22, 78  # pixels: between boxes, and between tops of rows
STARTS = 100  # number of initial arrangements
MARGIN, TOP = 20, 64  # pixels: around the diagram, and for its legend
FILLS = {"read first": "#ffe08a", "guest": "#dbe9f6", "server": "#dcefdc", "foundation": "#ececec"}


class Import(NamedTuple):
    """An import of a module of the package by another, at any place in it."""

    importer: str  # dotted name
    imported: str  # dotted name
    name: str  # imported from the module; empty for the module itself

    @property
    def between(self) -> tuple[str, str]:
        """The packages of both."""
        return package_of(self.importer), package_of(self.imported)


def package_of(module: str) -> str:
    """The package or top-level module of a dotted name; empty for `stepweave` itself."""
    return module.split(".")[1] if "." in module else ""


def imports(sources: Path = SOURCES) -> Iterator[Import]:
    """All imports within `stepweave`, also in functions and for type checkers only."""
    for path in sorted(sources.rglob("*.py")):
        parts = path.relative_to(sources.parent).with_suffix("").parts
        importer = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (
                    Import(importer, alias.name, "")
                    for alias in node.names
                    if alias.name.split(".")[0] == "stepweave"
                )
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:  # relative
                    parent = importer if parts[-1] == "__init__" else importer.rpartition(".")[0]
                    for _ in range(node.level - 1):
                        parent = parent.rpartition(".")[0]
                    base = f"{parent}.{base}".rstrip(".")
                for alias in node.names if base.split(".")[0] == "stepweave" else ():
                    whole = base == "stepweave" and not alias.name.startswith("__")
                    yield Import(importer, f"{base}.{alias.name}" if whole else base, alias.name)


def edges() -> set[tuple[str, str]]:
    """Pairs of a package and another that it imports, without `stepweave` itself."""
    between = {each.between for each in imports()}
    return {(upper, lower) for upper, lower in between if upper and lower and upper != lower}


def direct(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The edges that do not follow from others (the transitive reduction)."""
    below: dict[str, set[str]] = {}
    for row in LAYERS:
        for name in row:
            lower = {end for start, end in edges if start == name}
            below[name] = lower.union(*(below.get(end, set()) for end in lower))
    return {
        (start, end)
        for start, end in edges
        if not any(end in below[other] for first, other in edges if first == start and other != end)
    }


def order() -> str:
    """The layers from top to bottom, as docs/architecture.md lists them."""
    return "\n".join(f"{'  '.join(row)}" for row in reversed(LAYERS))


# The diagram. A row has packages, and passages of lines to packages further below.

Item = tuple[str, int]  # a package, or the target of a passing line, and the row
Lines = Sequence[tuple[Item, Item]]  # sorted, so that the diagram is deterministic


def drawn_rows() -> tuple[list[list[Item]], Lines]:
    """The items of each row, and the lines from items to items of the row below."""
    layers = LAYERS[FOUNDATION_ROWS:]
    rows: list[list[Item]] = [[(name, i) for name in row] for i, row in enumerate(layers)]
    row_of = {name: i for i, row in enumerate(layers) for name in row}
    lines: set[tuple[Item, Item]] = set()
    for start, end in sorted(direct(edges())):
        if start in row_of and end in row_of:
            path = [(start, row_of[start])]
            path += [(end, row) for row in range(row_of[start] - 1, row_of[end] - 1, -1)]
            lines.update(pairwise(path))
            for item in path[1:-1]:
                if item not in rows[item[1]]:
                    rows[item[1]].append(item)
    return rows, sorted(lines)


def crossings(rows: Sequence[Sequence[Item]], lines: Lines) -> int:
    at = {item: i for row in rows for i, item in enumerate(row)}
    ends = [(upper[1], at[upper], at[lower]) for upper, lower in lines]
    return sum(
        row == other and left < right and below > beside
        for row, left, below in ends
        for other, right, beside in ends
    )


def arranged(rows: list[list[Item]], lines: Lines) -> list[list[Item]]:
    """Order the rows so that few lines cross, by sorting items by the mean position of those that
    they are joined to, downwards and upwards in turns."""
    best = rows
    for turn in range(24):
        down = turn % 2 == 0
        rows = [list(row) for row in rows]
        for i in range(len(rows)) if not down else reversed(range(len(rows))):
            at = {item: n / max(1, len(row) - 1) for row in rows for n, item in enumerate(row)}

            def middle(item: Item, at: dict[Item, float] = at, down: bool = down) -> float:
                joined = [
                    at[upper] if down else at[lower]
                    for upper, lower in lines
                    if (lower if down else upper) == item
                ]
                return sum(joined) / len(joined) if joined else at[item]

            rows[i].sort(key=middle)
        if crossings(rows, lines) < crossings(best, lines):
            best = rows
    return best


def is_box(item: Item) -> bool:
    return item[0] in LAYERS[FOUNDATION_ROWS:][item[1]]


def placed(rows: list[list[Item]], lines: Lines) -> dict[Item, float]:
    """The horizontal middle of each item in pixels: near those that it is joined to, without
    overlaps."""
    x = {item: 0.0 for row in rows for item in row}

    def apart(left: Item, right: Item) -> float:
        return sum((WIDTH if is_box(item) else PASSAGE) / 2 for item in (left, right)) + GAP

    for _ in range(60):
        for row in rows:
            wished = []
            for item in row:
                joined = [x[a if b == item else b] for a, b in lines if item in (a, b)]
                wished.append((x[item] + sum(joined)) / (1 + len(joined)))
            right, left = list(wished), list(wished)
            for i in range(1, len(row)):
                right[i] = max(right[i], right[i - 1] + apart(row[i - 1], row[i]))
            for i in reversed(range(len(row) - 1)):
                left[i] = min(left[i], left[i + 1] - apart(row[i], row[i + 1]))
            x |= {item: (right[i] + left[i]) / 2 for i, item in enumerate(row)}
    first = min(place - (WIDTH if is_box(item) else PASSAGE) / 2 for item, place in x.items())
    return {item: round(place - first + MARGIN, 1) for item, place in x.items()}


def shortest(rows: list[list[Item]], lines: Lines) -> dict[Item, float]:
    """The middles of all items in the best of several arrangements from random orders: the one with
    the fewest crossings, then the shortest lines."""
    shuffled = random.Random(0)
    best: tuple[int, float, dict[Item, float]] | None = None
    for _ in range(STARTS):
        arrangement = arranged(rows, lines)
        x = placed(arrangement, lines)
        length = sum(abs(x[upper] - x[lower]) for upper, lower in lines)
        candidate = (crossings(arrangement, lines), round(length), x)
        best = candidate if best is None or candidate[:2] < best[:2] else best
        rows = [shuffled.sample(row, len(row)) for row in rows]
    assert best is not None
    return best[2]


def kind_of(name: str) -> str:
    return "read first" if name in READ_FIRST else "server" if name in SERVER else "guest"


def box(x: float, y: float, width: float, name: str, purpose: str, kind: str) -> str:
    """The SVG of a box; `x` is its middle, `y` its top."""
    stroke = ' stroke-width="2.5"' if kind == "read first" else ""
    return (
        f'<rect x="{x - width / 2:.1f}" y="{y:.1f}" width="{width:.1f}" height="{HEIGHT}" rx="6"'
        f' fill="{FILLS[kind]}"{stroke}/>\n'
        f'<text class="name" x="{x:.1f}" y="{y + 18:.1f}">{escape(name)}</text>\n'
        f'<text x="{x:.1f}" y="{y + 35:.1f}">{escape(purpose)}</text>'
    )


def diagram() -> str:
    """The SVG of the diagram."""
    rows, lines = drawn_rows()
    x = shortest(rows, lines)
    y = {item: TOP + (len(rows) - 1 - item[1]) * ROW for item in x}
    right = max(place + (WIDTH if is_box(item) else PASSAGE) / 2 for item, place in x.items())
    width, bottom = right + MARGIN, TOP + len(rows) * ROW
    parts = []
    for upper, lower in lines:
        start, end = y[upper] + HEIGHT, y[lower]
        head = ' marker-end="url(#head)"' if is_box(lower) else ""
        middle = (start + end) / 2
        parts.append(
            f'<path d="M{x[upper]},{start} C{x[upper]},{middle} {x[lower]},{middle}'
            f' {x[lower]},{end}"{head}/>'
        )
    for item in sorted(x):
        if is_box(item):
            name = item[0]
            parts.append(box(x[item], y[item], WIDTH, name, PURPOSES[name], kind_of(name)))
        else:
            parts.append(f'<path d="M{x[item]},{y[item]} V{y[item] + HEIGHT}"/>')
    below = ", ".join(name for row in LAYERS[:FOUNDATION_ROWS] for name in row)
    parts.append(
        box(width / 2, bottom, width - 2 * MARGIN, below, "may be imported by all", "foundation")
    )
    legend = {"read first": "read first", "guest": "guests of the loop", "server": "the server"}
    for i, (kind, text) in enumerate(legend.items()):
        left = MARGIN + i * 160
        parts.append(
            f'<rect x="{left}" y="16" width="18" height="18" rx="4" fill="{FILLS[kind]}"/>\n'
            f'<text class="legend" x="{left + 26}" y="30">{text}</text>'
        )
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}"'
            f' height="{bottom + HEIGHT + MARGIN}" font-family="DejaVu Sans, Verdana, sans-serif"'
            ' font-size="12" text-anchor="middle" stroke="none">',
            "<title>The packages of Stepweave and what they import</title>",
            "<style>rect { stroke: #444 } path { stroke: #888; fill: none; stroke-width: 1.3 }"
            " .name { font-size: 14px; font-weight: bold } .legend { text-anchor: start }</style>",
            '<marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7"'
            ' orient="auto"><path d="M0,0 L8,4 L0,8 z" style="fill: #888; stroke: none"/></marker>',
            '<rect width="100%" height="100%" style="fill: white; stroke: none"/>',
            *parts,
            "</svg>\n",
        )
    )


if __name__ == "__main__":
    DIAGRAM.write_text(diagram())
    print(f"wrote {DIAGRAM.relative_to(ROOT)}")
