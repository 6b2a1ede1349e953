"""The embedded model, and numbered calls of it."""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
import transformers

from benchmarks.calls import Call, prompt
from stepweave.config.preset import read_preset

DIRECTORY = Path(__file__).resolve().parents[1] / "models" / "shapes"


class Shapes:
    """The embedded model and its defaults."""

    def __init__(self) -> None:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        diffusers.utils.logging.disable_progress_bar()
        self.pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(
            DIRECTORY, text_encoder_3=None, tokenizer_3=None
        )
        self.pipeline.set_progress_bar_config(disable=True)
        preset = read_preset(DIRECTORY)
        self.steps = preset.num_inference_steps or 20
        self._defaults: Call = {"guidance_scale": preset.guidance_scale, **preset.call}

    def call(self, number: int, steps: int | None = None) -> Call:
        """The arguments of call `number`; each number gives a different prompt and seed."""
        generator = torch.Generator().manual_seed(number)
        steps = steps or self.steps
        return {
            "prompt": prompt(number),
            "num_inference_steps": steps,
            "generator": generator,
            **self._defaults,
        }

    def calls(self, first: int, count: int, steps: int | None = None) -> list[Call]:
        return [self.call(number, steps) for number in range(first, first + count)]

    def batch(self, first: int, count: int, steps: int | None = None) -> Call:
        """The same calls as a single batched call."""
        calls = self.calls(first, count, steps)
        return calls[0] | {name: [call[name] for call in calls] for name in ("prompt", "generator")}
