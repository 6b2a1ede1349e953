"""Serves entries, each in a process of its own, and keeps their reports in files."""

from __future__ import annotations

from pathlib import Path

from tests.pipelines.processes import Runs
from tests.served.check import Report, check

RUNS = Runs(Report, check, Path("build/served"))
run, load, save = RUNS.run, RUNS.load, RUNS.save
