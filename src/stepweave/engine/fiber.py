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

from stepweave.compat.torch_state import Ambient, Own, apply, current
from stepweave.errors import EngineMisuseError


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
        self.ambient = ambient
        self.device_types = tuple(kind for kind, _, _ in ambient.autocast)
        self.own = own
        self.last: Any = None  # what the last call of a model gave it
        self.request: Any = None  # what it was last suspended with
        self.greenlet = _Greenlet(self._run)
        self.greenlet.fiber = self
        self._outside = contextvars.copy_context()
        self.greenlet.gr_context = contextvars.copy_context()

    @property
    def variables(self) -> list[str]:
        """The context variables that its function has set, by name, while it is suspended; the
        engine's own aside."""
        inside = self.greenlet.gr_context or contextvars.Context()
        unset = object()
        names = [var.name for var in inside if self._outside.get(var, unset) is not inside[var]]
        return [name for name in names if not name.startswith("stepweave_")]

    @property
    def finished(self) -> bool:
        return self.greenlet.dead

    def resume(self, value: Any = None) -> Any:
        """Go on with `value` as what `suspend` returns. Gives the next request, or Done."""
        return self._switch(self.greenlet.switch, value)

    def throw(self, error: BaseException) -> Any:
        """Go on with `suspend` raising `error`. Gives the next request, or Done."""
        return self._switch(
            lambda error: self.greenlet.throw(type(error), error, error.__traceback__), error
        )

    def _switch(self, switch: Callable[[Any], Any], value: Any) -> Any:
        if self.greenlet.dead:
            raise EngineMisuseError("A fiber that has ended cannot go on.")
        if greenlet.getcurrent() is not self.greenlet.parent:
            raise EngineMisuseError("A fiber goes on only from where it was made.")
        outside = current(self.device_types)
        apply(self.ambient, outside)
        try:
            with contextlib.ExitStack() as left:
                for one in self.own:
                    one.enter()
                    left.callback(one.leave)
                return switch(value)
        finally:
            self.ambient = current(self.device_types)
            apply(outside, self.ambient)
            if self.greenlet.dead:
                self.greenlet.fiber = None

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
    parent, fiber = here.parent, here.fiber
    assert parent is not None and fiber is not None
    fiber.request = request
    return parent.switch(request)
