"""One job's call of its pipeline: what its view reports, and where it reads and makes pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from diffusers.image_processor import InpaintProcessor, VaeImageProcessor
from PIL import Image

from stepweave.compat.attributes import POSTPROCESS, Method, methods_of_processors, replaced
from stepweave.compat.cpu_offload import pipelines_in
from stepweave.compat.finite import FiniteImages
from stepweave.compat.values import comes_with_a_library
from stepweave.engine.fiber import current_fiber, suspend, suspendable
from stepweave.engine.hooks import Offload, RunYourself
from stepweave.engine.job import Job
from stepweave.outcome import Outcome
from stepweave.previews.latents import Observed, Tap
from stepweave.scope.proxy import Proxy
from stepweave.truncation.prompts import warned


def call_pipeline(job: Job, *, elsewhere: bool = False) -> Outcome:
    """What comes of the pipeline's own call on a view of the job's own; with `elsewhere` other
    threads work on its pictures."""
    try:
        with (
            job.scope.lease(job.scheduler) as view,
            warned(view, [job]),
            track(view, job),
            FiniteImages(view) as images,
        ):
            # in here: not every exception passes context managers
            if not elsewhere:
                return Outcome.of(_call, view, job, images)
            with pictures_elsewhere(view):
                return Outcome.of(_call, view, job, images)
    except BaseException as error:
        return Outcome(error=error)


def _call(view: Any, job: Job, images: FiniteImages) -> Any:
    return images.checked(view(*job.args, **job.kwargs))


class _Bar(Proxy):
    """A progress bar that tells the job, too, and ends it if it must end."""

    def __init__(self, bar: Any, job: Observed | Tap) -> None:
        super().__init__(bar)
        self._self_job = job
        job.check_step()
        job.open(int(bar.total or 0))

    def update(self, n: float | None = 1) -> Any:
        result = self.__wrapped__.update(n)
        self._self_job.advance(int(n or 1))
        self._self_job.check_step()
        return result

    def __iter__(self) -> Iterator[Any]:
        for item in self.__wrapped__:
            yield item
            self._self_job.advance(1)
            self._self_job.check_step()

    def __enter__(self) -> _Bar:
        self.__wrapped__.__enter__()
        return self


@contextlib.contextmanager
def track(view: Any, job: Observed) -> Iterator[None]:
    """Within it the job is told of the view's progress, which every pipeline of diffusers shows on
    a bar, and its observer of latents."""
    tap = Tap(view, job) if job.observed else None
    told = tap or job
    with contextlib.ExitStack() as left:
        if tap is not None:
            left.callback(tap.end)
        for one in pipelines_in(view):
            make = getattr(one, "progress_bar", None)
            if make is not None:
                bar = lambda *args, make=make, **kwargs: _Bar(make(*args, **kwargs), told)  # noqa: E731
                left.callback(replaced(one, "progress_bar", bar))
        yield


@contextlib.contextmanager
def pictures_elsewhere(view: Any) -> Iterator[None]:
    """Within it the view's image processors read and make pictures on another thread: PIL images,
    copies from the device."""
    with contextlib.ExitStack() as left:
        for owner, name, method in _picture_methods(view):
            known = comes_with_a_library(type(owner))
            left.callback(replaced(owner, name, _elsewhere(method, known)))
        yield


def _picture_methods(view: Any) -> Iterator[Method]:
    """The methods of a view's image processors that read and make pictures, to be called so."""
    ours = (VaeImageProcessor, InpaintProcessor)  # others may be shared with other views
    for owner, name, method in methods_of_processors(
        view, ("preprocess", "preprocess_video"), ours
    ):
        yield owner, name, _each_once(method)
    yield from methods_of_processors(view, POSTPROCESS)


def _elsewhere(method: Callable[..., Any], known: bool) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if current_fiber() is None or torch.is_grad_enabled() or not suspendable():
            return method(*args, **kwargs)
        answer = suspend(Offload(partial(method, *args, **kwargs), known))
        if isinstance(answer, RunYourself):
            return method(*args, **kwargs)
        return answer.get() if isinstance(answer, Outcome) else answer

    return run


def _each_once(method: Callable[..., Any]) -> Callable[..., Any]:
    """`preprocess`, which reads a picture that is given for each of several ones to be made but
    once."""
    if getattr(method, "__func__", None) is not VaeImageProcessor.preprocess:
        return method

    def run(image: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        count = len(image) if isinstance(image, list) else 1
        alike = (
            count > 1
            and isinstance(image[0], Image.Image)
            and all(one is image[0] for one in image)
        )
        read: torch.Tensor = method(image[:1] if alike else image, *args, **kwargs)
        return read.repeat(count, *[1] * (read.ndim - 1)) if alike else read

    return run
