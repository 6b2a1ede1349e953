"""Jobs are warned of their own prompts that are cut, and of nobody else's."""

from __future__ import annotations

import functools
import threading
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from stepweave import StepEngine
from stepweave.baselines import thread_pool as pool
from stepweave.engine.engine import Mode
from stepweave.jobs.job import Job
from stepweave.truncation.cuts import Cut
from stepweave.truncation.prompts import warned
from stepweave.truncation.tokenizers import NOBODY, listener
from tests.support.tiny import FAMILIES
from tests.support.waiting import SECONDS

pytestmark = pytest.mark.usefixtures("every_row_pays")

# CLIP's: 14 tokens and two special ones
LONG = "a large red circle on a blue background, a large star on a white background"
SHORT = "a red circle"
LOST = "'white background'"
MODES: list[Mode] = ["step", "threads", "request", "off"]

every_mode = pytest.mark.parametrize("mode", MODES)


@functools.cache
def built(name: str) -> Any:
    return FAMILIES[name].build()


def run(name: str, mode: Mode = "step", **arguments: Any) -> Job:
    prompt = arguments.pop("prompt", SHORT)
    with StepEngine(built(name), mode) as engine:
        job = engine.submit(**FAMILIES[name].arguments(prompt, steps=2, **arguments))
        job.exception(SECONDS)
    return job


@every_mode
def test_a_cut_prompt_is_named_once_and_the_image_is_the_plain_one(mode: Mode) -> None:
    """Both of SD3's tokenizers cut it at the same place."""
    place = len("a large red circle on a blue background, a large star on a")
    warning = (
        f"prompt: the text encoder (tokenizer) reads 16 tokens; the text after character {place} "
        f"was left out: {LOST}"
    )
    job = run("stable_diffusion_3", mode, prompt=LONG)
    assert job.warnings == [warning]
    plain = built("stable_diffusion_3")(**FAMILIES["stable_diffusion_3"].arguments(LONG, steps=2))
    assert np.array_equal(job.result()[0], plain[0])
    assert run("stable_diffusion_3", mode).warnings == []
    assert listener() is NOBODY


def test_each_text_and_limit_is_told_of() -> None:
    job = run("flux", prompt=LONG, prompt_2=LONG[:30], max_sequence_length=16)
    first, second = job.warnings
    assert first.startswith(
        "prompt: the text encoder (tokenizer) reads 16 tokens; the text after character 58 "
    )
    assert second.startswith(
        "prompt_2: the text encoder (tokenizer_2) reads 16 tokens; the text after character 14 "
    )
    job = run("flux", prompt=LONG)  # one text, two places
    assert [warning.split(" tokens")[0] for warning in job.warnings] == [
        "prompt: the text encoder (tokenizer) reads 16",
        "prompt: the text encoder (tokenizer_2) reads 16",
    ]
    job = run("stable_diffusion", negative_prompt=LONG)
    assert [warning.split(":")[0] for warning in job.warnings] == ["negative_prompt"]


def test_arguments_by_position_and_lists() -> None:
    family = FAMILIES["stable_diffusion"]
    arguments = family.arguments("", steps=1)
    arguments.pop("prompt")
    with StepEngine(built(family.name)) as engine:
        by_position = engine.submit(LONG, **arguments)
        arguments["generator"] = torch.Generator().manual_seed(0)
        several = engine.submit(prompt=[SHORT, LONG, "a star"], **arguments)
        for job in (by_position, several):
            job.result(SECONDS)
    assert [warning.split(":")[0] for warning in by_position.warnings] == ["prompt"]
    assert [warning.split(":")[0] for warning in several.warnings] == ["prompt[1]"]


def test_a_prompt_within_a_template_is_counted_from_its_own_beginning() -> None:
    """Qwen-Image puts 34 tokens before a prompt and drops them again; tokens after it are a loss of
    nothing that was said."""
    pipeline = built("qwen_image")
    with mock.patch.object(pipeline, "tokenizer_max_length", 16):
        prompt = "zzzzzzzzzzzzzzzz, of which the end is left out"
        (warning,) = run("qwen_image", prompt=prompt).warnings
        assert warning.startswith(
            "prompt: the text encoder (tokenizer) reads 50 tokens; the text after character 16 was "
        )
        assert warning.endswith("left out: ', of which the end is left out'")
        assert run("qwen_image", prompt="z").warnings == []


def test_a_prompt_that_textual_inversion_expands() -> None:
    pipeline = FAMILIES["stable_diffusion"].build()
    pipeline.load_textual_inversion(torch.ones(9, 16), token="<cat>")
    with StepEngine(pipeline) as engine:
        arguments = FAMILIES["stable_diffusion"].arguments(
            "a <cat> on a white background, top left", steps=1
        )
        job = engine.submit(**arguments)
        job.result(SECONDS)
    (warning,) = job.warnings
    assert warning.startswith(
        "a prompt, as the pipeline prepared it: the text encoder (tokenizer) reads 16 tokens; "
    )
    assert warning.endswith("', top left'")


