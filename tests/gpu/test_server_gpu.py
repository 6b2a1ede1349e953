"""The embedded model served from a GPU: `bentoml serve`, an image, the memory it reports, its
end."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.gpu.company import DEVICE
from tests.support.served import serve
from tests.support.waiting import SECONDS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA GPU: the other tests serve"),
]

DRAWN = {"prompt": "a large red circle on a white background", "seed": 1}


def test_images_are_served_from_a_gpu(tmp_path: Path, say: Callable[[str], None]) -> None:
    images = {}
    for device in ("cuda", "cpu"):
        with serve(
            tmp_path / f"{device}.txt", STEPWEAVE_DEVICE=device, STEPWEAVE_DTYPE="float32"
        ) as server:
            server.wait_until_ready()
            answer = httpx.post(
                f"{server.url}/v1/images/generations",
                json=DRAWN,
                headers={"Accept": "image/png"},
                timeout=SECONDS,
            )
            assert answer.status_code == 200, answer.text
            images[device] = np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGB")) / 255
            metrics = httpx.get(f"{server.url}/metrics", timeout=SECONDS).text
            assert server.stop() == 0
        memory = [line for line in metrics.splitlines() if line.startswith("stepweave_vram_bytes")]
        say("\n".join(memory))
        assert any(f'"{device}' in line for line in memory)
        if device == "cuda":
            assert all(float(line.split()[-1]) > 0 for line in memory), memory
            log = (tmp_path / "cuda.txt").read_text()
            say(
                "\n".join(
                    line for line in log.splitlines() if "ready" in line or "self-check" in line
                )
            )
    off = np.abs(images["cuda"] - images["cpu"])
    say(
        f"a pixel differs from that of the CPU's image by {off.mean():.4f} on average, "
        f"{off.max():.3f} at most"
    )
    assert off.mean() < 0.01  # edges may move by a pixel
