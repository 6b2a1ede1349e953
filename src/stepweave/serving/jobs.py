"""Jobs that outlive their connection: stored, and found by id or by idempotency key."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from stepweave.config import Settings
from stepweave.errors import ConflictError, NotFoundError, StepweaveError, shown
from stepweave.serving.request import ActiveRequest, Progressed
from stepweave.serving.resources import RECORDED, ErrorDetail
from stepweave.serving.stored_job import FLAGGED, LOST, StoredJob
from stepweave.serving.submission import Submission
from stepweave.store import (
    DirectoryFileStore,
    FileStore,
    FreeBytes,
    JobRecord,
    JobStore,
    SqliteJobStore,
    StoreHealth,
    state_directory,
)

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 60.0
PROBE_SECONDS = 5.0  # between two probes of a store whose last write failed
KEEP_AGAIN_SECONDS = (0.2, 1.0, 5.0, 10.0)  # waits before a result is stored again

Accept = Callable[[], Awaitable[ActiveRequest]]
Followed = ActiveRequest | StoredJob


@dataclass
class _Opening:
    """The first request with an idempotency key, from before it is accepted."""

    fingerprint: str
    followed: asyncio.Task[Followed]
    waiting: int = 0  # requests that wait until it is accepted

    @property
    def active(self) -> ActiveRequest | None:
        task = self.followed
        if not task.done() or task.cancelled() or task.exception() is not None:
            return None
        followed = task.result()
        return followed if isinstance(followed, ActiveRequest) else None

    @property
    def lost(self) -> bool:
        return self.active is not None and self.active.lost

    def let_go(self) -> None:
        if self.active is not None and not self.waiting:
            self.active.let_go()


class Jobs:
    """The jobs of one server: `active` ones by id, and stored ones."""

    def __init__(
        self,
        store: JobStore,
        files: FileStore,
        active: Mapping[str, ActiveRequest],
        directory: Path,
    ) -> None:
        self.store = store
        self.files = files
        self.directory = directory  # of both
        self._active = active
        self._owners: dict[str, str | None] = {}  # by job id, until stored
        self._open: dict[tuple[str | None, str], _Opening] = {}  # by owner and key, until stored
        self._under_way: dict[str, ActiveRequest] = {}  # by job id, until stored
        self._keeping: dict[str, asyncio.Task[StepweaveError | None]] = {}  # by job id
        self._exits = contextlib.ExitStack()
        # free bytes of the stores' disk; do not call it on the event loop
        self.free_bytes: Callable[[], float] = lambda: math.nan

    @classmethod
    def open(cls, settings: Settings, active: Mapping[str, ActiveRequest]) -> Jobs:
        """Open the stores in the settings' directory. Raises StepweaveError if it is unusable."""
        with contextlib.ExitStack() as exits:
            directory = exits.enter_context(state_directory(settings.state_dir))
            seconds = settings.keep_seconds
            files = DirectoryFileStore(directory / "images", seconds, settings.keep_bytes)
            store = SqliteJobStore(directory / "jobs.sqlite", seconds, settings.keep_jobs)
            jobs = cls(store, files, active, directory)
            jobs.free_bytes = FreeBytes(directory)
            jobs._exits = exits.pop_all()
        return jobs

    def resume(self) -> None:
        """Mark unfinished jobs of an earlier process as failed. Not for the event loop's thread."""
        count = asyncio.run(self.store.interrupted())
        if count:
            logger.warning("%d jobs were interrupted by a restart; they are now failed", count)

    def close(self) -> None:
        """Close the stores and unlock the directory. Not for the event loop's thread."""
        asyncio.run(self.store.close())
        asyncio.run(self.files.close())
        self._exits.close()

    # Requests

    async def start(self, submission: Submission, accept: Accept) -> Followed:
        """Have a request accepted, or join the job of its idempotency key, unless that failed or
        was cancelled.

        Detached jobs and jobs with a key are stored. Raises ConflictError if the key was used for
        a different request, and what `accept` raises.
        """
        if submission.key is None:
            return await self._begin(submission, accept)
        slot = (submission.owner, submission.key)
        opening = self._open.get(slot)
        if opening is None or opening.lost:
            beginning = asyncio.ensure_future(self._find_or_begin(submission, accept))
            opening = self._open[slot] = _Opening(submission.fingerprint, beginning)
            opening.followed.add_done_callback(lambda _: self._opened(slot, opening))
        elif opening.fingerprint != submission.fingerprint:
            raise self._conflict(submission.key)
        opening.waiting += 1
        try:
            followed = await asyncio.shield(opening.followed)
        except asyncio.CancelledError:
            opening.followed.add_done_callback(lambda _: opening.let_go())
            raise
        finally:
            opening.waiting -= 1
        if submission.detached and isinstance(followed, ActiveRequest):
            followed.detached = True  # the job's first request may not have been detached
        return followed

    async def _find_or_begin(self, submission: Submission, accept: Accept) -> Followed:
        assert submission.key is not None
        record = await self.store.by_key(submission.owner, submission.key)
        live = None if record is None else self._live(record.id)
        if record is None or (live.lost if live is not None else not self._whole(record)):
            return await self._begin(submission, accept)
        if record.fingerprint != submission.fingerprint:
            raise self._conflict(submission.key)
        return live or StoredJob(record, self.files)

    def _whole(self, record: JobRecord) -> bool:
        """Whether a job's end is recorded and its images are still stored."""
        return record.done and all(map(self.files.has, record.files))

    @staticmethod
    def _conflict(key: str) -> ConflictError:
        return ConflictError(
            f"Idempotency-Key {shown(key.partition(' ')[2])} was used for a different request."
        )

    def _opened(self, slot: tuple[str | None, str], opening: _Opening) -> None:
        """Forget the opening once its job is stored: the store finds the key from then on."""
        keeping = None if opening.active is None else self._keeping.get(opening.active.id)
        if keeping is None:
            self._forget(slot, opening)
        else:
            keeping.add_done_callback(lambda _: self._forget(slot, opening))

    def _forget(self, slot: tuple[str | None, str], opening: _Opening) -> None:
        if self._open.get(slot) is opening:
            del self._open[slot]

    async def _begin(self, submission: Submission, accept: Accept) -> Followed:
        active = await accept()
        if not submission.detached and submission.key is None:
            self._owners[active.id] = submission.owner
            active.ended().add_done_callback(lambda _: self._owners.pop(active.id, None))
            return active
        active.kept = True
        record = _record(active, submission)
        noting = asyncio.ensure_future(self.store.put(record))
        self._owners[active.id] = submission.owner
        self._under_way[active.id] = active
        active.keeping = asyncio.ensure_future(self._keep(active, record, submission, noting))
        self._keeping[active.id] = active.keeping
        try:
            # before the answer, which promises that the job can be found
            await asyncio.shield(noting)
        except BaseException:
            active.detached = False
            active.let_go()
            raise
        return active

    async def _keep(
        self,
        active: ActiveRequest,
        record: JobRecord,
        submission: Submission,
        noting: Awaitable[None],
    ) -> StepweaveError | None:
        """Record that a request runs, and its result; returns the job's error, or None."""
        try:
            await noting
            async for update in active.updates():
                if isinstance(update, Progressed) and record.state == "queued":
                    record = replace(_record(active, submission), state="running")
                    # logged by the store; only the result must be stored
                    with contextlib.suppress(StepweaveError):
                        await self.store.put(record)
            for wait in KEEP_AGAIN_SECONDS:
                try:
                    return await self._keep_result(active, submission)
                except StepweaveError:  # a full disk may have space again
                    logger.warning(
                        "job %s: storing the result failed, retrying in %g s", active.id, wait
                    )
                    await asyncio.sleep(wait)
            return await self._keep_result(active, submission)
        except Exception:
            logger.exception(
                "job %s: the result could not be stored and is lost (store_failed)", active.id
            )
            return LOST
        finally:
            active.leave()  # only now: this bounds the results that wait for a slow disk
            del self._under_way[active.id], self._keeping[active.id]
            self._owners.pop(active.id, None)

    async def _keep_result(
        self, active: ActiveRequest, submission: Submission
    ) -> StepweaveError | None:
        """Store a finished request; returns the job's error, or None."""
        record = _record(active, submission)
        if active.error is not None:
            await self.store.put(record)
            return active.error
        answer = await active.result()
        try:
            names = [await image.stored(self.files) for image in answer.images]
        except StepweaveError as error:
            if error.code != "file_too_large":
                raise
            failed = replace(record, state="failed", error=ErrorDetail.of(error).model_dump())
            await self.store.put(failed)
            return error
        flagged, warnings = [image.flagged for image in answer.images], answer.details.warnings
        response = {**answer.details.model_dump(), FLAGGED: flagged}
        await self.store.put(
            replace(record, response=response, files=tuple(names), warnings=warnings)
        )
        return None

    def keeping(self) -> list[asyncio.Task[StepweaveError | None]]:
        """The tasks that store results."""
        return list(self._keeping.values())

    # Queries

    async def get(self, id: str, owner: str | None) -> Followed:
        """The owner's job of that id. Raises NotFoundError, also if it is another owner's."""
        active = self._live(id)
        if active is not None and self._owners.get(id) == owner:
            return active
        record = None if active is not None else await self.store.get(id)
        if record is None or record.owner != owner:
            raise NotFoundError(
                f"There is no job {shown(id)}; finished jobs are deleted after a while.",
                code="job_not_found",
            )
        return StoredJob(record, self.files)

    def _live(self, id: str) -> ActiveRequest | None:
        return self._active.get(id) or self._under_way.get(id)

    async def list(
        self, owner: str | None, limit: int, before: str | None
    ) -> tuple[list[Followed], str | None]:
        """At most `limit` of the owner's stored jobs, newest first, and the next page's cursor."""
        records = await self.store.list(owner, limit, before)
        jobs: list[Followed] = [
            self._live(record.id) or StoredJob(record, self.files) for record in records
        ]
        return jobs, records[-1].cursor if len(records) == limit else None

    async def delete(self, id: str) -> None:
        """Delete a finished job and its images."""
        keeping = self._keeping.get(id)
        if keeping is not None:
            await asyncio.shield(keeping)
        await self.files.delete(await self.store.delete(id))

    # Health of the stores

    def stores(self) -> dict[str, StoreHealth]:
        """The health of the stores `jobs` and `files`."""
        return {"jobs": self.store.health, "files": self.files.health}

    @property
    def problem(self) -> str | None:
        """Why writes to the stores fail, as "files full: No space left on device", or None."""
        problems = {name: health.problem for name, health in self.stores().items()}
        return "; ".join(f"{name} {text}" for name, text in problems.items() if text) or None

    async def probe(self) -> None:
        """Try again to write to stores whose last write failed, since no request may come."""
        for store in (self.store, self.files):
            if not store.health.writable:
                with contextlib.suppress(StepweaveError):  # logged, and counted
                    await store.probe()

    # Retention

    async def sweep(self) -> None:
        """Delete expired jobs and images."""
        now = time.time()
        await self.files.delete(await self.store.sweep(now))
        await self.files.delete(await self.store.forget(await self.files.sweep(now)))

    async def look_after(self) -> None:
        """Sweep and probe periodically, until cancelled."""
        swept = time.monotonic()
        while True:
            await asyncio.sleep(min(PROBE_SECONDS, SWEEP_SECONDS))
            await self.probe()
            if time.monotonic() - swept >= SWEEP_SECONDS:
                swept = time.monotonic()
                try:
                    await self.sweep()
                except Exception:
                    logger.exception(
                        "deleting expired jobs and images failed; it is tried again in %g s",
                        SWEEP_SECONDS,
                    )


def _record(active: ActiveRequest, submission: Submission) -> JobRecord:
    """The record of a request in its present state."""
    job, view = active.job, active.view()
    age = time.monotonic() - job.accepted
    begun = None if job.begun is None else active.created + job.begun - job.accepted
    return JobRecord(
        owner=submission.owner,
        updated=active.created + age,
        started=begun,
        finished=time.time() if active.done else None,
        request={
            "values": active.parameters.of_image(0),
            "parameters": view.parameters.model_dump(),
            "response_format": submission.response_format,
        },
        idempotency_key=submission.key,
        fingerprint=submission.fingerprint,
        **view.model_dump(include=set(RECORDED)) | {"created": active.created},
    )
