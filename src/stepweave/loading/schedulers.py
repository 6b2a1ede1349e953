"""Schedulers that a pipeline may be called with in place of its own, and the numbers of steps that
each of them runs with.

Both are found by rehearsals without the model: at some numbers of steps to begin with, at every
other one when it is asked for.
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

STEPS = 4  # where none are asked for
# numbers of steps that are tried to begin with, besides the default and the most
FIRST = (1, 2, 3, 11, 20)
LONGEST = 1000  # of those; a longer one is tried when it is asked for
REMEMBERED = 4096  # rehearsals
DRAWS = "a seed would not decide its noise"


def schedulers_of(pipeline: Any) -> dict[str, Any]:
    """Schedulers to call the pipeline with, by class name, its own among them; {} if it has none.

    They are made of the own one's configuration: what diffusers calls compatible, and for flow
    matching those with flow sigmas.
    """
    return Rehearsals.of(pipeline, Course(STEPS), max(FIRST)).schedulers


def rehearse(
    scheduler: Any, pipeline: Any, steps: int = STEPS, strength: float | None = None
) -> bool:
    """Whether calls of the pipeline run with a scheduler, and again the same with the same
    generator.

    All steps are taken from noise, as the pipeline's code sets them; for an edit, those that its
    strength leaves, or all from the second one. Not while others draw from torch's global
    generator: whether the scheduler does is seen there.
    """
    return _rehearsed(scheduler, pipeline, Course(steps, strength)) is None


def _rehearsed(scheduler: Any, pipeline: Any, course: Course) -> str | None:
    with _quiet(), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        before = torch.get_rng_state()
        problem = problem_of(scheduler, pipeline, course)
        return problem if torch.equal(torch.get_rng_state(), before) else DRAWS


class Rehearsals:
    """Which numbers of steps a pipeline runs with which schedulers: some tried at once, every other
    one when first asked for.

    `like` is what calls are like by default. `schedulers` are those that run with some number, and
    the pipeline's own, by class name. Threads may share it.
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
        self._tried: dict[str, dict[int, bool]] = {}  # to begin with, the fewest steps first
        self._refused: set[tuple[str | None, int]] = set()  # names and numbers of steps
        self._found: dict[Hashable, bool] = {}  # when asked for, the oldest first
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
        """Of all that may take the place of the pipeline's own scheduler, to begin with at numbers
        of steps up to `most`."""
        own = getattr(pipeline, "scheduler", None)
        if not isinstance(own, SchedulerMixin):
            return cls(pipeline, (), None, (), like)
        counts = {steps for steps in (*FIRST, like.steps, min(most, LONGEST)) if steps <= most}
        return cls(pipeline, _made_of(own), type(own).__name__, sorted(counts), like)

    def of_edits(self, pipeline: Any, like: Course) -> Rehearsals:
        """Of the same schedulers with a pipeline for edits."""
        counts = {
            steps
            for steps in (*FIRST, like.steps)
            if like.strength is None or int(steps * like.strength)
        }
        return Rehearsals(pipeline, self.schedulers.values(), self._own, sorted(counts), like)

    def runs(self, name: str | None, course: Course) -> bool:
        """Whether calls run with a scheduler of `schedulers`, None for the own one; the first time
        it is tried.

        The own one is not doubted where no rehearsal of it is to be trusted: none has run.
        """
        name = name or self._own
        if (name, course.steps) in self._refused:
            return False
        if name is None or (name == self._own and not any(self._tried[name].values())):
            return True
        key = self._key(name, course)
        if (found := self._found.get(key)) is not None:
            return found
        with self._lock:  # one at a time, whatever is asked for
            if key not in self._found:
                with _quiet():
                    problem = problem_of(self.schedulers[name], self._pipeline, course)
                if problem is not None:
                    logger.info(
                        "%s with %s: %s does not run: %s",
                        type(self._pipeline).__name__,
                        name,
                        course,
                        problem,
                    )
                if len(self._found) >= REMEMBERED:
                    del self._found[next(iter(self._found))]
                self._found[key] = problem is None
            return self._found[key]

    def refuse(self, name: str | None, steps: int) -> None:
        """Take it that calls do not run so, whatever a rehearsal says: the pipeline itself has
        failed."""
        name = name or self._own
        if name is not None:
            self._refused.add((name, steps))
            self._tried[name] = {**self._tried.get(name, {}), steps: False}

    def knows(self, name: str | None, course: Course) -> bool:
        """Whether `runs` answers at once; a rehearsal takes about 0.1 ms a step."""
        name = name or self._own
        known = name is None or name not in self.schedulers or not any(self._tried[name].values())
        return known or self._key(str(name), course) in self._found

    def tried(self, name: str | None) -> tuple[list[int], list[int]]:
        """The numbers of steps that were tried to begin with: those with which a scheduler runs,
        and the others."""
        tried = self._tried.get(name or self._own or "", {})
        return [steps for steps, runs in tried.items() if runs], [
            steps for steps, runs in tried.items() if not runs
        ]

    def _key(self, name: str, course: Course) -> Hashable:
        """What decides which steps run: of steps times strength, pipelines take the whole part, or
        the next whole number."""
        whole = None if course.strength is None else course.steps * course.strength
        begin = None if whole is None else (math.floor(whole), math.ceil(whole))
        return (name, course.steps, begin, course.tokens if self._shifts else None)


def _try(scheduler: Any, pipeline: Any, counts: Sequence[int], like: Course) -> dict[int, bool]:
    """Whether some numbers of steps run, and, between two that differ in this, up to where; none
    does of what no seed decides."""
    problems: dict[int, str | None] = {}

    def runs(steps: int) -> bool:
        if steps not in problems:
            problems[steps] = _rehearsed(scheduler, pipeline, replace(like, steps=steps))
        return problems[steps] is None

    for steps in counts:
        if not runs(steps) and problems[steps] in (CHANGES, DRAWS):  # it may with any number
            return dict.fromkeys(counts, False)
    for fewer, more in itertools.pairwise(counts):
        while runs(fewer) != runs(more) and more - fewer > 1:
            middle = (fewer + more) // 2
            fewer, more = (middle, more) if runs(middle) == runs(fewer) else (fewer, middle)
    return {steps: runs(steps) for steps in sorted(problems)}


def _made_of(scheduler: Any) -> Iterator[Any]:
    """The own scheduler's copy, and the others that its configuration makes."""
    yield clone_scheduler(scheduler)
    for kind, changes in _candidates(scheduler):
        try:
            with _quiet():  # of what the other scheduler's configuration has beyond this one's
                one = _made(kind, scheduler, changes)
        except Exception as error:  # a package is missing, or it does not take this configuration
            logger.debug(
                "%s cannot take the place of %s: %s", kind.__name__, type(scheduler).__name__, error
            )
        else:
            yield one


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
    """A scheduler of a class with the configuration of another. Raises ValueError where that would
    say something else."""
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
    """Drop what diffusers logs on this thread below the level of errors, which is of no use while
    a scheduler is rehearsed. What other threads log stays."""
    for handler in logging.getLogger("diffusers").handlers:
        handler.addFilter(_passes)  # once, however often
    before = getattr(_here, "quiet", False)
    _here.quiet = True
    try:
        yield
    finally:
        _here.quiet = before


def _passes(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or not getattr(_here, "quiet", False)
