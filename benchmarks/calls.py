"""Prompts, copies of pipelines, and jobs run together, for benchmarks of the engine (this module
does not import the server)."""

from __future__ import annotations

import copy
import itertools
from typing import Any

from torch import nn

from stepweave import StepEngine
from stepweave.engine import Job
from tools.shapes.scenes import COLOURS, HORIZONTAL, SHAPES, SIZES, VERTICAL

SECONDS = 600  # timeout of a job
FRESH = 3000  # first number of calls that warm-ups do not use

Call = dict[str, Any]


def prompt(number: int) -> str:
    """One of the 6,048 prompts of the embedded model's grammar; they repeat after the last."""
    words: list[Any] = []
    for choices in (tuple(COLOURS), SHAPES, range(1, len(COLOURS)), SIZES, HORIZONTAL, VERTICAL):
        number, choice = divmod(number, len(choices))
        words.append(choices[choice])
    colour, shape, shift, size, horizontal, vertical = words
    colours = tuple(COLOURS)
    background = colours[(colours.index(colour) + shift) % len(colours)]
    place = " ".join(word for word in (vertical, horizontal) if word)
    article = "an" if background == "orange" else "a"
    return f"a {size} {colour} {shape} on {article} {background} background" + (
        f", {place}" if place else ""
    )


def twin(pipeline: Any) -> Any:
    """A copy of the pipeline with modules of its own that share the weights, so that an engine's
    hooks on one do not slow the other."""
    modules = {
        name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)
    }
    tensors = itertools.chain(*((*part.parameters(), *part.buffers()) for part in modules.values()))
    memo = {id(tensor): tensor for tensor in tensors}
    twins = {name: copy.deepcopy(module, memo) for name, module in modules.items()}
    other = type(pipeline)(**{**pipeline.components, **twins})
    other.set_progress_bar_config(disable=True)
    return other


def run(engine: StepEngine, calls: list[Call]) -> list[Job]:
    """Submit all calls, and wait until the last is done."""
    jobs = [engine.submit(**call) for call in calls]
    for job in jobs:
        job.result(SECONDS)
    return jobs
