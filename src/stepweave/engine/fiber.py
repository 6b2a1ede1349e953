"""Fibers: a pipeline's own, synchronous call, suspended wherever it needs the engine.

Like SQLAlchemy's bridge between greenlets and asyncio (sqlalchemy/util/concurrency.py): ordinary
code runs in a greenlet, which switches to its parent with a request and continues with the answer.
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
    """The end of a fiber: `outcome` is its function's result, or the exception that it raised."""

    __slots__ = ("outcome",)

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome


class _Greenlet(greenlet.greenlet):
    fiber: Fiber | None = None  # until it has ended


class Fiber:
    """Runs `function` from one suspension to the next, always on the thread that made the fiber.

    The fiber has its own gradient mode, autocast and default dtype (at first those of `ambient`),
    its own context variables, and the state that `own` installs whenever it runs, such as torch's
    default generator. `owner` is the job that it runs.
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
        self.last: Any = None  # the result of its last call of a model
        self.request: Any = None  # the argument of its last `suspend`
        self.greenlet = _Greenlet(self._run)
        self.greenlet.fiber = self
        self._outside = contextvars.copy_context()
        self.greenlet.gr_context = contextvars.copy_context()

    @property
    def variables(self) -> list[str]:
        """Names of the context variables that its function has set, except the engine's; only
        while it is suspended."""
        inside = self.greenlet.gr_context or contextvars.Context()
        unset = object()
        names = [var.name for var in inside if self._outside.get(var, unset) is not inside[var]]
        return [name for name in names if not name.startswith("stepweave_")]

    @property
    def finished(self) -> bool:
        return self.greenlet.dead

    def resume(self, value: Any = None) -> Any:
        """Continue: `suspend` returns `value`. Returns the next request, or Done."""
        return self._switch(self.greenlet.switch, value)

    def throw(self, error: BaseException) -> Any:
        """Continue: `suspend` raises `error`. Returns the next request, or Done."""
        return self._switch(
            lambda error: self.greenlet.throw(type(error), error, error.__traceback__), error
        )

    def _switch(self, switch: Callable[[Any], Any], value: Any) -> Any:
        if self.greenlet.dead:
            raise EngineMisuseError("A fiber that has ended cannot be resumed.")
        if greenlet.getcurrent() is not self.greenlet.parent:
            raise EngineMisuseError("Only the greenlet that made a fiber can resume it.")
        outside = current(self.device_types)
        apply(self.ambient, outside)
        try:
            with contextlib.ExitStack() as stack:
                for state in self.own:
                    state.enter()
                    stack.callback(state.leave)
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
    """Suspend the running fiber with `request`. Returns the value given to `resume`, or raises the
    error given to `throw`; raises EngineMisuseError outside of a fiber."""
    here = greenlet.getcurrent()
    if not isinstance(here, _Greenlet):
        raise EngineMisuseError("Only code that runs in a fiber can be suspended.")
    parent, fiber = here.parent, here.fiber
    assert parent is not None and fiber is not None
    fiber.request = request
    return parent.switch(request)
