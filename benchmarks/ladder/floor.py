"""The floor of a run: how long the forwards that the server ran take as bare calls of the model's
modules, in as many rows, and in those with the most rows a second."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from benchmarks.ladder.contestants import common
from benchmarks.serving.client import BenchmarkError
from benchmarks.serving.contestants import ROOT

Forward = tuple[str, int, int]  # module, elements of a row's sample, rows


class Forwards:
    """The forwards that a server writes to a file, since this was made."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start = path.stat().st_size if path.exists() else 0

    def counts(self) -> Counter[Forward]:
        """How often each has run."""
        with self._path.open() as lines:
            lines.seek(self._start)
            forwards = (line.split() for line in lines)
            return Counter((module, int(size), int(rows)) for module, size, rows in forwards)


def floor(counts: Counter[Forward], threads: int) -> tuple[float, float]:
    """Seconds of the bare calls in a process of their own: in as many rows, and in the best."""
    wanted = list(counts)
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.ladder.servers.bare"],
        input=json.dumps(wanted),
        text=True,
        cwd=ROOT,
        env=os.environ | common(threads),
        capture_output=True,
    )
    if ended.returncode:
        raise BenchmarkError(f"the bare calls failed: {ended.stderr.strip()[-500:]}")
    seconds = json.loads(ended.stdout)
    same, best = (
        sum(counts[one] * each[column] for one, each in zip(wanted, seconds, strict=True))
        for column in (0, 1)
    )
    return same, best
