"""The report, and what it keeps of every request. Imports no torch: the client shares the servers'
cores."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Report


class Recorder(Report):
    """A report with the requests of every run in a file beside it, one a line."""

    def __init__(self, path: Path, **arguments: Any) -> None:
        super().__init__(path, **arguments)
        self._requests = path.with_suffix(".requests.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._requests.unlink(missing_ok=True)

    def record(self, requests: Sequence[Mapping[str, Any]], **run: Any) -> None:
        with self._requests.open("a") as file:
            file.writelines(json.dumps({**run, **request}) + "\n" for request in requests)


def write_array(path: Path, objects: Sequence[Mapping[str, Any]]) -> None:
    """A JSON array with one object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(f"  {json.dumps(one)}" for one in objects) + "\n]\n")


def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
