"""One job's call of its pipeline, on a view that reports to it."""

from __future__ import annotations

from typing import Any

from stepweave.engine.finite import FiniteImages
from stepweave.engine.hooks import pictures_elsewhere, track
from stepweave.engine.job import Job
from stepweave.engine.prompts import warned


def call_pipeline(job: Job, *, suspends: bool) -> Any:
    """What the pipeline's call gives. With `suspends`, it runs in a fiber, and images are made on other threads.

    Raises what the call does, and NonFinite.
    """
    with job.scope.lease(job.scheduler) as view, warned(view, [job]):
        track(view, job)
        images = FiniteImages(view)
        if suspends:
            pictures_elsewhere(view)
        return images.checked(view(*job.args, **job.kwargs))
