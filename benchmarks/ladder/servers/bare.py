"""Times the pipeline's modules by themselves. Standard input is a JSON array of forwards: module,
elements of a row's sample, and rows. Standard output is a JSON array of each one's seconds, and of
those of a row where the module has the most rows a second."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.ladder.scenarios import MIXED
from benchmarks.ladder.servers.model import Asked, call, load

ROUNDS = 5
ROWS = (1, 2, 4, 8, 16, 24, 32)  # tried for the best, if not among the forwards
FUNCTIONS = {"vae.decode": ("vae", "decode")}  # other names are modules, called themselves

Kind = tuple[str, int]  # module, elements of a row's sample
Forward = tuple[str, int, int]  # and rows
Given = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def observed(pipeline: Any) -> dict[Kind, Given]:
    """A call of each module at each size of the scenarios, as the pipeline makes it."""
    found: dict[Kind, Given] = {}
    names = [*pipeline.components, *FUNCTIONS]
    undo = []
    for name in names:
        owner, attribute = FUNCTIONS.get(name, (name, "forward"))
        module = getattr(pipeline, owner)
        if isinstance(module, torch.nn.Module):
            undo.append((module, attribute))
            setattr(module, attribute, _noting(name, getattr(module, attribute), found))
    for kind in dict.fromkeys(one._replace(steps=1) for one in MIXED):
        width, height = (int(side) for side in kind.size.split("x"))
        call(pipeline, [Asked("a red ring", 0, 1, width, height, kind.guidance)])
    for module, attribute in undo:
        delattr(module, attribute)
    return found


def _noting(
    name: str, function: Callable[..., Any], found: dict[Kind, Given]
) -> Callable[..., Any]:
    def noting(*args: Any, **kwargs: Any) -> Any:
        sample = next(item for item in (*args, *kwargs.values()) if isinstance(item, torch.Tensor))
        found.setdefault((name, sample[0].numel()), (function, args, kwargs))
        return function(*args, **kwargs)

    return noting


def repeated(value: Any, rows: int) -> Any:
    """A tensor whose first row is repeated; other values unchanged."""
    if isinstance(value, torch.Tensor) and value.ndim:
        return value[:1].repeat(rows, *[1] * (value.ndim - 1))
    return value


def timed(given: Given, rows: int) -> float:
    function, args, kwargs = given
    args = tuple(repeated(value, rows) for value in args)
    kwargs = {name: repeated(value, rows) for name, value in kwargs.items()}
    started = time.perf_counter()
    with torch.no_grad():
        function(*args, **kwargs)
    return time.perf_counter() - started


def measure(pipeline: Any, wanted: Sequence[Forward]) -> Iterator[tuple[float, float]]:
    """The seconds of each forward, and those of its rows at the best number of rows."""
    given = observed(pipeline)
    kinds = {(name, size) for name, size, _ in wanted}
    cells = {*wanted, *((*kind, rows) for kind in kinds for rows in ROWS)}
    took: dict[Forward, list[float]] = {cell: [] for cell in sorted(cells)}
    for _ in range(ROUNDS):
        for name, size, rows in took:
            took[name, size, rows].append(timed(given[name, size], rows))
    seconds = {cell: statistics.median(each) for cell, each in took.items()}
    best = {
        kind: min(seconds[cell] / cell[2] for cell in seconds if cell[:2] == kind) for kind in kinds
    }
    for name, size, rows in wanted:
        yield seconds[name, size, rows], rows * best[name, size]


def main() -> None:
    wanted = [(str(name), int(size), int(rows)) for name, size, rows in json.load(sys.stdin)]
    json.dump(list(measure(load(), wanted)), sys.stdout)


if __name__ == "__main__":
    main()
