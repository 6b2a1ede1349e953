"""Reads pyproject.toml."""

from __future__ import annotations

import tomllib

from packaging.specifiers import SpecifierSet

from tests.support.environment import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHONS = [
    minor
    for minor in (f"3.{number}" for number in range(8, 20))
    if minor in SpecifierSet(PROJECT["project"]["requires-python"])
]
