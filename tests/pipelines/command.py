"""The command line of a kind of check: which entries to run, how many at a time, what to write."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.pipelines.processes import Runs, versions

DOCUMENT = Path("docs/pipelines.md")


def command(
    package: Any,
    runs: Runs[Any],
    names: Iterable[str],
    told: Callable[[Any], str],
    write: Callable[[Sequence[Any]], str],
    arguments: Sequence[str] | None = None,
) -> int:
    """Run entries as the arguments say; `told` is the line of a report, and `write` makes the
    document of the reports of all `names`; `arguments` are those of the process. Returns the exit
    status: 1 if a report is not right."""
    known = list(names)
    parser = argparse.ArgumentParser(
        prog=f"python -m {package.__name__}", description=package.__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", metavar="NAME", help="entries; all if none is named")
    parser.add_argument(
        "--write", action="store_true", help=f"write {DOCUMENT} of the reports of all entries"
    )
    parser.add_argument(
        "--resume", action="store_true", help="run only what has no report there yet"
    )
    parser.add_argument(
        "--folder", type=Path, default=runs.folder, help="where reports are kept (%(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="entries that run at a time (1)")
    parser.add_argument(
        "--seconds", type=float, default=runs.seconds, help="for one entry (%(default)g)"
    )
    options = parser.parse_args(arguments)
    print(f"with {versions()}", file=sys.stderr)  # noqa: T201
    unknown = [name for name in options.names if name not in known]
    if unknown:
        parser.error(f"no entry is named {', '.join(unknown)}")
    if options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}; it must be at least 1")
    asked = options.names or known
    todo = [name for name in asked if not (options.resume and runs.load(name, options.folder))]
    made = runs.run(todo, options.folder, jobs=options.jobs, seconds=options.seconds)
    for i, report in enumerate(made, start=1):
        state = "ok   " if report.right else "WRONG"
        print(f"{i}/{len(todo)} {state} {told(report)}", file=sys.stderr)  # noqa: T201
    kept = {name: runs.load(name, options.folder) for name in (known if options.write else asked)}
    reports = [report for report in kept.values() if report]
    if options.write:
        missing = [name for name, report in kept.items() if report is None]
        if missing:
            parser.error(
                f"no report in {options.folder} of {', '.join(missing)}: run without names, or "
                "with --resume"
            )
        DOCUMENT.write_text(write(reports))
    return int(not all(report.right for report in reports))
