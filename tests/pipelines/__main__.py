"""`python -m tests.pipelines`: see the package."""

from __future__ import annotations

import importlib
import pkgutil
import sys

from tests import pipelines
from tests.pipelines.check import check
from tests.pipelines.registry import ENTRIES


def main(names: list[str]) -> None:
    for module in pkgutil.iter_modules(pipelines.__path__):
        if module.name != "__main__":
            importlib.import_module(f"tests.pipelines.{module.name}")

    for name in names or ENTRIES:
        report = check(ENTRIES[name])
        print(  # noqa: T201
            f"{'ok   ' if report.right else 'WRONG'} {report.name} {report.pipeline} merged {report.merged_share:.2f} "
            f"error {report.largest_error:.1e} {report.alone or ''}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
