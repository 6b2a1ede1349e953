"""The tests' own layout: what several test modules share stands in tests/support."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.support.distribution import APART, LONG, SERVED
from tests.support.environment import ROOT


def imported(tree: ast.AST) -> Iterator[str]:
    """The dotted names of all that a module imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_test_module_imports_another() -> None:
    modules = [path for path in (ROOT / "tests").rglob("*.py") if "__pycache__" not in path.parts]
    assert len(modules) > 100
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules
        for name in imported(ast.parse(path.read_text()))
        if any(part.startswith("test_") for part in name.split(".")[1:-1])
        or name.rpartition(".")[2].startswith("test_")
    ]
    assert not wrong


def test_every_folder_of_tests_is_a_package_so_that_equal_names_do_not_meet() -> None:
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_the_modules_that_are_dealt_out_in_a_way_of_their_own_are_there() -> None:
    named = [*SERVED, *APART, *LONG]
    assert [path for path in named if not (ROOT / path).exists()] == []
    assert len(set(LONG)) == len(LONG)
    assert not SERVED & {*APART, *LONG}
