"""Every dependency is bounded, tested and explained, and every import asks for one."""

from __future__ import annotations

import functools
import os
import re
from importlib.metadata import Distribution, distributions, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.dependencies import (
    CLIENTS,
    CLIENTS_FILE,
    CONSTRAINTS,
    DOCUMENT,
    LADDER_FILE,
    NODE_FILE,
    REQUIREMENTS,
    imported,
    lines_of,
    may_use,
    name_of,
    problems,
)
from tests.support.environment import ROOT

CLIENTS_ENVIRONMENT = ROOT / ".venv-clients"
MADE_UP = {
    "pyproject.toml": """\
[build-system]
requires = ["setuptools>=77"]
[project]
dependencies = ["numpy>=2", "pillow>=11"]
[project.optional-dependencies]
dev = ["pytest>=8"]
""",
    "requirements.txt": "# pinned\nnumpy==2.4.6\npillow==13.0.0\n",
    "constraints.txt": "numpy==2.4.6\nPillow==13.0.0\npytest==9.2.0\niniconfig==2.3.1\n",
    "tests/clients/requirements.txt": "kserve==0.21.0\nsix==1.17.0\n",
    "benchmarks/ladder/requirements.txt": "fastapi>=0.115\nnumpy>=2\n",
    "tests/clients/node/package.json": '{"dependencies": {"openai": "7.57.0"}}',
    "docs/dependencies.md": """\
## Runtime
| package | why |
| --- | --- |
| `numpy` | arrays of image samples |
| `pillow` | reads and writes image files |
## Development
| `pytest` | finds and runs the tests |
## Build
| `setuptools` | makes the wheel of it |
## Clients
| `kserve` | asks as its users do |
## Node clients
| `openai` | asks from JavaScript, too |
## Ladder
| `fastapi` | serves another contestant's model |
| `numpy` | makes the arrays of a contestant |
""",
    "service.py": "import toy\n",
    "src/toy/__init__.py": "import json\nimport numpy as np\nfrom . import io\n",
    "src/toy/io.py": "from PIL.Image import Image\n",
    "tests/test_toy.py": "import pytest\nfrom tests import other\n\ndef f(): import numpy, toy\n",
    "tests/clients/test_clients.py": "import pytest\n",
    "tests/clients/kserve_rest.py": "from kserve import InferenceRESTClient\n",
    "benchmarks/speed.py": "import toy, pytest\n",
    "benchmarks/ladder/servers/toy.py": "import fastapi, numpy\n",
    ".venv/setup.py": "import nowhere\n",
    "build/made.py": "import nowhere\n",
}
HELD_BY = {"PIL": ["pillow"]}


def made_up(root: Path, file: str = "", old: str = "", new: str = "") -> list[str]:
    """What is wrong with the made-up project once `old` in a file is `new`."""
    for name, text in MADE_UP.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    if file:
        text = MADE_UP.get(file, "")
        assert old in text, "the change changes something"
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text.replace(old, new, 1) if old else new)
    return problems(root, HELD_BY)


def test_every_dependency_is_bounded_tested_and_explained_and_every_import_declared() -> None:
    assert problems(ROOT, packages_distributions()) == []


def test_a_project_whose_dependencies_are_in_order_has_no_problem(tmp_path: Path) -> None:
    assert made_up(tmp_path) == []


