"""Compares contestants that take turns: wall and CPU seconds, medians with spread, and ratios round
by round.

It imports no torch, since benchmarks of servers and simulations do not need it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "diffusers", "transformers", "numpy", "greenlet", "bentoml", "httpx")
FEW = 5  # values; fewer have no meaningful quartiles
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Timing:
    """Wall-clock seconds, and CPU seconds of all threads of the process."""

    wall: float
    cpu: float


def clock(function: Callable[[], object]) -> Timing:
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def alternate(
    contestants: Mapping[str, Callable[[int], Timing]], rounds: int
) -> dict[str, list[Timing]]:
    """Run each contestant once per round, with the round's number: A B A B ..., so that conditions
    are the same for all."""
    timings: dict[str, list[Timing]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name, contestant in contestants.items():
            timings[name].append(contestant(number))
    return timings


@dataclass(frozen=True)
class Spread:
    """The median of some values, their quartiles and their extremes."""

    median: float
    q1: float
    q3: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, q1, median, q3, high = np.percentile(values, (0, 25, 50, 75, 100)).tolist()
        return cls(median, q1, q3, low, high, len(values))

    @classmethod
    def known(cls, values: Iterable[float | None]) -> Spread | None:
        """The spread of the values that are not None; None if there are none."""
        known = [value for value in values if value is not None]
        return cls.of(known) if known else None

    def __str__(self) -> str:
        """The median with quartiles, or extremes of fewer than five values; a single number if all
        are equal."""
        low, high = (self.low, self.high) if self.count < FEW else (self.q1, self.q3)
        return _short(self.median) + (
            f" ({_short(low)} to {_short(high)})" if self.low < self.high else ""
        )


@dataclass(frozen=True)
class Interval:
    """A geometric mean of ratios, and the interval that holds the true one with 95 % confidence, by
    Student's t distribution of the logarithms (Fleming and Wallace, How Not to Lie with Statistics,
    CACM 1986: ratios are averaged geometrically)."""

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Interval | None:
        """None of fewer than two ratios."""
        if len(ratios) < 2:
            return None
        from scipy import stats  # where it is missing, all else can be measured

        logarithms = np.log(ratios)
        mean, error = float(np.mean(logarithms)), float(stats.sem(logarithms))
        reach = error * float(stats.t.ppf((1 + CONFIDENCE) / 2, len(ratios) - 1))
        low, middle, high = np.exp([mean - reach, mean, mean + reach]).tolist()
        return cls(middle, low, high, len(ratios))

    def __str__(self) -> str:
        return f"{_short(self.mean)} ({_short(self.low)} to {_short(self.high)})"


# figures of a part: formatted in Markdown tables, complete in the JSON file

Value = str | int | float | Spread | Interval | None
Row = dict[str, Value]
Table = Sequence[Mapping[str, Value]]  # all rows have the same columns


@dataclass(frozen=True)
class Part:
    """A description of what was measured, and its tables."""

    about: str
    tables: tuple[Table, ...]

    def markdown(self) -> str:
        return "\n\n".join([self.about, *(_markdown(table) for table in self.tables if table)])


def seconds(timings: Mapping[str, Sequence[Timing]]) -> list[Row]:
    """A table of the contestants' times."""
    return [
        {
            "contestant": name,
            "wall s": Spread.of([timing.wall for timing in taken]),
            "CPU s": Spread.of([timing.cpu for timing in taken]),
        }
        for name, taken in timings.items()
    ]


def ratio(name: str, above: Sequence[Timing], below: Sequence[Timing], wanted: str = "") -> Row:
    """A row of a table of ratios: `above` over `below`, round by round, since load on the machine
    slows both in a round."""
    pairs = list(zip(above, below, strict=True))
    return {
        "ratio": name,
        "wall": Spread.of([upper.wall / lower.wall for upper, lower in pairs]),
        "CPU": Spread.of([upper.cpu / lower.cpu for upper, lower in pairs]),
        "wanted": wanted,
    }


def _markdown(table: Table) -> str:
    columns = list(table[0])
    lines = [
        columns,
        ["---"] * len(columns),
        *([_cell(row[column]) for column in columns] for row in table),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Value) -> str:
    return "" if value is None else _short(value) if isinstance(value, float) else str(value)


def _short(value: float) -> str:
    """Three figures, and no exponent within reason."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"


# The report


def cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_average() -> float:
    """Of the last minute: it shows other processes, too."""
    return round(os.getloadavg()[0], 2)


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Hardware and versions of packages, without host names; torch's threads if it is imported."""
    facts: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpus": cpus(),
        "load_average": load_average(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }
    if "torch" in sys.modules:
        import torch

        facts["torch_threads"] = torch.get_num_threads()
        if device is not None and device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            facts |= {
                "gpu": properties.name,
                "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
                "cuda": torch.version.cuda,
                "cudnn": torch.backends.cudnn.version(),
            }
    return facts


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


class Report:
    """Prints each part when it is done, and writes all as JSON."""

    def __init__(self, path: Path, device: torch.device | None = None, **arguments: Any) -> None:
        self._path = path
        self._content: dict[str, Any] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": environment(device),
            "arguments": arguments,
            "parts": {},
        }
        facts = ", ".join(f"{name} {value}" for name, value in self._content["environment"].items())
        print(f"{facts}\n", flush=True)

    def add(self, name: str, *sections: Part, **kept: Any) -> None:
        """Add a part with one or more sections, and further values `kept` only in the file.

        The file is written each time, so an interrupted run keeps the finished parts.
        """
        self._content["parts"][name] = {
            "sections": [dataclasses.asdict(section) for section in sections],
            **kept,
        }
        print(
            f"## {name}",
            *(section.markdown() for section in sections),
            sep="\n\n",
            end="\n\n",
            flush=True,
        )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self._content, indent=2) + "\n")

    def close(self) -> None:
        print(f"wrote {self._path}", file=sys.stderr)
