"""Compares the contestants' images with those of the pipeline's own call."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.ladder.contestants import common
from benchmarks.serving.contestants import ROOT

TOLERANCE = 2.0  # mean absolute difference of 8-bit samples


class References:
    """Images of the pipeline's own call by request, made once and kept as PNG files."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._folder = folder
        self._threads = threads

    def make(self, bodies: Sequence[bytes]) -> None:
        """Make those that are missing, in a process of its own."""
        missing = {str(self.path(body)): json.loads(body) for body in bodies}
        missing = {path: body for path, body in missing.items() if not Path(path).exists()}
        if not missing:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        log = self._folder / "log.txt"
        with log.open("w") as output:
            ended = subprocess.run(
                [sys.executable, "-m", "benchmarks.ladder.servers.reference"],
                input=json.dumps(missing).encode(),
                cwd=ROOT,
                env=os.environ | common(self._threads),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        if ended.returncode:
            raise SystemExit(f"the reference images could not be made: see {log}")

    def path(self, body: bytes) -> Path:
        return (self._folder / f"{hashlib.sha256(body).hexdigest()[:24]}.png").resolve()

    def wrong(self, images: Mapping[bytes, bytes]) -> int:
        """How many of a contestant's images, by request, are not those of the reference."""
        return sum(
            difference(image, self.path(body).read_bytes()) > TOLERANCE
            for body, image in images.items()
        )


def difference(one: bytes, other: bytes) -> float:
    """The mean absolute difference of the samples (0 to 255) of two image files; infinite if one
    cannot be read, or the sizes differ."""
    try:
        first, second = (
            np.asarray(Image.open(io.BytesIO(file)).convert("RGB"), dtype=np.float64)
            for file in (one, other)
        )
    except OSError:
        return float("inf")
    return float(np.abs(first - second).mean()) if first.shape == second.shape else float("inf")
