"""`python -m tests.pipelines`: see the package."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests import pipelines
from tests.pipelines.catalog import NOT_BUILT, entries
from tests.pipelines.document import document
from tests.pipelines.run import FOLDER, SECONDS, load, run, versions

DOCUMENT = Path("docs/pipelines.md")


def main() -> int:
    """The exit status: 1 if a report is of a failure or of results that differ."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.pipelines", description=pipelines.__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", metavar="NAME", help="entries; all if none is named")
    parser.add_argument(
        "--write", action="store_true", help=f"write {DOCUMENT} of the reports of all entries"
    )
    parser.add_argument(
        "--resume", action="store_true", help=f"run only what has no report in {FOLDER} yet"
    )
    parser.add_argument("--jobs", type=int, default=1, help="entries that run at a time (1)")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="for one entry (%(default)g)"
    )
    options = parser.parse_args()
    known = entries()
    unknown = [name for name in options.names if name not in known]
    if unknown:
        parser.error(f"no entry is named {', '.join(unknown)}")
    if options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}; it must be at least 1")
    asked = options.names or list(known)
    todo = [name for name in asked if not (options.resume and load(name))]
    for i, report in enumerate(run(todo, jobs=options.jobs, seconds=options.seconds), start=1):
        share = "none" if report.merged_share is None else f"{report.merged_share:.2f}"
        print(  # noqa: T201
            f"{i}/{len(todo)} {'ok   ' if report.right else 'WRONG'} {report.name} "
            f"{report.pipeline} merged {share} "
            f"error {report.largest_error:.1e} {report.failed or '; '.join(report.alone)}",
            file=sys.stderr,
        )
    kept = {name: load(name) for name in (known if options.write else asked)}
    reports = [report for report in kept.values() if report]
    if options.write:
        missing = [name for name, report in kept.items() if report is None]
        if missing:
            parser.error(
                f"no report in {FOLDER} of {', '.join(missing)}: run without names, or with "
                f"--resume"
            )
        DOCUMENT.write_text(document(reports, known, NOT_BUILT, versions()))
    return int(not all(report.right for report in reports))


if __name__ == "__main__":
    sys.exit(main())
