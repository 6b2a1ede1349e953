"""What came of a call, as it is carried between threads and tasks.

Futures, generators and event loops take some exceptions for signals of their own: asyncio's futures
refuse a StopIteration, a CancelledError looks like a cancelled task, a SystemExit ends the event
loop. So nothing but an `Outcome`, which means nothing to them, travels, and what an error becomes
for who waits is said in one place.
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

# exceptions that mean something to what carries them, besides all that are no Exception
_SIGNALS = (
    StopIteration,
    StopAsyncIteration,
    concurrent.futures.CancelledError,
    concurrent.futures.InvalidStateError,
)


class Ending(BaseException):
    """Raised in a call that must end: no `except Exception` of a pipeline or a callback stops
    it."""


@dataclass(frozen=True, eq=False, slots=True)
class Outcome:
    """A value, whatever it is, or an error."""

    value: Any = None
    error: BaseException | None = None

    @classmethod
    def of(cls, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Outcome:
        """What comes of a call."""
        try:
            return cls(function(*args, **kwargs))
        except BaseException as error:
            return cls(error=error)

    @classmethod
    def apart(cls, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Outcome:
        """The same, of a call whose error shall outlive it: it holds on to nothing that the caller
        or the call works with.

        Context variables that the call sets are its own.
        """
        # whose frames know of none outside; no closure, which a frame would hold on to
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
        """Have the error's traceback hold on to no variables: tensors, and what holds the error
        itself. Once the call is over."""
        if self.error is not None:
            _clear(self.error)

    def get(self) -> Any:
        """The value. Raises the error."""
        if self.error is None:
            return self.value
        try:
            raise self.error
        finally:
            del self  # which the traceback would hold, and it the error


def carried(error: BaseException, source: str, *signals: type[Exception]) -> Exception:
    """The error, or one of ours in place of one that would mean something to what carries it, or is
    of `signals`, which do to who waits: it names the `source` and has the error for its cause."""
    if isinstance(error, Exception) and not isinstance(error, (*_SIGNALS, *signals)):
        return error
    failure = StepweaveError(f"{source} raised {type(error).__name__}.", code="generation_failed")
    failure.__cause__ = error
    return failure


def _clear(error: BaseException) -> None:
    """Clear the frames of an error's traceback, those that called them, and those of the errors
    that it came of."""
    errors: list[BaseException | None] = [error]
    seen: set[int] = set()
    while errors:
        one = errors.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        errors += [one.__cause__, one.__context__]
        if isinstance(one, BaseExceptionGroup):
            errors += one.exceptions
        entry = one.__traceback__
        while entry is not None:
            frame: FrameType | None = entry.tb_frame
            while frame is not None and id(frame) not in seen:
                seen.add(id(frame))
                with contextlib.suppress(RuntimeError):  # it runs, or waits in a greenlet
                    frame.clear()
                    # has it forget what `locals()` gave, which diffusers calls
                    dict(frame.f_locals)
                frame = frame.f_back
            entry = entry.tb_next
