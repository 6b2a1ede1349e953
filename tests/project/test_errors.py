"""The tree of exceptions, and the codes of errors."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from functools import cache
from typing import get_args

from click import ClickException

import stepweave
from stepweave import errors
from stepweave.errors import Code, StepweaveError
from tests.support.environment import ROOT

SOURCES = ROOT / "src" / "stepweave"
SERVED = ("stepweave.api.bento", "stepweave.service")  # whose import makes a server
CODES = get_args(Code)
ABOVE = ("loading", "adapters", "store", "images", "telemetry", "serving", "api")


@cache
def exceptions() -> tuple[type[BaseException], ...]:
    """Every exception class that a module of the package defines."""
    return tuple(
        value
        for module in pkgutil.walk_packages(stepweave.__path__, "stepweave.")
        if module.name not in SERVED
        for value in vars(importlib.import_module(module.name)).values()
        if isinstance(value, type)
        and issubclass(value, BaseException)
        and value.__module__ == module.name
    )


def public_errors() -> list[type[StepweaveError]]:
    return [
        kind
        for kind in exceptions()
        if issubclass(kind, StepweaveError) and not kind.__name__.startswith("_")
    ]


def documented_tree() -> dict[str, str | None]:
    """The parent of each class in the tree that errors.py's docstring draws."""
    parents: dict[str, str | None] = {"StepweaveError": None}
    path = ["StepweaveError"]
    for line in inspect.getdoc(errors).splitlines():  # type: ignore[union-attr]
        drawn = re.match(r"((?:│   |    )*)(?:├──|└──) (\w+)", line)
        if drawn is not None:
            depth = len(drawn[1]) // 4 + 1
            path[depth:] = [drawn[2]]
            parents[drawn[2]] = path[depth - 1]
    return parents


def test_every_error_stands_in_the_documented_tree() -> None:
    parents = {
        kind.__name__: None if kind is StepweaveError else kind.__bases__[0].__name__
        for kind in public_errors()
    }
    assert len(parents) > 20
    assert documented_tree() == parents
    assert [name for name in parents if not name.endswith("Error")] == []


def test_other_exceptions_are_signals_of_the_engine_or_of_one_package() -> None:
    """They are no errors, by their names, and no package above the engine knows another's."""
    signals = {kind.__name__: kind for kind in exceptions() if not issubclass(kind, StepweaveError)}
    assert signals
    for name, kind in signals.items():
        assert kind.__bases__ in ((Exception,), (BaseException,), (ClickException,)), name
        assert not name.endswith("Error"), name
    for package in ABOVE:
        for path in (SOURCES / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module:
                    for alias in node.names:
                        met = signals.get(alias.name)
                        elsewhere = node.module.split(".")[1:2] != [package]
                        assert met is None or met.__module__ != node.module or not elsewhere, path


def test_every_error_has_a_status_and_a_known_code() -> None:
    for kind in public_errors():
        assert kind.code in CODES, kind
        assert 400 <= kind.status < 600, kind


def test_codes_are_words_and_the_documented_ones() -> None:
    assert list(CODES) == sorted(set(CODES))
    assert [code for code in CODES if not re.fullmatch(r"[a-z]+(_[a-z]+)*", code)] == []
    rows = dict(
        re.findall(r"^\| `(\w+)` \| ([\d, -]+) \|", (ROOT / "docs/http.md").read_text(), re.M)
    )
    assert list(rows) == list(CODES)
    for kind in public_errors():
        if issubclass(kind, errors.RequestError):
            assert str(kind.status) in rows[kind.code], kind


def test_every_code_is_given_by_the_package() -> None:
    given: set[str] = set()
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "Code":
                node.value = ast.Constant("")  # their list itself
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                given.add(node.value)
    assert set(CODES) - given == set()
