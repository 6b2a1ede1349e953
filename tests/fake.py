"""A pipeline without weights: its pictures tell seed and steps, and tests decide when it moves, fails or hangs."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm


class Record:
    """What happened and what shall happen; views share it, since it copies as itself."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.steps_run = 0
        self.running = 0
        self.most_running = 0
        self.error: Exception | None = None
        self.pause = 0.0  # seconds of a step
        self.gated = False  # with True every step waits for `release`
        self.started = threading.Event()
        self.release = threading.Event()

    def __deepcopy__(self, memo: dict[int, Any]) -> Record:
        return self


class FakePipeline:
    """Has the signature of a diffusers text-to-image pipeline, 64x64 natively, sizes in multiples of 8.

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
        pixels = [torch.randint(0, 256, (height, width, 3), generator=one, dtype=torch.uint8) for one in generator]
        record.running += 1
        record.most_running = max(record.most_running, record.running)
        try:
            with self.progress_bar(total=num_inference_steps) as bar:
                for _ in range(num_inference_steps):
                    self._step()
                    bar.update()
        finally:
            record.running -= 1
        return SimpleNamespace(images=[Image.fromarray(np.asarray(one)) for one in pixels])

    def _step(self) -> None:
        record = self.record
        record.started.set()
        if record.gated:
            assert record.release.wait(60)
        time.sleep(record.pause)
        if record.error is not None:
            raise record.error
        record.steps_run += 1


class FakeEdits(FakePipeline):
    """A sibling of a fake: its pictures are the source where the mask, if there is one, is black, else the fake's own."""

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
        arguments = {name: value for name, value in locals().items() if name not in ("self", "images", "__class__")}
        made = super().__call__(
            prompt, negative_prompt, height, width, max(1, int(num_inference_steps * strength)), guidance_scale,
            num_images_per_prompt, generator, output_type,
        )  # fmt: skip
        self.record.calls[-1] = arguments
        if mask_image is None:
            return made
        return SimpleNamespace(
            images=[Image.composite(new, old, mask_image) for new, old in zip(made.images, images, strict=True)]
        )