def check(found: list[str], *patterns: str) -> None:
    """There is a problem for each pattern, and no other."""
    assert len(found) == len(patterns), found
    assert all(any(re.search(pattern, one) for one in found) for pattern in patterns), found


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("numpy>=2", "numpy", ["Runtime: 'numpy' has no lower bound"]),
        ("numpy>=2", "numpy<3", ["Runtime: 'numpy<3' has no lower bound"]),
        ("numpy>=2", "numpy!=2", ["Runtime: 'numpy!=2' has no lower bound"]),
        ("pytest>=8", "pytest", ["Development: 'pytest' has no lower bound"]),
        ("setuptools>=77", "setuptools", ["Build: 'setuptools' has no lower bound"]),
        ('"numpy>=2"', '"numpy>=2", "numpy>=2"', ["Runtime: numpy stands twice"]),
        (
            '"pytest>=8"',
            '"pytest>=8", "numpy>=2"',
            ["Development: numpy stands in Runtime, too", "Development has no line of numpy"],
        ),
        (
            "dev = [",
            'gpu = ["torchao>=0.16"]\ndev = [',
            ["gpu has no line of torchao", "constraints.txt lacks torchao"],
        ),
    ],
)
def test_what_is_wrong_with_the_projects_own_requirements_is_found(
    tmp_path: Path, old: str, new: str, expected: list[str]
) -> None:
    check(made_up(tmp_path, "pyproject.toml", old, new), *expected)


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        (CONSTRAINTS, "numpy==", "numpy>=", ["'numpy>=2.4.6' is no exact", "lacks numpy"]),
        (CONSTRAINTS, "pytest==9.2.0\n", "", ["constraints.txt lacks pytest"]),
        (CONSTRAINTS, "9.2.0", "7.4.0", ["constraints.txt has pytest 7.4.0, Development >=8"]),
        (REQUIREMENTS, "2.4.6", "2.4.5", ["has numpy 2.4.5, constraints.txt 2.4.6"]),
        (REQUIREMENTS, "numpy==2.4.6\n", "", ["requirements.txt lacks numpy"]),
        (REQUIREMENTS, "pillow", "six==1.17.0\npillow", ["has six, not Runtime"]),
        (CLIENTS_FILE, "six==1.17.0", "six>=1", ["'six>=1' is no exact version"]),
        (CLIENTS_FILE, "six==1.17.0", "six", ["no exact version", "'six' has no lower bound"]),
        (LADDER_FILE, "fastapi>=0.115", "fastapi", ["Ladder: 'fastapi' has no lower bound"]),
        (NODE_FILE, "7.57.0", "*", [r"Node clients: 'openai==\*' has no lower bound"]),
        ("docs/requirements.txt", "", "sphinx==8.2", ["docs/requirements.txt is of no group"]),
    ],
)
def test_files_of_versions_that_do_not_agree_are_found(
    tmp_path: Path, file: str, old: str, new: str, expected: list[str]
) -> None:
    check(made_up(tmp_path, file, old, new), *expected)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("| `pillow` | reads and writes image files |\n", "", ["Runtime has no line of pillow"]),
        ("| `pytest` | finds and runs the tests |\n", "", ["Development has no line of pytest"]),
        ("| `setuptools` | makes the wheel of it |\n", "", ["Build has no line of setuptools"]),
        ("| `kserve` | asks as its users do |\n", "", ["Clients has no line of kserve"]),
        ("| `openai` | asks from JavaScript, too |\n", "", ["Node clients has no line of openai"]),
        (
            "| `pillow`",
            "| `six` | no module imports it |\n| `pillow`",
            ["Runtime does not ask for six"],
        ),
        (
            "| `fastapi` | serves another contestant's model |\n",
            "",
            ["Ladder has no line of fastapi"],
        ),
        ("| `kserve`", "| `mlserver` | no client of it |\n| `kserve`", ["ask for mlserver"]),
        ("| `pillow`", "| `numpy` | a second reason given |\n| `pillow`", ["2 lines of numpy"]),
        ("arrays of image samples", "numpy", ["numpy in Runtime is not explained by 'numpy'"]),
        ("arrays of image samples", "the numpy package", ["numpy in Runtime is not explained"]),
        ("arrays of image samples", "finds and runs the tests", ["'finds .*' stands twice"]),
        ("| `numpy` |", "| numpy |", ["is no line of a package", "Runtime has no line of numpy"]),
        ("## Build\n", "", ["Development does not .* setuptools", "Build has no line of"]),
    ],
)
def test_missing_superfluous_and_empty_lines_of_the_document_are_found(
    tmp_path: Path, old: str, new: str, expected: list[str]
) -> None:
    check(made_up(tmp_path, DOCUMENT, old, new), *expected)


@pytest.mark.parametrize(
    ("file", "code", "expected"),
    [
        ("src/toy/more.py", "import six", "imports six, which is not in Runtime"),
        ("src/toy/more.py", "from pytest import fail", "imports pytest, which is not in Runtime"),
        ("src/toy/more.py", "def f():\n    import six.moves", "imports six"),
        ("src/toy/more.py", "import importlib as i\ni.import_module('six.moves')", "imports six"),
        ("setup.py", "import pytest", "imports pytest, which is not in Build"),
        ("tests/test_more.py", "import six", "imports six, which is not in Runtime or Development"),
        ("tests/test_more.py", "import kserve", "imports kserve"),
        ("benchmarks/more.py", "import six", "imports six"),
        ("benchmarks/more.py", "import fastapi", "imports fastapi, which is not in Runtime or Dev"),
        ("benchmarks/ladder/servers/more.py", "import six", "imports six, which is not in Runtime"),
        ("tools/more.py", "import six", "imports six"),
        ("tests/clients/more.py", "import numpy", "imports numpy, which is not in Clients"),
    ],
)
def test_an_import_that_no_dependency_provides_is_found(
    tmp_path: Path, file: str, code: str, expected: str
) -> None:
    check(made_up(tmp_path, file, "", code), f"{file} {expected}")


def superfluous(asked: list[str], used: set[str], installed: dict[str, Distribution]) -> list[str]:
    """The packages asked for that none of those used needs, nor what these need."""
    left = [line for line in asked if name_of(line) in used]
    reached = set[
        tuple[str, str]
    ]()  # packages, each without an extra and with each that is asked for
    while left:
        requirement = Requirement(left.pop())
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras} - {extra for one, extra in reached if one == name}:
            reached.add((name, extra))
            for line in (installed[name].requires or []) if name in installed else []:
                marker = Requirement(line).marker
                if marker is None or marker.evaluate({"extra": extra}):
                    left.append(line)
    return sorted({name_of(line) for line in asked} - {name for name, _ in reached})


@functools.cache
def clients_installed() -> dict[str, Distribution]:
    paths = [str(path) for path in CLIENTS_ENVIRONMENT.glob("lib/python*/site-packages")]
    return {canonicalize_name(one.metadata["Name"]): one for one in distributions(path=paths)}


@pytest.mark.skipif(
    not CLIENTS_ENVIRONMENT.exists() and not os.environ.get("CI"),
    reason="NOT CHECKED: there is no .venv-clients; `make .venv-clients/stamp` makes it",
)
def test_nothing_is_installed_for_the_clients_that_they_do_not_need() -> None:
    asked = lines_of(ROOT / CLIENTS_FILE)
    used = {
        canonicalize_name(name)
        for path in (ROOT / CLIENTS_FILE).parent.glob("*.py")
        if may_use(path.relative_to(ROOT)) == (CLIENTS,)
        for name in imported(path)
    }
    assert superfluous(asked, used, clients_installed()) == []
    assert superfluous([*asked, "left-over==1"], used, clients_installed()) == ["left-over"]
    assert "grpcio" in superfluous(asked, used - {"kserve"}, clients_installed())