@every_mode
def test_jobs_side_by_side_get_their_own(mode: Mode) -> None:
    """Eight prompts, half of them too long, each with words of its own at the end."""
    family = FAMILIES["stable_diffusion"]
    words = ["red", "green", "blue", "yellow", "purple", "orange", "black", "white"]
    prompts = [f"{LONG} and {word}" if i % 2 else word for i, word in enumerate(words)]
    together: list[int] = []
    run_batch = pool.run_batch

    def counted(scope: Any, jobs: list[Job]) -> Any:
        together.append(len(jobs))
        return run_batch(scope, jobs)

    gate = threading.Event()
    hold = (
        {"callback_on_step_end": lambda *_: (gate.wait(SECONDS), {})[1]}
        if mode == "request"
        else {}
    )
    with (
        StepEngine(built(family.name), mode) as engine,
        mock.patch.object(pool, "run_batch", counted),
    ):
        first = engine.submit(**family.arguments(SHORT, steps=1, **hold))
        jobs = [
            engine.submit(
                **family.arguments(prompt, steps=3, seed=i, negative_prompt=prompts[-1 - i])
            )
            for i, prompt in enumerate(prompts)
        ]
        gate.set()
        for job in [first, *jobs]:
            job.result(SECONDS)
    assert together == ([len(jobs)] if mode == "request" else [])
    assert first.warnings == []
    for i, job in enumerate(jobs):
        name = "prompt" if i % 2 else "negative_prompt"
        word = words[i] if i % 2 else words[-1 - i]
        (warning,) = job.warnings
        assert warning.startswith(f"{name}: ")
        assert warning.endswith(f"and {word}'")


class Pipeline:
    def __call__(
        self, prompt: str, negative_prompt: str = "", output_type: str = "pil"
    ) -> None: ...


@dataclass(eq=False)
class Reader:
    """What `warned` asks of a job."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    warnings: dict[Hashable, str] = field(default_factory=dict)

    def warn(self, key: Hashable, message: str) -> None:
        self.warnings.setdefault(key, message)

    def read(self, key: Hashable, tokens: int) -> None: ...


def told(
    text: str, index: int, count: int, *given: dict[str, Any], position: int | None = 5
) -> list[list[str]]:
    """The warnings of jobs with these arguments whose call cut a text."""
    jobs = [Reader((), arguments) for arguments in given]
    with warned(Pipeline(), jobs):
        report = listener().cut
        assert report is not None
        report(Cut(text, index, count, "right", position, text[5:], 16, "tokenizer"))
    return [[warning.split(":")[0] for warning in job.warnings.values()] for job in jobs]


def test_who_is_warned() -> None:
    cat, dog = {"prompt": "a long cat"}, {"prompt": "a long dog"}
    assert told("a long cat", 0, 2, cat, dog) == [["prompt"], []]
    assert told("a long cat", 0, 1, cat, cat) == [["prompt"], ["prompt"]]
    assert told("a long cat", 1, 2, cat, cat) == [["prompt"], ["prompt"]]
    # prepared texts: of whom, the place tells, and else the text; never another's
    assert told("A LONG CATS", 1, 2, cat, dog) == [[], ["a prompt, as the pipeline prepared it"]]
    assert told("A LONG CATS", 3, 4, cat, dog) == [[], ["a prompt, as the pipeline prepared it"]]
    assert told("A LONG CATS", 0, 1, cat, dog) == [[], []]
    assert told("[a long dog]", 0, 1, cat, dog) == [[], ["prompt"]]
    assert told("a long dog", 0, 1, {"prompt": "  A long DOG\n"}) == [["prompt"]]
    assert told("a long dog", 0, 1, {"prompt": "a long dog"}, position=None) == [["prompt"]]
    # equal arguments are one text; others that it happens to hold are not it
    assert told("a long dog", 0, 1, dog | {"negative_prompt": "a long dog"}) == [["prompt"]]
    assert told("a long pillow", 0, 1, {"prompt": "a long pillow", "output_type": "pil"}) == [
        ["prompt"]
    ]
    assert told("a long dog", 0, 1, dog | {"negative_prompt": "dog"}) == [["prompt"]]
    assert told("a dog and what was made of it", 0, 1, {"prompt": "a", "caption": "dog"}) == [
        ["a prompt, as the pipeline prepared it"]
    ]


def test_excerpts_are_short_and_of_ones_own_text() -> None:
    job = Reader((), {"prompt": "  a long tale " + "é" * 3000})
    with warned(Pipeline(), [job]):
        report = listener().cut
        assert report is not None
        whole = "Draw: a long tale " + "é" * 3000 + " as told"
        report(Cut(whole, 0, 1, "right", 13, whole[13:], 16, "tokenizer"))
        report(Cut(whole, 0, 1, "right", 13, whole[13:], 16, "tokenizer_2"))
        report(Cut(whole, 0, 1, "left", 12, whole[:12], 16, "tokenizer"))
    first, second = job.warnings.values()
    assert first.startswith(
        "prompt: the text encoder (tokenizer) reads 16 tokens; the text after character 9 was left "
        "out: 'tale é"
    )
    assert len(first) < 200
    assert second.endswith("the text before character 9 was left out: 'a long'")
