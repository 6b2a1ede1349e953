"""Fibers: a pipeline's own, synchronous call, suspended wherever it needs the engine.

The shape is that of SQLAlchemy's bridge between greenlets and asyncio
(sqlalchemy/util/concurrency.py): ordinary code runs in a greenlet; deep inside, something switches
to the parent with a request and is switched back to with the answer.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Sequence
from typing import Any

import greenlet
import torch

from stepweave.compat.torch_state import Ambient, Own, apply, current
from stepweave.errors import EngineMisuseError
from stepweave.outcome import Outcome


class Done:
    """What a fiber gives in the end: `outcome` is what its function returned, or the exception that
    it raised."""

    __slots__ = ("outcome",)

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome


class _Greenlet(greenlet.greenlet):
    fiber: Fiber | None = None  # until it has ended


class Fiber:
    """Runs `function` until it suspends, again and again. All by the thread that made it.

    Gradient mode, autocast and default dtype (at first those of `ambient`) and context variables
    are the fiber's own; and so is what `own` puts in place whenever the fiber runs, such as torch's
    default generator. `owner` is whom it runs for.
    """

    def __init__(
        self,
        function: Callable[[], Any],
        ambient: Ambient,
        own: Sequence[Own] = (),
        owner: Any = None,
    ) -> None:
        self.owner = owner
        self._function: Callable[[], Any] | None = function  # until it begins
        self._ambient = ambient
        self.device_types = tuple(kind for kind, _, _ in ambient.autocast)
        self.own = own
        self.last: Any = None  # what the last call of a model gave it
        self._greenlet = _Greenlet(self._run)
        self._greenlet.fiber = self
        self._outside = contextvars.copy_context()
        self._greenlet.gr_context = contextvars.copy_context()

    @property
    def variables(self) -> list[str]:
        """The context variables that its function has set, by name, while it is suspended; the
        engine's own aside."""
        inside = self._greenlet.gr_context or contextvars.Context()
        unset = object()
        names = [var.name for var in inside if self._outside.get(var, unset) is not inside[var]]
        return [name for name in names if not name.startswith("stepweave_")]

    @property
    def finished(self) -> bool:
        return self._greenlet.dead

    def resume(self, value: Any = None) -> Any:
        """Go on with `value` as what `suspend` returns. Gives the next request, or Done."""
        return self._switch(self._greenlet.switch, value)

    def throw(self, error: BaseException) -> Any:
        """Go on with `suspend` raising `error`. Gives the next request, or Done."""
        return self._switch(
            lambda error: self._greenlet.throw(type(error), error, error.__traceback__), error
        )

    def _switch(self, switch: Callable[[Any], Any], value: Any) -> Any:
        if self._greenlet.dead:
            raise EngineMisuseError("A fiber that has ended cannot go on.")
        if greenlet.getcurrent() is not self._greenlet.parent:
            raise EngineMisuseError("A fiber goes on only from where it was made.")
        outside = current(self.device_types)
        apply(self._ambient, outside)
        try:
            with contextlib.ExitStack() as left:
                for one in self.own:
                    one.enter()
                    left.callback(one.leave)
                return switch(value)
        finally:
            self._ambient = current(self.device_types)
            apply(outside, self._ambient)
            if self._greenlet.dead:
                self._greenlet.fiber = None

    def beside(self, function: Callable[[], Any]) -> Outcome:
        """What comes of a call on another thread, while the fiber is suspended; as if the fiber had
        made it.

        It sees the fiber's context variables, gradient mode and autocast, and what it sets of these
        the fiber has. Not the default dtype: that is the whole process's.
        """
        apart = greenlet.greenlet(Outcome.of)
        apart.gr_context = self._greenlet.gr_context
        outside = current(self.device_types)
        apply(self._ambient._replace(dtype=outside.dtype), outside)
        try:
            outcome: Outcome = apart.switch(function)
        finally:
            after = current(self.device_types)
            self._ambient = after._replace(dtype=self._ambient.dtype)
            apply(outside._replace(dtype=after.dtype), after)
        outcome.let_go()
        return outcome

    @property
    def dtype(self) -> torch.dtype:
        """The default dtype that it runs under."""
        return self._ambient.dtype

    def _run(self, _: Any) -> Done:
        function, self._function = self._function, None
        assert function is not None
        try:
            return Done(function())
        except BaseException as error:  # also SystemExit, which must not end the engine's thread
            return Done(error)


def current_fiber() -> Fiber | None:
    """The fiber that the caller runs in, or None."""
    here = greenlet.getcurrent()
    return here.fiber if isinstance(here, _Greenlet) else None


def suspend(request: Any) -> Any:
    """Hand `request` to whoever resumed this fiber; returns what it is resumed with, raises what is
    thrown into it.

    Raises EngineMisuseError outside of a fiber.
    """
    here = greenlet.getcurrent()
    if not isinstance(here, _Greenlet):
        raise EngineMisuseError("Only code that runs in a fiber can be suspended.")
    parent = here.parent
    assert parent is not None
    return parent.switch(request)
