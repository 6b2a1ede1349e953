"""`python -m tests.served`: see the package."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tests import served as package
from tests.pipelines.command import DOCUMENT, command
from tests.pipelines.document import with_section
from tests.served.check import Report
from tests.served.document import section
from tests.served.entries import excluded, served
from tests.served.run import RUNS


def told(report: Report) -> str:
    why = report.library or report.failed or "; ".join(report.wrong)
    return (
        f"{report.name} merged {report.merged_share} error {report.largest_error} "
        f"asked {len(report.asked)} {why}"
    )


def write(reports: Sequence[Report]) -> str:
    return with_section(DOCUMENT.read_text(), section(reports, excluded()))


if __name__ == "__main__":
    sys.exit(command(package, RUNS, served(), told, write))
