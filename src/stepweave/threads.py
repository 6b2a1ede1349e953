"""Threads for work that may hang: none holds up the end of the process."""

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
    """As the standard library's ThreadPoolExecutor, whose threads Python joins before it ends,
    however long that takes.

    Each thread calls `begin` first.
    """

    def __init__(self, threads: int, name: str, begin: Callable[[], None] = lambda: None) -> None:
        self._work: _Work = queue.SimpleQueue()
        self._most = threads
        self._name = name
        self._begin = begin
        self._closed = False
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []  # begun as there is work
        self._running: dict[
            int, float
        ] = {}  # since when each of them has had what it has, in seconds of the monotonic clock
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
                self._threads.append(
                    threading.Thread(
                        target=_serve,
                        args=[self._work, self._begin, self._running],
                        name=name,
                        daemon=True,
                    )
                )
                self._threads[-1].start()
        return future

    def stalled(self) -> float:
        """Seconds for which all of its threads have been at the same work; 0 while one is free."""
        since = list(self._running.values())
        return time.monotonic() - max(since) if len(since) == self._most else 0.0

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more work; `wait` until what was submitted is done."""
        self._close(cancel_futures)
        if wait:
            self.join(None)

    def end(self, seconds: float, *, cancel_futures: bool = False) -> bool:
        """Take no more work, and wait so long; whether all that was submitted is done."""
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
    with contextlib.suppress(Exception):  # what it could not set, the work fails for, and says so
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
        del future, function  # before the next one comes
    work.put(None)  # for the other threads


_common = DaemonExecutor(32, "stepweave-work")


def on_thread(
    executor: Executor | None, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
) -> Coroutine[Any, Any, T]:
    """What a call gives on a thread of the executor, or of one for all; it is submitted at once.
    Raises what it raises, as `carried`.

    In place of `run_in_executor` and `asyncio.to_thread`, which never return where the call raises
    StopIteration, and whose threads hold up the end of the process.
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
        del outcome  # which an error's traceback would hold, and it that


class Closable(Protocol):
    def close(self) -> None: ...


def close_at_exit(closable: Closable) -> Callable[[], None]:
    """Have something closed when Python ends, if it is still there then; gives what
    `atexit.unregister` takes."""
    reference = weakref.ref(closable)

    def close() -> None:
        closable = reference()
        if closable is not None:
            closable.close()

    atexit.register(close)
    return close
