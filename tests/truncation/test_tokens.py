"""Tokens that tokenizers read are counted: for whose prompts, and without padding."""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from stepweave import StepEngine
from stepweave.compat.locks import LockedTokenizer
from stepweave.engine.engine import Mode
from stepweave.truncation.tokenizers import NOBODY, Reporter, listener, listening
from stepweave.truncation.tokens import Reading
from tests.support.tiny import FAMILIES
from tests.support.tokenizers import MAKERS
from tests.support.waiting import SECONDS

MODES: list[Mode] = ["step", "threads", "request", "off"]
every_kind = pytest.mark.parametrize("kind", MAKERS)


@functools.cache
def plain(kind: str) -> Any:
    return MAKERS[kind]()


def read(kind: str, *args: Any, method: str = "__call__", **kwargs: Any) -> list[Reading]:
    found: list[Reading] = []
    with listening(read=found.append):
        reporter = Reporter(plain(kind), f"the {kind}")
        getattr(LockedTokenizer(plain(kind), threading.RLock(), reporter), method)(*args, **kwargs)
    assert listener() is NOBODY
    return found


@every_kind
@settings(deadline=None, max_examples=25)
@given(
    texts=st.lists(st.text("ab c", max_size=20), min_size=1, max_size=3),
    tensors=st.sampled_from([None, "pt"]),
)
def test_padding_counts_nothing(kind: str, texts: list[str], tensors: str | None) -> None:
    if plain(kind).pad_token_id is None:
        plain(kind).pad_token = plain(kind).eos_token
    expected = [len(plain(kind)(text)["input_ids"]) for text in texts]
    found = read(kind, texts, padding="max_length", max_length=32, return_tensors=tensors)
    assert [(one.text, one.tokens, one.index, one.count) for one in found] == [
        (text, tokens, i, len(texts))
        for i, (text, tokens) in enumerate(zip(texts, expected, strict=True))
    ]
    assert {one.tokenizer for one in found} == {f"the {kind}"}


@every_kind
def test_what_is_cut_off_counts_nothing(kind: str) -> None:
    long = "a large red circle on a blue background, " * 9
    assert [one.tokens for one in read(kind, long, truncation=True, max_length=16)] == [16]
    assert [
        one.tokens for one in read(kind, long, method="encode", truncation=True, max_length=16)
    ] == [16]


def test_without_a_mask_padding_is_told_by_its_token() -> None:
    tokenizer = transformers.ByT5Tokenizer()
    found: list[Reading] = []
    with listening(read=found.append):
        LockedTokenizer(tokenizer, threading.RLock(), Reporter(tokenizer, "tokenizer"))(
            "abc", padding="max_length", max_length=9, return_attention_mask=False
        )
    assert [one.tokens for one in found] == [4]


def test_texts_and_markers_are_no_reading() -> None:
    assert read("clip", "a red circle", method="tokenize") == []
    assert read("clip", [320, 736], method="decode") == []


def run(mode: Mode, *prompts: str, **arguments: Any) -> list[int]:
    """The tokens of jobs that may share calls."""
    family = FAMILIES["stable_diffusion"]
    with StepEngine(family.build(), mode) as engine:
        jobs = [
            engine.submit(**family.arguments(prompt, steps=2, **arguments)) for prompt in prompts
        ]
        for job in jobs:
            job.result(SECONDS)
    return [job.tokens for job in jobs]


@pytest.mark.parametrize("mode", MODES)
def test_each_job_counts_its_own_prompts_once(mode: Mode) -> None:
    """Two words and two special tokens; the negative prompt, none and two. It is a prompt's tokens,
    not an image's."""
    assert run(mode, "a circle", "a large red circle") == [4 + 2, 6 + 2]
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    assert run(mode, "a circle", num_images_per_prompt=3, generator=generators) == [4 + 2]


def test_a_prompt_that_is_cut_counts_as_far_as_it_was_read() -> None:
    """Stable Diffusion reads it a second time, whole, to tell what it has cut."""
    assert run("step", "a large red circle " * 20) == [16 + 2]
