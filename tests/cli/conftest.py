"""What a command changes in its process: undone after each test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.support.environment import clean_environment


@pytest.fixture(autouse=True)
def environment(tmp_path: Path) -> Iterator[None]:
    """Commands set the variables of a server that follows them in the same process."""
    with (
        patch.dict(os.environ, clean_environment(HF_HUB_CACHE=str(tmp_path / "hub")), clear=True),
        patch("stepweave.cli.main.quiet_libraries"),  # it would outlast the test
    ):
        yield
