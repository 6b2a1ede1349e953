"""Threads for work that may hang: none holds up the end of the process."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any, ParamSpec, TypeVar

from stepweave.outcome import Outcome, carried

P = ParamSpec("P")
T = TypeVar("T")


class DaemonExecutor(Executor):
    """As the standard library's ThreadPoolExecutor, whose threads Python joins before it ends, however long that takes."""

    def __init__(self, threads: int, name: str) -> None:
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._serve, name=f"{name}_{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Raises RuntimeError once it is shut down."""
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("The executor is shut down.")
            self._work.put((future, partial(function, *args, **kwargs)))
        return future

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
                while not self._work.empty():
                    item = self._work.get()
                    if item is not None:
                        item[0].cancel()
            for _ in self._threads:
                self._work.put(None)

    def _serve(self) -> None:
        while (item := self._work.get()) is not None:
            future, function = item
            del item
            if future.set_running_or_notify_cancel():
                outcome = Outcome.apart(function)
                if outcome.error is None:
                    future.set_result(outcome.value)
                else:
                    future.set_exception(outcome.error)
                del outcome
            del future, function


async def on_thread(executor: Executor | None, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """What a call gives on a thread of the executor, or of the event loop's own. Raises what it raises, as `carried`.

    To be used in place of `run_in_executor` and `asyncio.to_thread`, which never return where the call raises StopIteration.
    """
    loop = asyncio.get_running_loop()
    outcome = await loop.run_in_executor(executor, partial(Outcome.apart, function, *args, **kwargs))
    try:
        if outcome.error is not None:
            raise carried(outcome.error, f"{getattr(function, '__name__', 'a call')}()")
        value: T = outcome.value
        return value
    finally:
        del outcome
