"""The report, and a file of all requests. Does not import torch, since the client shares the
servers' cores."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Report


class Recorder(Report):
    """A report that also writes the requests of every run to a file, one per line."""

    def __init__(self, path: Path, **arguments: Any) -> None:
        super().__init__(path, **arguments)
        self._requests = path.with_suffix(".requests.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._requests.unlink(missing_ok=True)

    def record(self, requests: Sequence[Mapping[str, Any]], **run: Any) -> None:
        with self._requests.open("a") as file:
            file.writelines(json.dumps({**run, **request}) + "\n" for request in requests)


def write_array(path: Path, objects: Sequence[Mapping[str, Any]]) -> None:
    """Write a JSON array with one object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(f"  {json.dumps(item)}" for item in objects) + "\n]\n")


def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
