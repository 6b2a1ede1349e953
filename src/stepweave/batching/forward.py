"""One forward of some arguments, or of many calls' arguments put together."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from stepweave.batching.call import Call, Unmergeable
from stepweave.batching.merge import copied, merge, split
from stepweave.batching.parts import chunk, join
from stepweave.compat import torch_state as ambient
from stepweave.compat.snapshot import ArgumentSnapshot


def run_arguments(call: Call, arguments: dict[str, Any], kinds: tuple[str, ...]) -> Any:
    """What a call would give of other `arguments`."""
    here = ambient.current(kinds)
    ambient.apply(call.ambient, here)
    try:
        with _with_processors(call):
            return call.target.function(**arguments)
    finally:
        ambient.apply(here, call.ambient)


def run_merged(
    calls: Sequence[Call], kinds: tuple[str, ...], *, repeat: bool, trial: bool = False
) -> list[Any]:
    """The results of calls of one kind, from one forward. `kinds` are the device types whose
    autocast is theirs, too."""
    chunks, listed = calls[0].group.chunks, calls[0].group.listed
    # with chunks: all first ones, then all second ones
    apart = (
        calls
        if chunks == 1
        else [chunk(call, number) for number in range(chunks) for call in calls]
    )
    arguments = merge(apart, repeat=repeat)
    given = None if trial else ArgumentSnapshot(*arguments.values())
    output = run_arguments(calls[0], copied(arguments) if trial else arguments, kinds)
    if given is not None and given.wrote():
        raise Unmergeable("it writes to its arguments")
    outputs = split(output, [one.rows for one in apart], listed=listed)
    if chunks == 1:
        return outputs
    every = len(calls)
    return [
        join(outputs[i::every], [one.rows for one in apart[i::every]], listed=listed)
        for i in range(every)
    ]


def _with_processors(call: Call) -> contextlib.AbstractContextManager[None]:
    """Within it the call's attention processors are in place."""
    processors = call.target.processors
    return (
        contextlib.nullcontext() if processors is None else processors.installing(call.processors)
    )
