"""`stepweave generate` without a server, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.support.environment import clean_environment
from tests.support.served import PROMPT
from tests.support.waiting import SECONDS
from tools.shapes.checker import wrong_parts


@pytest.mark.full
def test_this_process_loads_the_model_and_makes_an_image(tmp_path: Path) -> None:
    """Also where the environment is a server's."""
    command = [sys.executable, "-m", "stepweave", "generate", PROMPT, "--seed", "7", "--no-warmup"]
    ended = subprocess.run(
        [*command, "--out", str(tmp_path / "images")],
        env=clean_environment(
            STEPWEAVE_API_KEYS="secret", STEPWEAVE_STATE_DIR=str(tmp_path / "state")
        ),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert ended.returncode == 0, ended.stderr
    assert not (tmp_path / "state").exists()
    (file,) = (tmp_path / "images").iterdir()
    assert ended.stdout == f"{file}\n"
    with Image.open(file) as image:
        assert wrong_parts(image, PROMPT) == []
