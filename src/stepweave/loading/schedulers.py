"""The schedulers that can replace a pipeline's own, and the numbers of steps that run with each.

Both are found by rehearsals without the model: for some numbers of steps at start, for others when
they are first requested.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
import math
import threading
import warnings
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from diffusers.utils.import_utils import DummyObject

from stepweave.compat.async_scheduler import clone_scheduler
from stepweave.loading.rehearsal import CHANGES, Course, problem_of, takes_shift

logger = logging.getLogger(__name__)

STEPS = 4  # default of rehearsals
# numbers of steps that are tried at start, besides the default and the maximum
FIRST = (1, 2, 3, 11, 20)
LONGEST = 1000  # most steps of a rehearsal at start
REMEMBERED = 4096  # rehearsals
DRAWS = "its noise does not depend on the seed"


def rehearse(
    scheduler: Any, pipeline: Any, steps: int = STEPS, strength: float | None = None
) -> bool:
    """Whether calls of the pipeline run with a scheduler, and depend only on their generator.

    All steps run from noise; for an edit, those that its strength leaves, or all but the first. No
    other thread may draw from torch's global generator meanwhile: that is how draws are detected.
    """
    return _rehearsed(scheduler, pipeline, Course(steps, strength)) is None


def _rehearsed(scheduler: Any, pipeline: Any, course: Course) -> str | None:
    with _quiet(), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        before = torch.get_rng_state()
        problem = problem_of(scheduler, pipeline, course)
        return problem if torch.equal(torch.get_rng_state(), before) else DRAWS


class Rehearsals:
    """Finds the numbers of steps that run with each scheduler of a pipeline: some (`counts`) at
    once, others when first requested. Thread-safe.

    `like` has the defaults of calls. `schedulers`, by class name, are those that run with some
    number of steps, and the pipeline's own.
    """

    def __init__(
        self,
        pipeline: Any,
        candidates: Iterable[Any],
        own: str | None,
        counts: Sequence[int],
        like: Course,
    ) -> None:
        self.schedulers: dict[str, Any] = {}
        self._pipeline = pipeline
        self._own = own
        self._shifts = takes_shift(pipeline)
        self._tried: dict[str, dict[int, bool]] = {}  # at start, the fewest steps first
        self._refused: set[tuple[str | None, int]] = set()  # names and numbers of steps
        self._found: dict[Hashable, bool] = {}  # all rehearsals, the oldest first
        self._lock = threading.Lock()
        for candidate in candidates:
            name = type(candidate).__name__
            if name in self.schedulers:
                continue
            tried = _try(candidate, pipeline, counts, like)
            if name == own or any(tried.values()):
                self.schedulers[name], self._tried[name] = candidate, tried
                self._found |= {
                    self._key(name, replace(like, steps=steps)): runs
                    for steps, runs in tried.items()
                }
        self.schedulers = dict(sorted(self.schedulers.items()))

    @classmethod
    def of(cls, pipeline: Any, like: Course, most: int) -> Rehearsals:
        """Rehearse the pipeline's own scheduler and all that may replace it, with up to `most`
        steps. The others are made from its own one's configuration: those that diffusers calls
        compatible, and for flow matching, those with flow sigmas."""
        own = getattr(pipeline, "scheduler", None)
        if not isinstance(own, SchedulerMixin):
            return cls(pipeline, (), None, (), like)
        counts = {steps for steps in (*FIRST, like.steps, min(most, LONGEST)) if steps <= most}
        return cls(pipeline, _made_of(own), type(own).__name__, sorted(counts), like)

    def of_edits(self, pipeline: Any, like: Course) -> Rehearsals:
        """Rehearse the same schedulers with a pipeline for edits."""
        counts = {
            steps
            for steps in (*FIRST, like.steps)
            if like.strength is None or int(steps * like.strength)
        }
        return Rehearsals(pipeline, self.schedulers.values(), self._own, sorted(counts), like)

    def runs(self, name: str | None, course: Course) -> bool:
        """Whether calls run with a scheduler of `schedulers`, None for the pipeline's own, which is
        rehearsed if necessary. If no rehearsal of the pipeline's own has succeeded, none of it is
        trusted, and it is assumed to run.
        """
        name = name or self._own
        if (name, course.steps) in self._refused:
            return False
        if name is None or (name == self._own and not any(self._tried[name].values())):
            return True
        key = self._key(name, course)
        if (found := self._found.get(key)) is not None:
            return found
        with self._lock:  # one rehearsal at a time
            if key not in self._found:
                with _quiet():
                    problem = problem_of(self.schedulers[name], self._pipeline, course)
                if problem is not None:
                    kind = type(self._pipeline).__name__
                    logger.info("%s with %s: %s does not run: %s", kind, name, course, problem)
                if len(self._found) >= REMEMBERED:
                    del self._found[next(iter(self._found))]
                self._found[key] = problem is None
            return self._found[key]

    def refuse(self, name: str | None, steps: int) -> None:
        """Note that calls with these steps have failed, whatever a rehearsal says."""
        name = name or self._own
        if name is not None:
            self._refused.add((name, steps))
            self._tried[name] = {**self._tried.get(name, {}), steps: False}

    def knows(self, name: str | None, course: Course) -> bool:
        """Whether `runs` needs no rehearsal, which takes about 0.1 ms per step."""
        name = name or self._own
        known = name is None or name not in self.schedulers or not any(self._tried[name].values())
        return known or self._key(str(name), course) in self._found

    def tried(self, name: str | None) -> tuple[list[int], list[int]]:
        """The numbers of steps that were tried at start: those that run, and the others."""
        tried = self._tried.get(name or self._own or "", {})
        running = [steps for steps, runs in tried.items() if runs]
        return running, [steps for steps, runs in tried.items() if not runs]

    def _key(self, name: str, course: Course) -> Hashable:
        """A key of calls with equal timesteps. Pipelines round steps times strength up or down."""
        whole = None if course.strength is None else course.steps * course.strength
        begin = None if whole is None else (math.floor(whole), math.ceil(whole))
        return (name, course.steps, begin, course.tokens if self._shifts else None)


def _try(scheduler: Any, pipeline: Any, counts: Sequence[int], like: Course) -> dict[int, bool]:
    """Whether these numbers of steps run; between two that differ, find the limit by bisection. If
    one changes its configuration or its noise does not depend on the seed, none counts as running.
    """
    problems: dict[int, str | None] = {}

    def runs(steps: int) -> bool:
        if steps not in problems:
            problems[steps] = _rehearsed(scheduler, pipeline, replace(like, steps=steps))
        return problems[steps] is None

    for steps in counts:
        if not runs(steps) and problems[steps] in (CHANGES, DRAWS):  # others may do so, too
            return dict.fromkeys(counts, False)
    for fewer, more in itertools.pairwise(counts):
        while runs(fewer) != runs(more) and more - fewer > 1:
            middle = (fewer + more) // 2
            fewer, more = (middle, more) if runs(middle) == runs(fewer) else (fewer, middle)
    return {steps: runs(steps) for steps in sorted(problems)}


def _made_of(scheduler: Any) -> Iterator[Any]:
    """Yield a copy of the scheduler, and others with its configuration."""
    yield clone_scheduler(scheduler)
    for kind, changes in _candidates(scheduler):
        try:
            with _quiet():  # diffusers warns of members that the other class does not have
                other = _made(kind, scheduler, changes)
        except Exception as error:  # a package is missing, or it refuses this configuration
            name = type(scheduler).__name__
            logger.debug("%s cannot replace %s: %s", kind.__name__, name, error)
        else:
            yield other


def _candidates(scheduler: Any) -> list[tuple[Any, dict[str, Any]]]:
    kinds: list[tuple[Any, dict[str, Any]]] = [
        (kind, {}) for kind in scheduler.compatibles if not isinstance(kind, DummyObject)
    ]
    if not type(scheduler).__name__.startswith("FlowMatch"):
        return kinds
    flow = {
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": scheduler.config.get("shift", 1.0),
    }
    return [
        *kinds,
        (diffusers.FlowMatchEulerDiscreteScheduler, {}),
        (diffusers.FlowMatchHeunDiscreteScheduler, {}),
        (diffusers.FlowMatchLCMScheduler, {}),
        (diffusers.UniPCMultistepScheduler, flow),
        (diffusers.DPMSolverMultistepScheduler, flow),
    ]


def _made(kind: Any, scheduler: Any, changes: dict[str, Any]) -> Any:
    """Make a scheduler of a class with the configuration of another. Raises ValueError if that
    would have another meaning."""
    config, known = scheduler.config, inspect.signature(kind).parameters
    for name in ("use_dynamic_shifting", "beta_schedule"):
        if config.get(name) and name not in known:
            raise ValueError(f"{kind.__name__} has no {name}")
    if changes or kind not in scheduler.compatibles:
        config = {name: value for name, value in config.items() if name in known}
    return kind.from_config(config, **changes)


_here = threading.local()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within the block, drop diffusers' messages on this thread below the level ERROR: they would
    look like errors."""
    for handler in logging.getLogger("diffusers").handlers:
        handler.addFilter(_passes)  # added only once
    before = getattr(_here, "quiet", False)
    _here.quiet = True
    try:
        yield
    finally:
        _here.quiet = before


def _passes(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or not getattr(_here, "quiet", False)
