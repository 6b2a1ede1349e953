"""Warnings about truncated prompts, and numbers of tokens, for each job."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Protocol

from stepweave.errors import shown
from stepweave.planning.workload import arguments_of
from stepweave.truncation.cuts import Cut
from stepweave.truncation.tokenizers import listening
from stepweave.truncation.tokens import Reading


class Reader(Protocol):
    """A job, as far as its prompts are concerned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def warn(self, key: Hashable, message: str) -> None: ...
    def read(self, key: Hashable, tokens: int) -> None: ...


@contextlib.contextmanager
def warned(pipeline: Any, jobs: Sequence[Reader]) -> Iterator[None]:
    """Within the block, report tokens and truncated prompts of one call of the pipeline to its
    jobs."""
    with listening(
        cut=lambda cut: _warn(pipeline, jobs, cut), read=lambda reading: _count(jobs, reading)
    ):
        yield


def _count(jobs: Sequence[Reader], reading: Reading) -> None:
    owner = _owner(jobs, reading)
    for job in jobs if owner is None else (owner,):  # a text common to all was read for each
        job.read((reading.tokenizer, reading.text), reading.tokens)


def _owner(jobs: Sequence[Reader], text: Cut | Reading) -> Reader | None:
    """The job of a text, if the tokenizer's call has equally many texts for each job."""
    return jobs[text.index % len(jobs)] if text.count % len(jobs) == 0 else None


def _warn(pipeline: Any, jobs: Sequence[Reader], cut: Cut) -> None:
    """Warn the jobs whose text was cut, each with its own text, never another's."""
    owner = _owner(jobs, cut)
    arguments = [(job, *item) for job in jobs for item in _arguments(pipeline, job, cut)]
    exact = [item for item in arguments if item[2] == cut.text]
    affected = exact or [item for item in arguments if owner in (None, item[0])]
    longest = max((len(text) for _, _, text, _ in affected), default=0)
    warned_jobs: set[Reader] = set()
    for job, name, text, start in affected:
        if len(text) == longest and job not in warned_jobs:  # several arguments may be equal
            warned_jobs.add(job)
            position = cut.position
            if position is not None:
                position = min(max(position - start, 0), len(text))
            _add(job, name, cut, position, text)
    if not affected and owner is not None:
        _add(owner, "a prompt, as the pipeline prepared it", cut, cut.position, cut.text)


def _add(job: Reader, name: str, cut: Cut, position: int | None, text: str) -> None:
    if position is None:
        part, left_out = "its end" if cut.side == "right" else "its beginning", cut.left_out
    elif cut.side == "right":
        part, left_out = f"the text after character {position}", text[position:]
    else:
        part, left_out = f"the text before character {position + 1}", text[:position]
    job.warn(
        (name, part, left_out),  # once, even if several tokenizers cut it
        f"{name}: the text encoder ({cut.tokenizer}) reads {cut.tokens} tokens; {part} was left "
        f"out: {shown(left_out.strip())}",
    )


def _arguments(pipeline: Any, job: Reader, cut: Cut) -> Iterator[tuple[str, str, int]]:
    """Yield a job's arguments that the cut text contains and that were truncated: name, text, and
    its start in the cut text."""
    names = list(arguments_of(pipeline))
    for name, value in [*zip(names, job.args, strict=False), *job.kwargs.items()]:
        several = isinstance(value, (list, tuple))
        for i, text in enumerate(value if several else [value]):
            if not isinstance(text, str) or not text.strip():
                continue
            if "prompt" not in name and text != cut.text:
                continue
            start = _find(text, cut.text)
            if start is None:
                continue
            if cut.position is None:
                lost = text == cut.text
            elif cut.side == "right":
                lost = cut.position < start + len(text.rstrip())
            else:
                lost = cut.position > start + len(text) - len(text.lstrip())
            if lost:
                yield (f"{name}[{i}]" if several else name), text, start


def _find(text: str, whole: str) -> int | None:
    """The position of a text in another, which may contain it stripped or in lower case; else
    None."""
    bare = text.strip()
    for form in (text, bare, bare.lower()):
        at = whole.find(form)
        if at >= 0 and len(form) in (len(text), len(bare)):
            return at if form is text else at - (len(text) - len(text.lstrip()))
    return None
