"""`python -m tests.pipelines`: see the package."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tests import pipelines
from tests.pipelines.catalog import NOT_BUILT, entries, exported
from tests.pipelines.check import Report
from tests.pipelines.command import DOCUMENT, command
from tests.pipelines.document import document, section_of
from tests.pipelines.processes import versions
from tests.pipelines.run import RUNS


def told(report: Report) -> str:
    share = "none" if report.merged_share is None else f"{report.merged_share:.2f}"
    return (
        f"{report.name} {report.pipeline} merged {share} error {report.largest_error:.1e} "
        f"{report.failed or '; '.join(report.alone)}"
    )


def write(reports: Sequence[Report]) -> str:
    """The document, with what it says already of the server."""
    served = section_of(DOCUMENT.read_text())
    return document(reports, entries(), NOT_BUILT, versions(), served)


def unknown() -> list[str]:
    """Pipelines that the installed diffusers exports, and the catalog does not know."""
    known = {entry.pipeline for entry in entries().values()} | NOT_BUILT.keys()
    return sorted(exported() - known)


if __name__ == "__main__":
    asked = sys.argv[1:]
    if "--unknown" in asked:
        asked.remove("--unknown")
        print(f"no entry: {', '.join(unknown()) or 'none'}", file=sys.stderr)  # noqa: T201
    sys.exit(command(pipelines, RUNS, entries(), told, write, asked))
