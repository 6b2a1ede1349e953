"""One job's call of its pipeline, and the progress that its view reports."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from stepweave.compat.cpu_offload import pipelines_in
from stepweave.compat.modular import loops_of
from stepweave.compat.posteriors import GENERATOR
from stepweave.compat.proxy import Proxy
from stepweave.compat.row_adapters import Chosen
from stepweave.outcome import Outcome
from stepweave.previews.latents import Progressing, Tap
from stepweave.truncation.prompts import Reader, warned
from stepweave.views.attributes import replaced
from stepweave.views.finite import FiniteImages
from stepweave.views.images import OnThread, images_on_threads
from stepweave.views.scope import PrivateScope


class PipelineJob(Progressing, Reader, Protocol):
    """A job, as far as its pipeline's call is concerned."""

    scope: PrivateScope
    scheduler: Any
    adapters: Chosen


def call_pipeline(
    job: PipelineJob, *, last: Callable[[], Any] = lambda: None, on_thread: OnThread | None = None
) -> Outcome:
    """Call the pipeline on a view for this job; returns the outcome, never raises.

    `last` returns the last result of the pipeline's models. `on_thread`, if given, does the work of
    image processors.
    """
    try:
        with (
            job.adapters.applied(),
            job.scope.lease(job.scheduler) as view,
            warned(view, [job]),
            track(view, job),
            FiniteImages(view, last) as images,
            images_on_threads(view, on_thread),
        ):
            # caught in here: some exceptions do not pass through context managers
            return Outcome.of(_call, view, job, images)
    except BaseException as error:
        return Outcome(error=error)


def _call(view: Any, job: PipelineJob, images: FiniteImages) -> Any:
    GENERATOR.set(job.kwargs.get("generator"))
    return images.checked(view(*job.args, **job.kwargs))


class _Bar(Proxy):
    """A progress bar that also reports to the job, and raises Ending if the job must end."""

    def __init__(self, bar: Any, job: Progressing | Tap) -> None:
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
def track(view: Any, job: Progressing) -> Iterator[None]:
    """Within the block, report the view's progress and latents to the job: every diffusers pipeline
    shows its progress on a bar, which is wrapped.

    The bars themselves are not shown, unless the pipeline's configuration has `disable=False`:
    those of jobs that run together would overwrite each other.
    """
    tap = Tap(view, job) if job.observed else None
    receiver = tap or job
    with contextlib.ExitStack() as stack:
        if tap is not None:
            stack.callback(tap.end)
        for owner in [one for part in pipelines_in(view) for one in (part, *loops_of(part))]:
            make = getattr(owner, "progress_bar", None)
            if make is not None:
                bar = lambda *args, make=make, **kwargs: _Bar(make(*args, **kwargs), receiver)  # noqa: E731
                stack.callback(replaced(owner, "progress_bar", bar))
                shown = {"disable": True, **getattr(owner, "_progress_bar_config", {})}
                stack.callback(replaced(owner, "_progress_bar_config", shown))
        yield
