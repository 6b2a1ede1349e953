"""Runs entries, each in a process of its own, and keeps their reports in files."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import multiprocessing
import os
import platform
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from tests.pipelines.catalog import entries, entry_modules
from tests.pipelines.check import Report, check

FOLDER = Path("build/pipelines")
SECONDS = 900.0  # for one entry, of which most take ten


def versions() -> dict[str, str]:
    """What a report holds for."""
    found = {
        name: importlib.metadata.version(name) for name in ("diffusers", "torch", "transformers")
    }
    return {"python": platform.python_version(), **found}


def run(
    names: Iterable[str], folder: Path = FOLDER, *, jobs: int = 1, seconds: float = SECONDS
) -> Iterator[Report]:
    """The reports of entries, in their order, `jobs` at a time. One that crashes or takes too long
    is reported as failed."""
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *entry_modules()])

    def one(name: str) -> Report:
        path = folder / f"{name}.json"
        path.unlink(missing_ok=True)
        # a daemon, so that none outlives an interrupted run
        process = context.Process(target=_report, args=(name, path), daemon=True)
        process.start()
        process.join(seconds)
        late = process.is_alive()
        if late:
            process.kill()
            process.join()
        found = load(name, folder)
        if found is None:
            why = (
                f"took more than {seconds:g} s"
                if late
                else f"its process ended with status {process.exitcode}"
            )
            found = Report(name, entries()[name].pipeline, failed=why)
            _save(found, path)
        return found

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(one, names)


def load(name: str, folder: Path = FOLDER) -> Report | None:
    """The report that is kept of an entry, if it was made with what is installed now."""
    try:
        kept: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if kept.pop("versions") != versions():
        return None
    return Report(**{**kept, "alone": tuple(kept["alone"])})


def _save(report: Report, path: Path) -> None:
    half = path.with_suffix(".part")
    half.write_text(json.dumps({**dataclasses.asdict(report), "versions": versions()}, indent=1))
    half.rename(path)


def _report(name: str, path: Path) -> None:
    """In the process of an entry; what it prints goes to a log beside the report."""
    log = os.open(path.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    entry = entries()[name]
    try:
        report = check(entry)
    except Exception as error:
        logging.exception("no comparison")
        report = Report(name, entry.pipeline, failed=f"{type(error).__name__}: {error}"[:200])
    _save(report, path)
