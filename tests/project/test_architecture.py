"""The structure that docs/architecture.md describes is that of the code.

That no line of src, tests, benchmarks and tools is longer than 100 columns holds ruff, which
`make check` runs.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

from tests.support.environment import ROOT
from tools.layers import (
    DIAGRAM,
    FOUNDATION_ROWS,
    LAYERS,
    PURPOSES,
    READ_FIRST,
    SOURCES,
    diagram,
    imports,
    order,
)
from tools.lines import lines_by_package

PAGE = (ROOT / "docs" / "architecture.md").read_text()
ROWS = {name: row for row, names in enumerate(LAYERS) for name in names}

READING_PATH = 1_550  # lines of what to read first, in all
# Lines of all others, today's rounded up. What needs more, needs a reason, or another package.
BUDGETS = {
    "__main__": 50,
    "cli": 1_350,
    "service": 50,
    "api": 6_850,
    "serving": 5_450,
    "telemetry": 650,
    "download": 100,
    "images": 1_500,
    "calls": 950,
    "loading": 3_850,
    "adapters": 2_250,
    "store": 850,
    "recovery": 100,
    "baselines": 300,
    "jobs": 700,
    "views": 700,
    "memory": 650,
    "certification": 2_400,
    "previews": 600,
    "batching": 1_300,
    "truncation": 500,
    "planning": 1_800,
    "compat": 3_000,
    "threads": 200,
    "outcome": 150,
    "config": 1_150,
    "errors": 420,
    "reasons": 100,
    "contained": 50,
    "resource": 50,
    "parameters": 400,
}


def upward(sources: Path) -> list[str]:
    """Imports from the own row or one above it. `stepweave/__init__.py` may import all and all may
    import it, since it has nothing but lazy names and the version."""
    return [
        f"{found.importer} imports {found.imported}"
        for found in imports(sources)
        for upper, lower in [found.between]
        if upper and lower and upper != lower and ROWS[lower] >= ROWS[upper]
    ]


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_uses(sources: Path) -> Iterator[str]:
    """Private names of other packages: imported, or taken from a module that is."""
    for found in imports(sources):
        upper, lower = found.between
        if upper != lower and any(map(private, [*found.imported.split("."), found.name])):
            yield f"{found.importer} imports {found.imported} {found.name}"
    for path in sources.rglob("*.py"):
        package = path.relative_to(sources).with_suffix("").parts[0]
        tree = ast.parse(path.read_text())
        modules = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            and f"{node.module}.".startswith("stepweave.")
            and not f"{node.module}.".startswith(f"stepweave.{package}.")
            for alias in node.names
        }
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and private(node.attr)
                and isinstance(node.value, ast.Name)
                and node.value.id in modules
                and node.value.id[0].islower()  # a module, rather than a class that is derived from
            ):
                yield f"{path.relative_to(sources)} uses {node.value.id}.{node.attr}"


def test_every_package_has_a_row_and_no_row_a_package_that_does_not_exist() -> None:
    exist = {path.relative_to(SOURCES).with_suffix("").parts[0] for path in SOURCES.rglob("*.py")}
    assert sorted(chain(*LAYERS)) == sorted(exist - {"__init__"})


def test_imports_lead_downward_so_there_is_no_cycle() -> None:
    assert upward(SOURCES) == []


def test_no_package_uses_private_names_of_another() -> None:
    assert list(private_uses(SOURCES)) == []


@pytest.mark.parametrize(
    "source",
    [
        "from stepweave.engine.loop import StepLoop",
        "from stepweave import engine",
        "import stepweave.engine.loop as loop",
        "from ..engine import loop",
        "def late():\n    from stepweave.engine import loop",
        "if TYPE_CHECKING:\n    from stepweave.engine import StepEngine",
        "from stepweave.recovery import restarts",  # of the same row
    ],
)
def test_an_upward_import_is_found_wherever_it_stands(source: str, tmp_path: Path) -> None:
    module = tmp_path / "stepweave" / "baselines" / "module.py"
    module.parent.mkdir(parents=True)
    module.write_text("from stepweave.jobs.job import Job\n")
    assert upward(tmp_path / "stepweave") == []
    module.write_text(source)
    assert len(upward(tmp_path / "stepweave")) == 1


@pytest.mark.parametrize(
    "source",
    [
        "from stepweave.jobs.job import _here",
        "from stepweave.jobs._job import Job",
        "from stepweave.jobs import job\nprint(job._here)",
    ],
)
def test_a_private_name_of_another_package_is_found(source: str, tmp_path: Path) -> None:
    sources = tmp_path / "stepweave"
    (sources / "engine").mkdir(parents=True)
    (sources / "jobs").mkdir()
    (sources / "jobs" / "thread.py").write_text("from stepweave.jobs.job import _here\n")
    assert list(private_uses(sources)) == []
    (sources / "engine" / "module.py").write_text(source)
    assert len(list(private_uses(sources))) == 1


def test_packages_keep_to_their_budgets() -> None:
    lines = lines_by_package()
    assert sum(lines[name] for name in READ_FIRST) <= READING_PATH
    assert BUDGETS.keys() == ROWS.keys() - set(READ_FIRST)
    over = {name: lines[name] for name, most in BUDGETS.items() if lines[name] > most}
    assert over == {}


def step() -> ast.FunctionDef:
    tree = ast.parse((SOURCES / "engine" / "loop.py").read_text())
    [found] = [
        node
        for loop in tree.body
        if isinstance(loop, ast.ClassDef) and loop.name == "StepLoop"
        for node in loop.body
        if isinstance(node, ast.FunctionDef) and node.name == "step"
    ]
    return found


def test_a_step_reads_in_ten_lines_and_the_page_quotes_them() -> None:
    source = (SOURCES / "engine" / "loop.py").read_text().splitlines()
    found = step()
    lines = source[found.lineno - 1 : found.end_lineno]
    assert len(lines) - 1 <= 10, "less the line of its name"
    assert f"```python\n{textwrap.dedent(chr(10).join(lines))}\n```" in PAGE


def test_the_diagram_is_the_one_that_is_drawn_from_the_imports() -> None:
    assert DIAGRAM.read_text() == diagram(), "run `python -m tools.layers`"
    assert f"]({DIAGRAM.name})" in PAGE


def test_the_page_quotes_the_rule() -> None:
    assert f"```text\n{order()}\n```" in PAGE


def test_the_page_names_every_package_with_what_it_is_for() -> None:
    listed = re.findall(r"^\| `(\w+)/?(?:\.py)?` \|", PAGE, re.MULTILINE)
    assert sorted(listed) == sorted(ROWS)
    assert PURPOSES.keys() == {name for name, row in ROWS.items() if row >= FOUNDATION_ROWS}


def test_what_the_page_names_exists() -> None:
    named = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", PAGE, flags=re.M | re.S))
    paths = [name for name in named if re.fullmatch(r"[\w./-]+(\.\w+|/)", name)]
    paths = [name for name in paths if "/" in name or name.endswith(".py")]
    assert len(paths) > 30
    missing = [
        path for path in paths if not (SOURCES / path).exists() and not (ROOT / path).exists()
    ]
    assert missing == []
    classes = [name for name in named if re.fullmatch(r"[A-Z][a-z]\w+(\.\w+)?", name)]
    assert len(classes) > 10
    defined = {
        name for path in SOURCES.rglob("*.py") for name in names(ast.parse(path.read_text()))
    }
    assert sorted(set(classes) - defined) == []


def names(tree: ast.Module) -> Iterator[str]:
    """Classes, with their methods and the attributes that they set: `Job`, `Job.cancel`."""
    for kind in ast.walk(tree):
        if isinstance(kind, ast.ClassDef):
            yield kind.name
            for node in ast.walk(kind):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield f"{kind.name}.{node.name}"
                elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    yield f"{kind.name}.{node.attr}"
