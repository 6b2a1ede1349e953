"""Prints each part when it is done, and writes them all as JSON. Imports no torch: the client shares the servers' cores."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.serving.contestants import COMMON
from benchmarks.serving.figures import Spread, short

PACKAGES = ("torch", "diffusers", "transformers", "bentoml", "numpy", "httpx")

Row = Mapping[str, str | float | Spread | None]


@dataclass(frozen=True)
class Table:
    """Rows with the same columns, and a sentence that says what they are."""

    about: str
    rows: Sequence[Row]

    def markdown(self) -> str:
        columns = list(self.rows[0]) if self.rows else []
        lines = [columns, ["---"] * len(columns), *([_cell(row[name]) for name in columns] for row in self.rows)]
        return "\n".join([self.about, "", *(f"| {' | '.join(line)} |" for line in lines)])


class Report:
    """The file is written anew after each part: a run that is interrupted leaves what it has."""

    def __init__(self, path: Path, arguments: Mapping[str, Any]) -> None:
        self._path = path
        self._content: dict[str, Any] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": environment(),
            "arguments": dict(arguments),
            "parts": {},
        }
        self._requests = path.with_suffix(".requests.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._requests.unlink(missing_ok=True)
        facts = ", ".join(f"{name} {value}" for name, value in self._content["environment"].items())
        print(f"{facts}\n", flush=True)

    def add(self, name: str, tables: Sequence[Table], figures: Any = None) -> None:
        """`figures` are kept in the file alone."""
        self._content["parts"][name] = {"tables": tables, "figures": figures}
        print(f"## {name}\n", *(f"\n{table.markdown()}" for table in tables if table.rows), "", sep="\n", flush=True)
        self._path.write_text(json.dumps(self._content, indent=2, default=_plain) + "\n")

    def record(self, requests: Sequence[Mapping[str, Any]], **run: Any) -> None:
        """Add the requests of a run, one a line, to a file beside the report's."""
        with self._requests.open("a") as file:
            file.writelines(json.dumps({**run, **request}) + "\n" for request in requests)

    def close(self) -> None:
        progress(f"written to {self._path} and {self._requests}")


def write_array(path: Path, objects: Sequence[Mapping[str, Any]]) -> None:
    """A JSON array with one object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(f"  {json.dumps(one)}" for one in objects) + "\n]\n")


def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def environment() -> dict[str, Any]:
    """Hardware, versions and what all servers were started with; nothing that names an installation."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": names[0] if names else platform.processor() or "unknown",
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),  # of the minute before: what else is running
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        **{name: value for name, value in COMMON.items() if name != "BENTOML_DO_NOT_TRACK"},
    }


def _cell(value: str | float | Spread | None) -> str:
    return "" if value is None else short(value) if isinstance(value, float) else str(value)


def _plain(value: object) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} in a report")
