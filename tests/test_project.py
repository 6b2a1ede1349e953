"""The project's own files agree with each other."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

import stepweave.errors
from tests.conftest import ROOT


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def test_every_dependency_is_bounded_tested_and_explained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    runtime = [re.split(r">=", line) for line in project["dependencies"]]
    constraints, requirements = pins("constraints.txt"), pins("requirements.txt")
    assert set(requirements) == {name for name, _ in runtime}
    assert all(constraints[name] == version for name, version in requirements.items())
    for name, bound in runtime + [re.split(r">=", line) for line in project["optional-dependencies"]["dev"]]:
        tested = constraints[name]
        assert tuple(map(int, bound.split("."))) <= tuple(map(int, tested.split("."))), (name, bound, tested)
    readme = (ROOT / "README.md").read_text()
    assert all(name.removesuffix("-client") in readme for name, _ in runtime)


def test_every_error_stands_in_the_tree_of_its_module() -> None:
    tree = stepweave.errors.__doc__ or ""
    classes = [value for value in vars(stepweave.errors).values() if isinstance(value, type)]
    for cls in (cls for cls in classes if issubclass(cls, Exception)):
        (line,) = re.findall(rf"\b{cls.__name__}\b.*", tree)
        if "(" in line:
            assert f"({cls.status})" in line


@pytest.mark.parametrize("module", ["service.py", "src/stepweave/server.py", "src/stepweave/config.py"])
def test_torch_is_not_imported_before_the_background_load(module: str) -> None:
    tree = ast.parse((ROOT / module).read_text())
    names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
    heavy = {"torch", "diffusers", "transformers", "stepweave.model", "stepweave.loading.loader"}
    assert not heavy & set(names)


def test_modules_can_be_read_in_one_sitting() -> None:
    long = {
        path.name: n for path in Path(ROOT / "src").rglob("*.py") if (n := len(path.read_text().splitlines())) > 350
    }
    assert not long
