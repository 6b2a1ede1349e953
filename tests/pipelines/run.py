"""Runs entries in the engine, each in a process of its own, and keeps their reports in files."""

from __future__ import annotations

from pathlib import Path

from tests.pipelines.check import Report, check
from tests.pipelines.processes import Runs

RUNS = Runs(Report, check, Path("build/pipelines"))
run, load, save = RUNS.run, RUNS.load, RUNS.save
