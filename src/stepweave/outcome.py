"""The result or error of a call, passed between threads and tasks as a value.

Futures, generators and event loops treat some exceptions as signals: asyncio's futures refuse a
StopIteration, a CancelledError looks like a cancelled task, a SystemExit ends the event loop. An
`Outcome` means nothing to them, and `carried` decides what a waiting caller raises.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

import greenlet

from stepweave.errors import RequestCancelledError, StepweaveError

End = Literal["succeeded", "failed", "cancelled"]  # of a job

# signals of futures and generators, in addition to all that are not an Exception
_SIGNALS = (
    StopIteration,
    StopAsyncIteration,
    concurrent.futures.CancelledError,
    concurrent.futures.InvalidStateError,
)


class Ending(BaseException):
    """Raised in a call that must end; `except Exception` in pipelines and callbacks misses it."""


@dataclass(frozen=True, eq=False, slots=True)
class Outcome:
    """A value or an error."""

    value: Any = None
    error: BaseException | None = None

    @classmethod
    def of(cls, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Outcome:
        """Call the function; returns its value or error."""
        try:
            return cls(function(*args, **kwargs))
        except BaseException as error:
            return cls(error=error)

    @classmethod
    def apart(cls, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Outcome:
        """As `of`, but the error keeps no variables of the caller or the call alive, and context
        variables that the call sets do not reach the caller."""
        # a greenlet's frames do not refer to the caller's; nor a closure, which a frame would keep
        apart = greenlet.greenlet(cls.of)
        apart.gr_context = contextvars.copy_context()
        outcome: Outcome = apart.switch(function, *args, **kwargs)
        outcome.let_go()
        return outcome

    @property
    def end(self) -> End:
        """What it counts as."""
        if self.error is None:
            return "succeeded"
        return "cancelled" if isinstance(self.error, RequestCancelledError) else "failed"

    def let_go(self) -> None:
        """Release the variables that the error's traceback keeps alive, such as tensors and the
        error itself. Only once the call has ended."""
        if self.error is not None:
            _clear(self.error)

    def get(self) -> Any:
        """Return the value, or raise the error."""
        if self.error is None:
            return self.value
        try:
            raise self.error
        finally:
            del self  # a cycle: the traceback would keep it alive, and it the error


def carried(error: BaseException, source: str, *signals: type[Exception]) -> Exception:
    """The error for a waiting caller: itself, or a StepweaveError that names the `source` and is
    caused by it, if it is a signal to futures, or one of `signals` to the caller."""
    if isinstance(error, Exception) and not isinstance(error, (*_SIGNALS, *signals)):
        return error
    failure = StepweaveError(f"{source} raised {type(error).__name__}.", code="generation_failed")
    failure.__cause__ = error
    return failure


def _clear(error: BaseException) -> None:
    """Clear the frames of an error's traceback, their callers', and those of its causes."""
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        pending += [current.__cause__, current.__context__]
        if isinstance(current, BaseExceptionGroup):
            pending += current.exceptions
        entry = current.__traceback__
        while entry is not None:
            frame: FrameType | None = entry.tb_frame
            while frame is not None and id(frame) not in seen:
                seen.add(id(frame))
                with contextlib.suppress(RuntimeError):  # it runs, or waits in a greenlet
                    frame.clear()
                    # drops the copy that `locals()` made, which diffusers calls
                    dict(frame.f_locals)
                frame = frame.f_back
            entry = entry.tb_next
