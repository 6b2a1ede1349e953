"""Trains parts of the embedded model, in small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.environment import ROOT, clean_environment
from tests.support.waiting import SECONDS


def check_resumes(folder: Path, tool: str, *names: str, file: str) -> None:
    """Three steps of a tool: interrupted after two and started again, the weights equal those of
    one go."""

    def train(work: str, steps: int) -> bytes:
        target = folder / f"{work}-result"
        command = [
            sys.executable, "-m", f"tools.shapes.{tool}", *names, "--device", "cpu",
            "--work", str(folder / work), "--output", str(target), "--scenes", "32",
            "--steps", str(steps),
        ]  # fmt: skip
        environment = clean_environment(OMP_NUM_THREADS="1")
        subprocess.run(
            command, cwd=ROOT, check=True, env=environment, capture_output=True, timeout=SECONDS
        )
        return (target / file).read_bytes()

    whole = train("whole", 3)
    train("parts", 2)
    assert train("parts", 3) == whole
