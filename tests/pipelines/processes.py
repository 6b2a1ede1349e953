"""Checks entries, each in a process of its own, and keeps their reports in files."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import multiprocessing
import os
import platform
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from tests.pipelines.catalog import entries, entry_modules
from tests.pipelines.registry import Entry
from tests.support.waiting import wait_until

# a dataclass of plain data with `name`, `pipeline`, and `failed`, which says why there is no result
R = TypeVar("R")


def versions() -> dict[str, str]:
    """What a report holds for."""
    found = {
        name: importlib.metadata.version(name) for name in ("diffusers", "torch", "transformers")
    }
    return {"python": platform.python_version(), **found}


@dataclass(frozen=True)
class Runs(Generic[R]):
    """One kind of check, and its reports."""

    report: Callable[..., R]  # the class of reports
    check: Callable[[Entry], R]  # a function of a module
    folder: Path  # where reports are kept, if a call names no other
    seconds: float = 900.0  # for one entry, of which most take ten

    def run(
        self,
        names: Iterable[str],
        folder: Path | None = None,
        *,
        jobs: int = 1,
        seconds: float | None = None,
    ) -> Iterator[R]:
        """The reports of entries, in their order, `jobs` at a time. One that crashes or takes too
        long is reported as failed."""
        kept, limit = folder or self.folder, seconds or self.seconds
        kept.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, self.check.__module__, *entry_modules()])

        def one(name: str) -> R:
            path = kept / f"{name}.json"
            path.unlink(missing_ok=True)
            # a daemon, so that none outlives an interrupted run
            process = context.Process(target=self._check, args=(name, path), daemon=True)
            process.start()
            process.join(limit)
            late = process.is_alive()
            if late:
                process.kill()
                process.join()
            found = self.load(name, kept)
            if found is None:
                why = (
                    f"took more than {limit:g} s"
                    if late
                    else f"its process ended with status {process.exitcode}"
                )
                found = self.report(name, entries()[name].pipeline, failed=why)
                self.save(found, path)
            return found

        with ThreadPoolExecutor(jobs) as pool:
            yield from pool.map(one, names)

    def load(self, name: str, folder: Path | None = None) -> R | None:
        """The report that is kept of an entry, if it was made with what is installed now."""
        try:
            kept: dict[str, Any] = json.loads(
                ((folder or self.folder) / f"{name}.json").read_text()
            )
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        if kept.pop("versions") != versions():
            return None
        return self.report(
            **{
                field: tuple(value) if isinstance(value, list) else value
                for field, value in kept.items()
            }
        )

    def reports(
        self, names: Collection[str], folder: Path, items: Iterable[Any], test: str
    ) -> list[R]:
        """The reports of all entries. Those of which the `items` of a session of pytest have `test`
        are made by it, perhaps in another process that has not got so far; others are made here."""
        others = {item.name[len(test) + 1 : -1] for item in items if item.name.startswith(test)}
        for name in names:
            if name in others:
                wait_until(lambda name=name: self.load(name, folder))  # type: ignore[misc]
            elif self.load(name, folder) is None:
                list(self.run([name], folder))
        found = [report for name in names if (report := self.load(name, folder)) is not None]
        assert len(found) == len(names)
        return found

    def save(self, report: R, path: Path) -> None:
        half = path.with_suffix(".part")
        fields = dataclasses.asdict(report)  # type: ignore[call-overload]
        half.write_text(json.dumps({**fields, "versions": versions()}, indent=1))
        half.rename(path)

    def _check(self, name: str, path: Path) -> None:
        """In the process of an entry; what it prints goes to a log beside the report."""
        log = os.open(path.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        entry = entries()[name]
        try:
            report = self.check(entry)
        except Exception as error:
            logging.exception("no comparison")
            why = f"{type(error).__name__}: {error}"[:200]
            report = self.report(name, entry.pipeline, failed=why)
        self.save(report, path)
