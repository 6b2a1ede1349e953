"""Threads for work that may hang: none keeps the process from ending."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any, ParamSpec, Protocol, TypeVar

from stepweave.outcome import Outcome, carried

P = ParamSpec("P")
T = TypeVar("T")
_Work = queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]


class DaemonExecutor(Executor):
    """A ThreadPoolExecutor that Python does not join when it ends; threads first call `begin`."""

    def __init__(self, threads: int, name: str, begin: Callable[[], None] = lambda: None) -> None:
        self._work: _Work = queue.SimpleQueue()
        self._most = threads
        self._name = name
        self._begin = begin
        self._closed = False
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []  # started when there is work
        # by thread id: start of its present work, seconds of the monotonic clock
        self._running: dict[int, float] = {}
        weakref.finalize(self, self._work.put, None)

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Raises RuntimeError once it is shut down."""
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("The executor is shut down.")
            self._work.put((future, partial(function, *args, **kwargs)))
            if len(self._threads) < self._most:
                name = f"{self._name}_{len(self._threads)}"
                state = [self._work, self._begin, self._running]
                thread = threading.Thread(target=_serve, args=state, name=name, daemon=True)
                self._threads.append(thread)
                thread.start()
        return future

    def stalled(self) -> float:
        """Seconds for which no thread has finished its work; 0 while one is free."""
        since = list(self._running.values())
        return time.monotonic() - max(since) if len(since) == self._most else 0.0

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Refuse new work; `wait` until submitted work is done."""
        self._close(cancel_futures)
        if wait:
            self.join(None)

    def end(self, seconds: float, *, cancel_futures: bool = False) -> bool:
        """Refuse new work and wait at most `seconds`; returns whether submitted work is done."""
        self._close(cancel_futures)
        return self.join(seconds)

    def join(self, seconds: float | None) -> bool:
        until = None if seconds is None else time.monotonic() + seconds
        for thread in self._threads:
            thread.join(None if until is None else max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _close(self, cancel_futures: bool) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if cancel_futures:
                with contextlib.suppress(queue.Empty):
                    while (item := self._work.get_nowait()) is not None:
                        item[0].cancel()
            self._work.put(None)


def _serve(work: _Work, begin: Callable[[], None], running: dict[int, float]) -> None:
    with contextlib.suppress(Exception):  # the work itself then fails
        begin()
    while (item := work.get()) is not None:
        future, function = item
        del item
        if future.set_running_or_notify_cancel():
            running[threading.get_ident()] = time.monotonic()
            outcome = Outcome.apart(function)
            if outcome.error is None:
                future.set_result(outcome.value)
            else:
                future.set_exception(outcome.error)
            del outcome
            running.pop(threading.get_ident(), None)
        del future, function  # before waiting for the next one
    work.put(None)  # for the other threads


_common = DaemonExecutor(32, "stepweave-work")


def on_thread(
    executor: Executor | None, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
) -> Coroutine[Any, Any, T]:
    """Call the function on a thread of the executor, or of a common one; returns its value. Raises
    its error as `carried`. It is submitted immediately, even if the result is never awaited.

    `run_in_executor` and `asyncio.to_thread` never return if the call raises StopIteration, and
    their threads keep the process from ending.
    """
    work = partial(Outcome.apart, function, *args, **kwargs)
    return _got(asyncio.get_running_loop().run_in_executor(executor or _common, work), function)


async def _got(future: asyncio.Future[Outcome], function: Callable[..., T]) -> T:
    outcome = await future
    del future
    try:
        if outcome.error is not None:
            raise carried(outcome.error, f"{getattr(function, '__name__', 'a call')}()")
        value: T = outcome.value
        return value
    finally:
        del outcome  # a cycle: an error's traceback would keep it alive, and it the error


class Closable(Protocol):
    def close(self) -> None: ...


def close_at_exit(closable: Closable) -> Callable[[], None]:
    """Close an object when Python ends, if it still exists; returns the `atexit` callback."""
    reference = weakref.ref(closable)

    def close() -> None:
        closable = reference()
        if closable is not None:
            closable.close()

    atexit.register(close)
    return close
