"""Counting requests for images: each once, by what it was answered with."""

from __future__ import annotations

import asyncio
import re
from functools import partial

from starlette.types import Scope

from stepweave.config.clients import Client
from stepweave.errors import StepweaveError
from stepweave.serving.jobs import Followed
from stepweave.serving.request import ActiveRequest
from stepweave.telemetry.metrics import Metrics

# `$`, as in Starlette's routes, also stands before a line end
_PATH = re.compile(
    r"/(v1/images/(generations|edits)|generate|generate_stream|edit|api/diffusers/inference|v2/models/.*/infer)$"
)


class Count:
    """One request, until it is counted; one that asks for no images never is."""

    def __init__(self, scope: Scope, metrics: Metrics) -> None:
        self._metrics = metrics
        self._counts = scope["method"] == "POST" and _PATH.match(scope["path"]) is not None
        self.failed: int | None = None  # status of the error that its stream ended with
        self.job: Followed | None = None  # that it was accepted as, if it does not wait for it
        if self._counts:
            metrics.requests_begun += 1

    def close(self, status: int, client: Client | None) -> None:
        """Count the request by the status of its answer: 499 if the client left before its end, 500
        if it broke off.

        One that was accepted as a job counts when that has ended, by its stored result.
        """
        if not self._counts:
            return
        answered = partial(self._metrics.answered, client="" if client is None else client.name)
        if self.job is None:
            answered(status if self.failed is None or status != 200 else self.failed)
        elif isinstance(self.job, ActiveRequest) and self.job.keeping is not None:
            self.job.keeping.add_done_callback(lambda kept: answered(_status_of(kept)))
        else:
            answered(200)  # only a job that succeeded is joined once it is over


def _status_of(kept: asyncio.Task[StepweaveError | None]) -> int:
    if kept.cancelled():
        return 500
    error = kept.result()
    return 200 if error is None else error.status
