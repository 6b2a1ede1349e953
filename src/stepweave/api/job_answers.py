"""Jobs as JSON."""

from __future__ import annotations

import json
from typing import Any

from stepweave.api.answers import json_answer
from stepweave.errors import NotFound
from stepweave.serving.jobs import Followed
from stepweave.serving.request import Queued, Ticket
from stepweave.serving.stored_job import KeptJob
from stepweave.store import FileStore


def describe(job: Followed) -> dict[str, Any]:
    """The job as its resource, but for its result."""
    return _of_ticket(job) if isinstance(job, Ticket) else _of_record(job)


async def job_answer(job: Followed, files: FileStore, base: str | None) -> bytes:
    """The job as its resource in JSON, with its result once that is there.

    Pictures are URLs that begin with `base` if the request asked for that, else in base64.
    """
    described, result = describe(job), b"null"
    if described["state"] == "succeeded":
        try:
            result = await json_answer(await job.result(), base, files)
        except NotFound as error:
            described["warnings"] = [*described["warnings"], error.message]
    del described["result"]
    return b"".join([json.dumps(described)[:-1].encode(), b', "result": ', result, b"}"])


def _of_ticket(ticket: Ticket) -> dict[str, Any]:
    standing = None if ticket.done else ticket.standing()
    position = standing.position if isinstance(standing, Queued) else None
    return {
        "id": ticket.id,
        "object": "job",
        "kind": ticket.kind,
        # of one moment with the place
        "state": ticket.state
        if standing is None
        else "queued"
        if isinstance(standing, Queued)
        else "running",
        "step": ticket.job.progress.step,
        "total_steps": ticket.steps,
        "position": position,
        "eta_seconds": None if standing is None else standing.eta,
        "created": round(ticket.created, 3),
        "parameters": ticket.resolved(),
        "warnings": ticket.all_warnings,
        "error": None if ticket.error is None else ticket.error.body()["error"],
        "result": None,
    }


def _of_record(job: KeptJob) -> dict[str, Any]:
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
