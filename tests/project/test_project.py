"""The project's own files agree with each other."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.resources import files

import stepweave.errors
from tests.support.environment import ROOT, clean_environment
from tests.support.project import PROJECT, PYTHONS
from tests.support.waiting import SECONDS


def test_the_tests_that_documents_name_are_there() -> None:
    named = {
        (file, name)
        for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
        for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", path.read_text())
    }
    assert len(named) > 20
    assert not [one for one in sorted(named) if f"def {one[1]}(" not in (ROOT / one[0]).read_text()]


def test_every_error_stands_in_the_tree_of_its_module() -> None:
    tree = stepweave.errors.__doc__ or ""
    classes = [value for value in vars(stepweave.errors).values() if isinstance(value, type)]
    for cls in (cls for cls in classes if issubclass(cls, Exception)):
        (line,) = re.findall(rf"\b{cls.__name__}\b.*", tree)
        if "(" in line:
            assert f"({cls.status})" in line


def test_torch_is_not_imported_before_the_background_load() -> None:
    code = (
        "import sys, service; print(sorted({'torch', 'diffusers', 'transformers'} & "
        "set(sys.modules)))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert ended.stdout.strip() == "[]", ended.stderr


def test_classifiers_name_every_python_that_is_supported() -> None:
    prefix = "Programming Language :: Python :: 3."
    classifiers = PROJECT["project"]["classifiers"]
    named = [line.removeprefix(prefix) for line in classifiers if line.startswith(prefix)]
    assert [f"3.{minor}" for minor in named] == PYTHONS
    assert len(PYTHONS) >= 2


def test_type_checkers_of_others_are_told_that_the_package_has_types() -> None:
    assert files("stepweave").joinpath("py.typed").is_file()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["stepweave"]
    assert "Typing :: Typed" in PROJECT["project"]["classifiers"]
