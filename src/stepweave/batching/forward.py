"""One forward: of a call as it is, of some arguments, or of many calls' arguments put together."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

from stepweave.batching.call import Attempt, Call, Unmergeable
from stepweave.batching.merge import chunk, join, merge, split
from stepweave.compat import torch_state as ambient
from stepweave.compat.nested import cloned, copied
from stepweave.compat.out_of_memory import ran_out
from stepweave.compat.own_state import OwnState
from stepweave.compat.snapshot import ArgumentSnapshot


def run_attempt(attempt: Attempt, own: OwnState | None) -> Any:
    """Run a call in its own fiber, on modules as the job's `own` code has changed them. Notes in
    the attempt how it went; raises what the call raises, unless memory ran out."""
    call = attempt.call
    run = partial(attempt.run, call)
    snapshot = ArgumentSnapshot(*call.args, *call.kwargs.values())
    try:
        output = run() if own is None else own.during(run)
    except BaseException as error:
        attempt.failed = True
        if not ran_out(error):
            raise
        attempt.ran_out = True  # and the error is let go of, which holds on to the memory
    else:
        if attempt.keep:
            attempt.wrote = snapshot.wrote()
            # what cannot be copied is neither compared nor kept
            with contextlib.suppress(Exception):
                attempt.output = cloned(output)
        return output
    snapshot.put_back()
    attempt.overwritten = snapshot.overwritten()
    return None


def run_arguments(call: Call, arguments: dict[str, Any], device_types: tuple[str, ...]) -> Any:
    """What a call would give of other `arguments`."""
    here, swap = ambient.current(device_types), call.target.processors
    within = contextlib.nullcontext() if swap is None else swap.installing(call.processors)
    ambient.apply(call.ambient, here)
    try:
        with within:
            return call.target.function(**arguments)
    finally:
        ambient.apply(here, call.ambient)


def run_merged(
    calls: Sequence[Call], device_types: tuple[str, ...], *, repeat: bool, trial: bool = False
) -> list[Any]:
    """The results of calls of one kind, from one forward. `device_types` are the device types whose
    autocast is theirs, too."""
    chunks, listed = calls[0].group.chunks, calls[0].group.listed
    apart = calls
    if chunks != 1:  # all first ones, then all second ones
        apart = [chunk(call, number) for number in range(chunks) for call in calls]
    arguments = merge(apart, repeat=repeat)
    given = None if trial else ArgumentSnapshot(*arguments.values())
    output = run_arguments(calls[0], copied(arguments) if trial else arguments, device_types)
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
