"""The environment of contestants whose packages the project does not have."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.serving.contestants import ROOT
from benchmarks.serving.report import progress

FOLDER = ROOT / "build" / "ladder-venv"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
# the same versions as the project's own: the model must be computed by the same code
SHARED = ("accelerate", "diffusers", "numpy", "pillow", "safetensors", "torch", "transformers")


def python() -> Path | None:
    """The environment's Python, if there is one."""
    path = FOLDER / "bin" / "python"
    return path if path.exists() else None


def install() -> None:
    """Create the environment, with the project's constraints."""
    progress(f"installing {REQUIREMENTS.relative_to(ROOT)} into {FOLDER.relative_to(ROOT)}")
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(FOLDER)], check=True)
    pip = [str(FOLDER / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, "--requirement", str(REQUIREMENTS), *SHARED, *constraints], check=True)
