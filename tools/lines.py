"""Lines of src/stepweave by package, and of what to read first: `python -m tools.lines`."""

from __future__ import annotations

from collections import Counter

from tools.layers import LAYERS, READ_FIRST, SOURCES


def lines_by_package() -> dict[str, int]:
    """Lines (including comments and empty ones) by package or top-level module; `stepweave` itself
    has the empty name."""
    lines: Counter[str] = Counter()
    for path in SOURCES.rglob("*.py"):
        first = path.relative_to(SOURCES).with_suffix("").parts[0]
        lines[first.removeprefix("__init__")] += len(path.read_text().splitlines())
    return dict(lines)


def main() -> None:
    lines = lines_by_package()
    print(f"{sum(lines[name] for name in READ_FIRST):6,}  read first: {', '.join(READ_FIRST)}")
    for row in reversed(LAYERS):
        for name in row:
            print(f"{lines[name]:6,}  {name}")
    print(f"{sum(lines.values()):6,}  total")


if __name__ == "__main__":
    main()
