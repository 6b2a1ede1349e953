"""Restarts jobs with doubtful results, and has jobs take turns if a module keeps state."""

from __future__ import annotations

from typing import Protocol

from stepweave.batching.call import Call
from stepweave.batching.encoder_cache import EncoderCache
from stepweave.certification.certificates import Certificates
from stepweave.certification.state_watch import Watches
from stepweave.jobs.running import RunningJob
from stepweave.views.modules import EngineModules

IN_DOUBT = "it used results of merged forwards whose certificate has failed"
STATEFUL = "a module keeps state, possibly of other jobs"


class Loop(Protocol):
    """The step loop, as far as recovery acts on it."""

    one_at_a_time: bool

    def running_jobs(self) -> list[RunningJob]: ...
    def restart(self, job: RunningJob, reason: str) -> None: ...
    def end(self, job: RunningJob, error: BaseException) -> None: ...


class Recovery:
    """Checks modules before each step, and results after it."""

    def __init__(
        self,
        loop: Loop,
        modules: EngineModules,
        certificates: Certificates,
        cache: EncoderCache,
        watches: Watches,
    ) -> None:
        self._loop = loop
        self._modules = modules
        self._certificates = certificates
        self._cache = cache
        self._watches = watches

    def before_step(self) -> None:
        """Have jobs take turns if a module keeps state; end those that would run on weights that
        another job's own code has overwritten."""
        guard = self._modules.guard
        if guard.untold:
            self._take_turns()
        error = guard.error()
        if error is None:
            return
        for job in self._loop.running_jobs():
            if job.call and not job.refused and guard.changed_by(job) is None:
                job.refused = True
                self._loop.end(job, guard.error() or error)

    def after_step(self, call: Call) -> None:
        """Restart jobs whose results are in doubt, and those that may have used a module's state,
        after a step with this call."""
        for job in self._certificates.doubtful():
            self._loop.restart(job, IN_DOUBT)
        watch = self._watches.of(call.target)
        if self._modules.note_stateful(call.target, watch):
            met_another = watch.users - {call.owner.id}
            self._take_turns(None if met_another else call.owner)

    def _take_turns(self, steady: RunningJob | None = None) -> None:
        """Run jobs one at a time from now on. All but the `steady` one restart: they may have used
        state that another job has left in a module."""
        self._modules.guard.tell()
        self._cache.clear()
        jobs = self._loop.running_jobs()
        self._loop.one_at_a_time = bool(jobs)
        for job in sorted(jobs, key=lambda job: job.accepted, reverse=True):
            if job is not steady:
                self._loop.restart(job, STATEFUL)
        if not self._loop.running_jobs():
            self._modules.guard.put_back()
