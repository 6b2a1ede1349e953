"""Whether a forward draws from the default random generators.

Python's and numpy's are the whole process's: BentoML's tracing draws from Python's for each HTTP
request. So draws are attributed to the thread that makes them.
"""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

_READS = ("getstate", "get_state")  # these draw nothing


class _Draws:
    """Counts, while somebody looks, the calls of a module's functions that draw from its default
    generator, by thread."""

    def __init__(self, module: Any, generator: Any) -> None:
        self._module = module
        self._functions: dict[str, Callable[..., Any]] = {
            name: function
            for name, function in vars(module).items()
            if getattr(function, "__self__", None) is generator and name not in _READS
        }
        self._lock = threading.Lock()
        self._looking = 0
        self._counts: dict[int, int] = {}  # each written by its own thread

    def start(self) -> tuple[int, int]:
        """Begin to look; returns the draws of this thread and of others so far."""
        with self._lock:
            self._looking += 1
            if self._looking == 1:
                for name, function in self._functions.items():
                    setattr(self._module, name, self._counting(function))
        return self._so_far()

    def stop(self) -> None:
        with self._lock:
            self._looking -= 1
            if self._looking == 0:
                for name, function in self._functions.items():
                    setattr(self._module, name, function)

    def only_others(self, before: tuple[int, int]) -> bool:
        """Whether other threads have drawn since `before`, and this one has not. A function that
        was imported by itself is not seen, hence the first half."""
        own, others = self._so_far()
        return own == before[0] and others > before[1]

    def _so_far(self) -> tuple[int, int]:
        counts = dict(self._counts)
        own = counts.pop(threading.get_ident(), 0)
        return own, sum(counts.values())

    def _counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        counts = self._counts

        @functools.wraps(function)
        def counting(*args: Any, **kwargs: Any) -> Any:
            thread = threading.get_ident()
            counts[thread] = counts.get(thread, 0) + 1
            return function(*args, **kwargs)

        return counting


_PYTHON = _Draws(random, random._inst)
_NUMPY = _Draws(np.random, np.random.mtrand._rand)


class RandomStates:
    """The default random generators, torch's, Python's and numpy's, at the begin of a block."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._generators = [torch.default_generator]
        if device is not None and device.type == "cuda":
            self._generators.append(torch.cuda.default_generators[device.index or 0])

    def __enter__(self) -> RandomStates:
        self._before = _PYTHON.start(), _NUMPY.start()
        self._states = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        _PYTHON.stop()
        _NUMPY.stop()

    def _now(self) -> tuple[Any, ...]:
        name, keys, *rest = np.random.get_state()
        numbers = np.asarray(keys).tobytes()
        return (
            random.getstate(),
            (name, numbers, *rest),
            *(generator.get_state() for generator in self._generators),
        )

    def changed(self) -> bool:
        """Whether numbers were drawn since then, within the block, and not only by other
        threads."""
        python, numbers, *torches = self._states
        python_now, numbers_now, *torches_now = self._now()
        return (
            (python != python_now and not _PYTHON.only_others(self._before[0]))
            or (numbers != numbers_now and not _NUMPY.only_others(self._before[1]))
            or any(map(_differ, torches, torches_now))
        )

    def put_back(self) -> None:
        (python, (name, keys, *rest), *torches) = self._states
        for generator, state in zip(self._generators, torches, strict=True):
            generator.set_state(state)
        random.setstate(python)
        np.random.set_state((name, np.frombuffer(keys, np.uint32), *rest))


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return not torch.equal(one, other)
