"""Checks a project's dependencies: bounds, versions, reasons, and imports of undeclared packages.

`docs/dependencies.md` has a section with a table for each group of dependencies.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

RUNTIME, DEVELOPMENT, BUILD = "Runtime", "Development", "Build"
CLIENTS, NODE, LADDER = "Clients", "Node clients", "Ladder"
APART = (BUILD, RUNTIME, CLIENTS, NODE, LADDER)  # groups that are not extras of the package
DOCUMENT = "docs/dependencies.md"
CLIENTS_FILE = "tests/clients/requirements.txt"
NODE_FILE = "tests/clients/node/package.json"
LADDER_FILE = "benchmarks/ladder/requirements.txt"
REQUIREMENTS, CONSTRAINTS = "requirements.txt", "constraints.txt"
FEWEST_WORDS = 3  # of a reason, besides the package's name
_IMPORTING = {"import_module", "__import__", "importorskip", "find_spec"}

Groups = dict[str, list[str]]


def problems(root: Path, distributions: Mapping[str, list[str]]) -> list[str]:
    """All problems; `distributions` has the packages of importable names."""
    groups = asked_for(root)
    wrong = [*bounds(groups), *versions(root, groups), *others(root)]
    imports = list(third_party_imports(root, distributions))
    wrong += undeclared(groups, imports)
    wrong += reasons(groups, imports, (root / DOCUMENT).read_text())
    return sorted(set(wrong))


def asked_for(root: Path) -> Groups:
    """The requirements of each group, as written."""
    file = tomllib.loads((root / "pyproject.toml").read_text())
    groups = {BUILD: file["build-system"]["requires"], RUNTIME: file["project"]["dependencies"]}
    extras = file["project"].get("optional-dependencies", {}) | file.get("dependency-groups", {})
    groups |= {DEVELOPMENT if name == "dev" else name: lines for name, lines in extras.items()}
    _include(groups, file["project"].get("name", ""))
    groups[CLIENTS] = lines_of(root / CLIENTS_FILE)
    groups[LADDER] = lines_of(root / LADDER_FILE)
    node = json.loads((root / NODE_FILE).read_text())
    wanted = node.get("dependencies", {}) | node.get("devDependencies", {})
    groups[NODE] = [f"{name}=={version}" for name, version in wanted.items()]
    return groups


def _include(groups: Groups, project: str) -> None:
    """Put extras of the project itself, which development requires, in their place."""
    for line in list(groups.get(DEVELOPMENT, ())):
        requirement = parsed(line)
        if requirement is not None and requirement.name == project:
            groups[DEVELOPMENT].remove(line)
            for extra in requirement.extras:
                groups[DEVELOPMENT] += groups.pop(extra)


def lines_of(path: Path) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


def name_of(line: str) -> str:
    return canonicalize_name(re.split(r"[^\w.-]", line, maxsplit=1)[0])


def parsed(line: str) -> Requirement | None:
    try:
        return Requirement(line)
    except InvalidRequirement:
        return None


def bounds(groups: Groups) -> Iterator[str]:
    """Requirements without a lower bound, and duplicates."""
    for group, lines in groups.items():
        for line in lines:
            requirement = parsed(line)
            if requirement is None or not any(
                each.operator in (">=", "==", "~=", ">") and not each.version.startswith("*")
                for each in requirement.specifier
            ):
                yield f"{group}: {line!r} has no lower bound"
    named = {group: [name_of(line) for line in lines] for group, lines in groups.items()}
    for group, names in named.items():
        yield from (f"{group}: {name} stands twice" for name, n in Counter(names).items() if n > 1)
    for group, names in named.items():
        if group not in APART:
            for name in set(names) & set(named[RUNTIME]):
                yield f"{group}: {name} stands in {RUNTIME}, too"


def exact(path: Path, lines: list[str]) -> tuple[dict[str, str], list[str]]:
    """The versions that a file pins, and its lines that do not pin one."""
    pins, wrong = {}, []
    for line in lines:
        requirement = parsed(line)
        specifiers = list(requirement.specifier) if requirement else []
        if len(specifiers) == 1 and specifiers[0].operator == "==" and "*" not in line:
            pins[name_of(line)] = specifiers[0].version
        else:
            wrong.append(f"{path.name}: {line!r} is no exact version")
    return pins, wrong


def versions(root: Path, groups: Groups) -> Iterator[str]:
    """Versions that differ between files."""
    pins, wrong = exact(root / REQUIREMENTS, lines_of(root / REQUIREMENTS))
    yield from wrong
    tested, wrong = exact(root / CONSTRAINTS, lines_of(root / CONSTRAINTS))
    yield from wrong
    yield from exact(root / CLIENTS_FILE, groups[CLIENTS])[1]
    runtime = {name_of(line) for line in groups[RUNTIME]}
    yield from (f"{REQUIREMENTS} lacks {name}" for name in runtime - set(pins))
    yield from (f"{REQUIREMENTS} has {name}, not {RUNTIME}" for name in set(pins) - runtime)
    for name, version in pins.items():
        if tested.get(name, version) != version:
            yield f"{REQUIREMENTS} has {name} {version}, {CONSTRAINTS} {tested[name]}"
    for group, lines in groups.items():
        for requirement in filter(None, map(parsed, lines)):
            name = canonicalize_name(requirement.name)
            if group in APART and group != RUNTIME:
                continue
            if name not in tested:
                yield f"{CONSTRAINTS} lacks {name}"
            elif not requirement.specifier.contains(tested[name], prereleases=True):
                yield f"{CONSTRAINTS} has {name} {tested[name]}, {group} {requirement.specifier}"


def sources(root: Path, pattern: str) -> Iterator[Path]:
    """Files of the project, without environments and build outputs."""
    yield from root.glob(pattern)
    for folder in root.iterdir():
        if folder.is_dir() and not folder.name.startswith(".") and folder.name != "build":
            yield from folder.rglob(pattern)


def others(root: Path) -> Iterator[str]:
    for path in sources(root, "*requirements*.txt"):
        name = str(path.relative_to(root))
        if name not in (REQUIREMENTS, CLIENTS_FILE, LADDER_FILE):
            yield f"{name} is of no group"


def imported(path: Path) -> Iterator[str]:
    """The first part of each name that a module imports, at any place."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function: Any = node.func
            called = getattr(function, "attr", getattr(function, "id", None))
            names = [str(node.args[0].value)] if called in _IMPORTING else []
        yield from (name.partition(".")[0] for name in names if name.partition(".")[0])


