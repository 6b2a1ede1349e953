"""The embedded model as a user of diffusers loads it, and calls of it for requests."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from PIL.Image import Image

DIRECTORY = Path(__file__).resolve().parents[3] / "models" / "shapes"
# what every call of the model is given, as the server does
CALL: dict[str, Any] = json.loads((DIRECTORY / "stepweave.json").read_text())["call"]
THREADS = "LADDER_THREADS"  # the environment variable with the number of torch's threads
PATH = "/v1/images/generations"
MAX_BATCH = 16  # requests


@dataclass(frozen=True)
class Asked:
    """A request for an image."""

    prompt: str
    seed: int
    steps: int
    width: int
    height: int
    guidance: float

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Asked:
        """Read a body in the form of OpenAI's, with the fields that diffusers adds."""
        width, height = (int(side) for side in body["size"].split("x"))
        return cls(
            body["prompt"],
            body["seed"],
            body["num_inference_steps"],
            width,
            height,
            body["guidance_scale"],
        )

    @property
    def kind(self) -> Hashable:
        """Equal for requests that can share one call of the pipeline."""
        return self.steps, self.width, self.height, self.guidance

    @property
    def arguments(self) -> dict[str, Any]:
        """What a call of the pipeline is given for all requests of this kind."""
        return {
            "num_inference_steps": self.steps,
            "width": self.width,
            "height": self.height,
            "guidance_scale": self.guidance,
            **CALL,
        }

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def load(pipeline_class: type[Any] = diffusers.StableDiffusion3Pipeline) -> Any:
    """The embedded model on the CPU; sets the number of torch's threads."""
    if THREADS in os.environ:
        torch.set_num_threads(int(os.environ[THREADS]))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    pipeline = pipeline_class.from_pretrained(DIRECTORY, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call(pipeline: Any, asked: Sequence[Asked]) -> list[Image]:
    """One call of the pipeline for requests of one kind."""
    images: list[Image] = pipeline(
        prompt=[one.prompt for one in asked],
        generator=[one.generator for one in asked],
        **asked[0].arguments,
    ).images
    return images


def call_each_kind(pipeline: Any, asked: Sequence[Asked]) -> list[str]:
    """One call for each kind among the requests, one after the other; returns their images in the
    requests' order, as PNG files in base64."""
    kinds: dict[Hashable, list[int]] = {}
    for number, one in enumerate(asked):
        kinds.setdefault(one.kind, []).append(number)
    files: dict[int, str] = {}
    for numbers in kinds.values():
        images = call(pipeline, [asked[number] for number in numbers])
        files |= zip(numbers, map(png, images), strict=True)
    return [files[number] for number in range(len(asked))]


def png(image: Image) -> str:
    """The image as a PNG file in base64."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def answer(file: str) -> dict[str, Any]:
    """The answer in the form of OpenAI's."""
    return {"data": [{"b64_json": file}]}
