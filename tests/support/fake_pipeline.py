"""A pipeline without weights: its images encode seed and steps, and tests control when it
continues, fails or hangs."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from tests.support.waiting import SECONDS


class Record:
    """Records what happened, and controls what happens next; views share it, as it copies as
    itself."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.steps_run = 0
        self.steps_begun = 0
        self.running = 0
        self.most_running = 0
        self.error: Exception | None = None
        self.pause = 0.0  # seconds of a step
        self.gated = False  # if True, every step waits for `release` or `allow`
        self.started = threading.Event()
        self.release = threading.Event()
        self._allowed = threading.Semaphore(0)
        self._counting = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Record:
        return self

    def allow(self, steps: int) -> None:
        """Let this many gated steps continue."""
        self._allowed.release(steps)

    def held_after(self, steps: int) -> bool:
        """Whether this many steps have run, and the next one waits at the gate, so that everything
        after the last step is done."""
        return self.steps_run == steps and self.steps_begun == steps + 1

    def step(self) -> None:
        with self._counting:
            self.steps_begun += 1
        self.started.set()
        end = time.monotonic() + SECONDS
        while self.gated and not self.release.is_set() and not self._allowed.acquire(timeout=0.005):
            assert time.monotonic() < end
        time.sleep(self.pause)
        if self.error is not None:
            raise self.error
        with self._counting:
            self.steps_run += 1

    def run(self, by: int) -> None:
        """Count a call that begins (1) or ends (-1)."""
        with self._counting:
            self.running += by
            self.most_running = max(self.most_running, self.running)


class FakePipeline:
    """Has the signature of a diffusers text-to-image pipeline, 64x64 natively, sizes in multiples
    of 8.

    With `edits` it has siblings for image to image and inpainting; they share its record.
    """

    vae_scale_factor = 8
    default_sample_size = 8

    def __init__(self, *, edits: bool = False) -> None:
        self.transformer = SimpleNamespace(config=SimpleNamespace(patch_size=1, sample_size=8))
        self.record = Record()
        if edits:
            self.image_to_image: Any = FakeEdits(self)
            self.inpaint: Any = FakeEdits(self)

    @property
    def components(self) -> dict[str, Any]:
        return {"transformer": self.transformer}

    def progress_bar(self, total: int) -> Any:
        return tqdm(total=total, disable=True)

    def __call__(
        self,
        prompt: str | None = None,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        guidance_scale: float = 7.0,
        num_images_per_prompt: int = 1,
        generator: list[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> SimpleNamespace:
        record = self.record
        record.calls.append({name: value for name, value in locals().items() if name != "self"})
        assert height and width and generator and len(generator) == num_images_per_prompt
        pixels = [
            torch.randint(0, 256, (height, width, 3), generator=one, dtype=torch.uint8)
            for one in generator
        ]
        record.run(1)
        try:
            with self.progress_bar(total=num_inference_steps) as bar:
                for _ in range(num_inference_steps):
                    record.step()
                    bar.update()
        finally:
            record.run(-1)
        return SimpleNamespace(images=[Image.fromarray(np.asarray(one)) for one in pixels])


class FakeEdits(FakePipeline):
    """A sibling of a fake: its images are the source where the mask, if there is one, is black,
    else the fake's own."""

    def __init__(self, pipeline: FakePipeline) -> None:
        self.transformer = pipeline.transformer
        self.record = pipeline.record

    def __call__(  # type: ignore[override]
        self,
        prompt: str | None = None,
        image: Any = None,
        mask_image: Image.Image | None = None,
        strength: float = 0.6,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        guidance_scale: float = 7.0,
        num_images_per_prompt: int = 1,
        generator: list[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> SimpleNamespace:
        images = image if isinstance(image, list) else [image]
        assert all(one.mode == "RGB" and one.size == (width, height) for one in images)
        assert mask_image is None or (mask_image.mode, mask_image.size) == ("L", (width, height))
        arguments = {
            name: value
            for name, value in locals().items()
            if name not in ("self", "images", "__class__")
        }
        made = super().__call__(
            prompt,
            negative_prompt,
            height,
            width,
            max(1, int(num_inference_steps * strength)),
            guidance_scale,
            num_images_per_prompt,
            generator,
            output_type,
        )
        self.record.calls[-1] = arguments
        if mask_image is None:
            return made
        return SimpleNamespace(
            images=[
                Image.composite(new, old, mask_image)
                for new, old in zip(made.images, images, strict=True)
            ]
        )
