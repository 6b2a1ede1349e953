"""The registry of pipelines: how each is built, and six different calls of it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from tests.support.tiny import enliven, networks

PROMPTS = (
    "a red circle",
    "a small blue square on white",
    "ring",
    "",
    "large yellow star, top left",
    "a cross on black",
)
STEPS = (4, 7, 5, 3, 6, 8)
GUIDANCE = (4.0, 1.0, 6.0, 3.0, 5.0, 2.0)  # 1.0 is without classifier-free guidance
GUIDANCE_NAMES = ("guidance_scale", "true_cfg_scale", "prior_guidance_scale")
CALLS = len(PROMPTS)


@dataclass(frozen=True, eq=False)
class Entry:
    """One pipeline class, or one task or mode of it."""

    name: str
    pipeline: str  # its class
    note: str  # what sets it apart from other entries of the class
    module: str  # of this package
    build: Callable[[], Any]
    call: dict[str, Any]  # constants, or functions of the call's number

    def arguments(self, number: int) -> dict[str, Any]:
        """The keyword arguments of call `number`, 0 to 5, with a fresh generator: all calls differ
        in all that may differ."""
        given = {
            "prompt": PROMPTS[number],
            "num_inference_steps": STEPS[number],
            "generator": torch.Generator().manual_seed(number),
        }
        values = {**given, **self.call}
        for name in GUIDANCE_NAMES:
            if isinstance(values.get(name), float):
                values[name] = GUIDANCE[number]
        values = {
            name: value(number) if inspect.isfunction(value) else value
            for name, value in values.items()
        }
        return {name: value for name, value in values.items() if value is not ABSENT}


ABSENT = object()  # as a call's argument: the pipeline has no such argument
ENTRIES: dict[str, Entry] = {}


def entry(**call: Any) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register a builder under its function's name; what it makes is deterministic, in eval mode
    and quiet.

    The function's annotation says the class of what it returns, its docstring, if any, what sets
    the entry apart.

    `call` holds the arguments of every call besides prompt, num_inference_steps and generator, or
    in place of them: constants, or functions of the call's number; a guidance scale given as a
    float takes a different value in each call.
    """

    def register(build: Callable[[], Any]) -> Callable[[], Any]:
        @functools.wraps(build)
        def built() -> Any:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                pipeline: DiffusionPipeline = build()
                for network in networks(pipeline):
                    enliven(network.eval())
            pipeline.set_progress_bar_config(disable=True)
            return pipeline

        kind = build.__annotations__["return"].removeprefix("diffusers.")
        note = " ".join((build.__doc__ or "").split())
        module = build.__module__.rpartition(".")[2]
        assert build.__name__ not in ENTRIES, build.__name__
        ENTRIES[build.__name__] = Entry(build.__name__, kind, note, module, built, call)
        return built

    return register


def example_image(number: int, side: int = 16) -> Image.Image:
    """An image of its own for each call, `side` x `side` pixels."""
    generator = torch.Generator().manual_seed(100 + number)
    pixels = torch.randint(0, 256, (side, side, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def mask(number: int, side: int = 16) -> Image.Image:
    """What to paint anew: the upper or the left half, in turn."""
    canvas = Image.new("L", (side, side), 0)
    canvas.paste(255, (0, 0, side, side // 2) if number % 2 else (0, 0, side // 2, side))
    return canvas