def may_use(path: Path) -> tuple[str, ...]:
    """The groups that a module may import from."""
    if path == Path("setup.py"):
        return (BUILD,)
    if path.parts[0] == "src" or len(path.parts) == 1:
        return (RUNTIME,)
    if path.parts[:2] == ("tests", "clients") and not path.name.startswith(("test_", "__init__")):
        return (CLIENTS,)
    if path.parts[:3] == ("benchmarks", "ladder", "servers"):
        return (RUNTIME, DEVELOPMENT, LADDER)
    return (RUNTIME, DEVELOPMENT)


def third_party_imports(
    root: Path, distributions: Mapping[str, list[str]]
) -> Iterator[tuple[Path, str, set[str]]]:
    """Modules, their imports from outside of the project and of Python, and the packages that may
    have these."""
    files = [path.relative_to(root) for path in sources(root, "*.py")]
    ours = {path.parts[path.parts[0] == "src"].removesuffix(".py") for path in files}
    for path in files:
        for name in set(imported(root / path)) - ours - sys.stdlib_module_names:
            packages = distributions.get(name, [name])
            yield path, name, {canonicalize_name(package) for package in packages}


def undeclared(groups: Groups, imports: list[tuple[Path, str, set[str]]]) -> Iterator[str]:
    for path, name, packages in imports:
        allowed = may_use(path)
        if not packages & {name_of(line) for group in allowed for line in groups.get(group, [])}:
            yield f"{path} imports {name}, which is not in {' or '.join(allowed)}"


def reasons(
    groups: Groups, imports: list[tuple[Path, str, set[str]]], document: str
) -> Iterator[str]:
    """Packages without a valid line in the document, and lines without a package. Of the clients'
    packages, only imported ones need a line; the others are their dependencies."""
    wanted = {group: {name_of(line) for line in lines} for group, lines in groups.items()}
    used = {
        package for path, _, packages in imports if CLIENTS in may_use(path) for package in packages
    }
    explained: list[tuple[str, str]] = []
    whys: list[str] = []
    section = ""
    for line in document.splitlines():
        if line.startswith("#"):
            section = line.lstrip("# ")
        if not line.startswith("|") or line in ("| package | why |", "| --- | --- |"):
            continue
        row = re.fullmatch(r"\| `([^`|]+)` \| ([^|]+) \|", line)
        if row is None:
            yield f"{DOCUMENT}: {line!r} is no line of a package"
            continue
        name, why = canonicalize_name(row[1]), row[2].strip()
        explained.append((section, name))
        whys.append(why)
        words = re.findall(r"\w+", why.lower())
        if sum(word not in re.split(r"\W", name) for word in words) < FEWEST_WORDS:
            yield f"{DOCUMENT}: {name} in {section} is not explained by {why!r}"
        if name not in wanted.get(section, ()):
            yield f"{DOCUMENT}: {section} does not ask for {name}"
    for (section, name), count in Counter(explained).items():
        if count > 1:
            yield f"{DOCUMENT}: {section} has {count} lines of {name}"
    yield from (f"{DOCUMENT}: {why!r} stands twice" for why, n in Counter(whys).items() if n > 1)
    for group, names in wanted.items():
        needed = names & used if group == CLIENTS else names
        for name in needed - {name for section, name in explained if section == group}:
            yield f"{DOCUMENT}: {group} has no line of {name}"
