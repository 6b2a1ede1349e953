"""What text encoders read of prompts: warnings of those that they do not read to their end, and
numbers of tokens."""

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
    """A job: what its call is given, and who is told of what is read of it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def warn(self, key: Hashable, message: str) -> None: ...
    def read(self, key: Hashable, tokens: int) -> None: ...


@contextlib.contextmanager
def warned(pipeline: Any, jobs: Sequence[Reader]) -> Iterator[None]:
    """Have jobs told of their prompts' tokens, and warned of those that are cut, within the block,
    in which one call of the pipeline serves them all."""
    with listening(
        cut=lambda cut: _warn(pipeline, jobs, cut), read=lambda reading: _count(jobs, reading)
    ):
        yield


def _count(jobs: Sequence[Reader], reading: Reading) -> None:
    owner = _owner(jobs, reading)
    for job in jobs if owner is None else (owner,):  # one text for all of them was read for each
        job.read((reading.tokenizer, reading.text), reading.tokens)


def _owner(jobs: Sequence[Reader], text: Cut | Reading) -> Reader | None:
    """Whose text of a tokenizer's call it is: a call of several jobs has one text for each, or as
    many."""
    return jobs[text.index % len(jobs)] if text.count % len(jobs) == 0 else None


def _warn(pipeline: Any, jobs: Sequence[Reader], cut: Cut) -> None:
    """Warn the jobs whose text was cut, each of what it gave itself, never of another's."""
    owner = _owner(jobs, cut)
    found = [
        (len(text), job, name, text, start)
        for job in jobs
        for name, text, start in _arguments(pipeline, job, cut)
    ]
    own = [one for one in found if one[3] == cut.text] or [
        one for one in found if owner in (None, one[1])
    ]
    longest = max((length for length, *_ in own), default=0)
    told: set[Reader] = set()
    for length, job, name, text, start in own:
        if length == longest and job not in told:  # one text may be several arguments
            told.add(job)
            position = (
                None if cut.position is None else min(max(cut.position - start, 0), len(text))
            )
            _add(job, name, cut, position, text)
    if not own and owner is not None:
        _add(owner, "a prompt, as the pipeline prepared it", cut, cut.position, cut.text)


def _add(job: Reader, name: str, cut: Cut, position: int | None, text: str) -> None:
    if position is None:
        part, left_out = "its end" if cut.side == "right" else "its beginning", cut.left_out
    elif cut.side == "right":
        part, left_out = f"what follows character {position}", text[position:]
    else:
        part, left_out = f"what precedes character {position + 1}", text[:position]
    job.warn(
        (name, part, left_out),  # by whichever tokenizer
        f"{name}: the text encoder ({cut.tokenizer}) reads {cut.tokens} tokens; {part} was left "
        f"out: {shown(left_out.strip())}",
    )


def _arguments(pipeline: Any, job: Reader, cut: Cut) -> Iterator[tuple[str, str, int]]:
    """Texts among a job's arguments that the cut text holds and that lost something: name, text,
    where it begins in it."""
    names = list(arguments_of(pipeline))
    for name, value in [*zip(names, job.args, strict=False), *job.kwargs.items()]:
        several = isinstance(value, (list, tuple))
        for i, text in enumerate(value if several else [value]):
            if (
                not isinstance(text, str)
                or not text.strip()
                or ("prompt" not in name and text != cut.text)
            ):
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
    """Where a text begins in another, which may have it stripped and in small letters; None if it
    is not there."""
    bare = text.strip()
    for form in (text, bare, bare.lower()):
        at = whole.find(form)
        if at >= 0 and len(form) in (len(text), len(bare)):
            return at if form is text else at - (len(text) - len(text.lstrip()))
    return None
