"""Jobs as JSON."""

from __future__ import annotations

import json
from typing import Any

from stepweave.api.answers import json_answer
from stepweave.errors import NotFoundError
from stepweave.serving.jobs import Followed
from stepweave.serving.request import ActiveRequest, Queued
from stepweave.serving.stored_job import StoredJob
from stepweave.store import FileStore


def describe(job: Followed) -> dict[str, Any]:
    """The job as its resource, but for its result."""
    return _of_active(job) if isinstance(job, ActiveRequest) else _of_stored(job)


async def job_answer(job: Followed, files: FileStore, base: str | None) -> bytes:
    """The job as its resource in JSON, with its result once that is there.

    Images are URLs that begin with `base` if the request asked for that, else in base64.
    """
    described, result = describe(job), b"null"
    if described["state"] == "succeeded":
        try:
            result = await json_answer(await job.result(), base, files)
        except NotFoundError as error:
            described["warnings"] = [*described["warnings"], error.message]
    del described["result"]
    return b"".join([json.dumps(described)[:-1].encode(), b', "result": ', result, b"}"])


def _of_active(active: ActiveRequest) -> dict[str, Any]:
    latest = None if active.done else active.latest()
    position = latest.position if isinstance(latest, Queued) else None
    return {
        "id": active.id,
        "object": "job",
        "kind": active.kind,
        # of one moment with the place
        "state": active.state
        if latest is None
        else "queued"
        if isinstance(latest, Queued)
        else "running",
        "step": active.job.progress.step,
        "total_steps": active.steps,
        "position": position,
        "eta_seconds": None if latest is None else latest.eta,
        "created": round(active.created, 3),
        "parameters": active.resolved(),
        "warnings": active.all_warnings,
        "error": None if active.error is None else active.error.body()["error"],
        "result": None,
    }


def _of_stored(job: StoredJob) -> dict[str, Any]:
    record = job.record
    return {
        "id": record.id,
        "object": "job",
        "kind": record.kind,
        "state": record.state,
        "step": record.step,
        "total_steps": record.total_steps,
        "position": None,
        "eta_seconds": None,
        "created": round(record.created, 3),
        "parameters": record.request["parameters"],
        "warnings": list(record.warnings),
        "error": record.error,
        "result": None,
    }
