"""The step loop: admit -> pick -> forward -> advance -> deliver."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from stepweave.batching.call import Call
from stepweave.batching.encoder_cache import EncoderCache
from stepweave.batching.fingerprints import Digests
from stepweave.batching.layout import Describer
from stepweave.certification.certificate import Verdict
from stepweave.certification.certificates import Certificates
from stepweave.certification.state_watch import name_of
from stepweave.certification.unshared import Unshared
from stepweave.compat import torch_state as ambient
from stepweave.compat.stateful_modules import Turns, spoilt
from stepweave.contained import contained
from stepweave.engine.active import Active, Crowd
from stepweave.engine.fiber import Done, Fiber, Own
from stepweave.engine.hooks import EngineScope, Offload, RunYourself
from stepweave.engine.image_threads import Elsewhere
from stepweave.engine.job import Ending, Job, enter_engine
from stepweave.engine.lookup import LookUp
from stepweave.engine.pipeline_call import call_pipeline
from stepweave.engine.runner import Forwarder, Starved, too_little
from stepweave.errors import Cancelled, StepweaveError
from stepweave.memory.device import DeviceMemory, memory_of
from stepweave.memory.device_health import DeviceHealth
from stepweave.outcome import Outcome
from stepweave.planning.clock import clock_of
from stepweave.planning.planner import Planner
from stepweave.planning.stats import Stats
from stepweave.scheduling.queues import CallQueues
from stepweave.scheduling.task import Demand

logger = logging.getLogger(__name__)

LEAVING_SECONDS = 1.0  # that the thread has to end in once nothing but work elsewhere is left
# times a job that must end is told so again, where its pipeline goes on regardless
INSISTENCE = 100


class StepLoop:
    """Runs jobs on one thread, all their calls of heavy modules in shared forwards where a
    certificate allows it."""

    def __init__(
        self,
        pipeline: Any,
        *,
        max_rows: int,
        max_decode_rows: int,
        max_jobs: int,
        cache_bytes: int,
        audit_every: int,
        memory: DeviceMemory | None,
        planner: Planner,
        stats: Stats,
        health: DeviceHealth,
    ) -> None:
        self._health, device = health, health.device
        self._kinds = kinds = ("cpu",) if device.type == "cpu" else ("cpu", device.type)
        self._stats = stats
        self._active: dict[Fiber, Active] = {}
        digests = Digests()
        self._scope = EngineScope(
            pipeline, self._active.__contains__, kinds, max_decode_rows, health, digests
        )
        self._exclusive = False  # the job that runs must be the only one
        self._crowd = Crowd(max_jobs)
        self.certificates = Certificates(digests, audit_every)
        self.unshared = Unshared()
        self.cache = EncoderCache(digests, cache_bytes)
        self._look_up = LookUp(Describer(digests), self._scope, self.cache, stats)
        self.memory = memory or memory_of(device)
        self._planner = planner
        self._forwarder = Forwarder(
            self.certificates,
            self.cache,
            stats,
            self.memory,
            kinds,
            max_rows,
            self._advance,
            clock_of(device),
            planner,
        )
        self._queues = CallQueues()
        self._waiting: dict[str, Job] = {}  # oldest first
        self._turns = Turns(self._scope)
        self._returned: deque[tuple[Active, Any]] = deque()  # fibers whose work elsewhere is done
        self._closing = self._abandoned = self._ended = False
        self._wake = threading.Condition()  # guards _waiting, _returned and the three above
        self._elsewhere = Elsewhere(self._return, device)
        self.threads = [threading.Thread(target=self._run, name="stepweave-engine", daemon=True)]
        self.threads[0].start()

    # From any thread

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._active)

    def scope_of(self, pipeline: Any) -> EngineScope:
        """Makes views of the engine's pipeline, or of another one of its modules. Raises
        EngineMisuse."""
        return self._scope if pipeline is None else self._scope.sibling(pipeline)

    def submit(self, job: Job) -> None:
        with self._wake:
            self._waiting[job.id] = job
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """A waiting job ends at once; a running one is found by the loop."""
        with self._wake:
            waited = self._waiting.pop(job.id, None)
            self._wake.notify()
        if waited is not None:
            self._finish(job, Cancelled())

    def abandon(self, job: Job, error: Exception) -> None:
        """Let go of a job that has not ended."""
        self._finish(job, error)

    def fits(self, demand: Demand) -> bool:
        """Whether the memory that is left is enough for a job's calls, as far as is known."""
        return self._forwarder.fits(demand)

    def close(self, seconds: float) -> list[str]:
        """End every job at its next step, then the thread; leave the pipeline as it was. What has
        not ended after some seconds: while a forward has not, its hooks stay; the thread takes them
        away when it has."""
        until, thread = time.monotonic() + seconds, self.threads[0]
        with self._wake:
            self._closing = True
            self._wake.notify()
        thread.join(seconds)
        with self._wake:
            self._abandoned = not self._ended
            self._wake.notify()
            left = [
                f"work on images of {one.job!r}"
                for one in list(self._active.values())
                if one.elsewhere
            ]
        thread.join(LEAVING_SECONDS)
        if thread.is_alive():
            left.append(
                f"a forward or a callback; the hooks of {type(self._scope.pipeline).__name__} stay "
                f"until it ends"
            )
        elif not self._abandoned:
            self._scope.close()
        self._elsewhere.end(max(0.0, until - time.monotonic()))
        return left

    # On the engine's thread

    def _run(self) -> None:
        torch.set_grad_enabled(False)
        ambient.use_device(self._health.device)
        enter_engine(self)
        while self._wait():
            try:
                self.turn()
            except BaseException as error:  # nothing may end this thread: jobs would hang
                if self._health.examine(error) is None:
                    self._stats.errors += 1
                    logger.exception("the engine's loop failed; it goes on")
                self._rescue()
        with self._wake:
            self._ended = True
        if self._abandoned:
            with contained("take the hooks away"):
                self._scope.close()

    def turn(self) -> None:
        """One turn of the loop."""
        if self._turns.due:
            self._start_turns()
        self._refuse_all()
        self._admit()
        self._expire()
        self._feed()
        calls = self._pick()
        if calls:
            self._forward(calls)

    def _rescue(self) -> None:
        """Let fibers that an error of the loop left behind compute what they wait for
        themselves."""
        for active in [
            one for one in self._active.values() if not (one.call or one.starved or one.elsewhere)
        ]:
            try:
                self._advance(active, RunYourself())
            except BaseException as error:
                logger.exception("a job cannot go on: %s", active.job)
                self._active.pop(active.fiber, None)
                failure = StepweaveError(
                    f"The engine failed ({type(error).__name__}).", code="engine_failed"
                )
                self._finish(active.job, failure)

    def _wait(self) -> bool:
        """Sleep until there is something to do. False when there never will be."""
        with self._wake:
            while not (self._can_go_on() or self._closing or self._next() is not None):
                self._wake.wait()
            if not self._closing:
                return True
            waiting, self._waiting = list(self._waiting.values()), {}
            for one in self._active.values():
                one.job.cancel()
            while self._active and not (self._can_go_on() or self._abandoned):
                self._wake.wait()
            if not self._can_go_on():
                self._active.clear()
        for job in waiting:
            self._finish(job, Cancelled())
        return bool(self._active)

    def _can_go_on(self) -> bool:
        return bool(self._queues or self._returned or self._only_starved())

    def _only_starved(self) -> bool:
        return bool(self._active) and all(one.starved for one in self._active.values())

    def _next(self) -> Job | None:
        """The job whose turn it is to start, if there is room for it."""
        active = self._active
        full = (
            self._exclusive
            or len(active) >= self._crowd.limit
            or any(one.starved for one in active.values())
        )
        if not self._waiting or (active and full):
            return None
        job = self._planner.next(self._waiting)
        return None if active and job.scope.takes_turns() else job

    def _admit(self) -> None:
        """Start jobs that wait, and go on with those whose work elsewhere is done."""
        while True:
            with self._wake:
                active, answer = self._returned.popleft() if self._returned else (None, None)
                job = None if active is not None or self._closing else self._next()
                if job is not None:
                    del self._waiting[job.id]
            if active is not None:
                active.elsewhere = False
                self._advance(active, answer)
            elif job is not None:
                self._start(job)
            else:
                return

    def _start(self, job: Job) -> None:
        try:
            job.check()
            if self._scope.spoilt:
                raise spoilt(self._scope.spoilt)
        except StepweaveError as error:
            self._finish(job, error)
            return
        try:
            active = self._made_active(job)
        except Exception as error:
            self._stats.errors += 1
            logger.exception("%r cannot be started", job)
            self._finish(
                job,
                StepweaveError(
                    f"The engine failed ({type(error).__name__}).", code="engine_failed"
                ),
            )
            return
        self._switch(active, active.fiber.resume, None)

    def _refuse_all(self) -> None:
        """Have jobs fail rather than run on weights that another job's own code has spoilt for
        good."""
        if not self._scope.spoilt:
            return
        for active in list(self._active.values()):
            if active.own_state() is None and active.call and not active.refused:
                self._queues.remove(active.call)
                active.call, active.refused = None, True
                self._switch(active, active.fiber.throw, spoilt(self._scope.spoilt))

    def _made_active(self, job: Job) -> Active:
        job.start()
        if not self._active:
            self._exclusive = job.scope.takes_turns()
            self._turns.keep()
        own: list[Own] = []
        with contained("watch a job's own code"):
            own = job.scope.own(job)
        if job.seed is not None and job.kwargs.get("generator") is None:  # the pipeline takes none
            own.append(ambient.DefaultRandom(job.seed, self._health.device))
        fiber = Fiber(partial(call_pipeline, job, elsewhere=True), ambient.quiet(self._kinds), own)
        active = self._active[fiber] = Active(job, fiber)
        return active

    def _expire(self) -> None:
        """Throw out the jobs that must end."""
        for active in list(self._active.values()):
            ending = active.job.ending() if active.call or active.starved else None
            if ending is not None:
                if active.call is not None:
                    self._queues.remove(active.call)
                self._end(active, ending)
        with self._wake:
            late = [job for job in self._waiting.values() if job.late]
            for job in late:
                del self._waiting[job.id]
        for job in late:
            self._start(job)

    def _end(self, active: Active, ending: Ending) -> None:
        active.call = active.starved = None
        active.told += 1
        if active.told > INSISTENCE:
            del self._active[active.fiber]
            self._finish(
                active.job,
                StepweaveError(
                    "The job does not end though it was told to.", code="cancel_ignored"
                ),
            )
        else:
            self._switch(active, active.fiber.throw, ending)

    def _feed(self) -> None:
        """Let the jobs that wait for memory try again, once no others are left; the oldest first,
        until one can go on."""
        if not self._only_starved():
            return
        hungry = sorted(self._active.values(), key=lambda active: active.job.accepted)
        for active in hungry:
            call = active.starved
            assert call is not None
            self._advance(active, self._forwarder.relieve(call, again=True))
            if active.starved is not call:
                return
        self._evict(next((one for one in reversed(hungry) if one.repeatable), hungry[-1]))

    def _evict(self, active: Active) -> None:
        """Have a job begin anew after the others: what it holds is all that is left to make room
        with."""
        assert active.starved is not None
        self._crowd.shrink(len(self._active) - 1)
        if active.repeatable:
            logger.warning(
                "%r begins anew: %d jobs at a time do not fit into memory",
                active.job,
                len(self._active),
            )
            active.evicted = True
            self._end(active, Ending())
        else:
            self._advance(active, too_little(active.starved))

    def _pick(self) -> list[Call]:
        """Calls of the key whose turn it is, as many as pay and fit."""
        return (
            self._planner.pick(self._queues.by_key(), self._forwarder.limit) if self._queues else []
        )

    def _forward(self, calls: list[Call]) -> None:
        """Run calls of one key, merged if that is proven, and let their fibers go on."""
        verdict, chosen = self._forwarder.decide(calls)
        if verdict is Verdict.ALONE:
            self.unshared.met(
                calls, self.certificates, self._scope.why_turns() if self._exclusive else {}
            )
        if len(chosen) < len(calls):
            self._planner.runs_alone(chosen[0])
        self._queues.take(chosen)
        for call in chosen:
            call.owner.call = None
            self._planner.begin(call.owner.job)
        self._forwarder.run(verdict, chosen)
        for owner in self._forwarder.doubtful():
            self._begin_anew(owner, "its steps were shared by calls that have turned out not to be")
        if self._turns.found(chosen[0]):
            owner, watch = chosen[0].owner, chosen[0].target.watch
            met_another = watch is None or watch.users - {name_of(owner)}
            self._start_turns(None if met_another else owner)

    def unshared_now(self) -> list[dict[str, str]]:
        """What runs alone, or takes turns, and why."""
        return self.unshared.listed(self.certificates.all(), self._scope.why_turns())

    def _start_turns(self, steady: Active | None = None) -> None:
        """Have jobs run one at a time from now on; those that may have met what another left in a
        module start again, which are all but the `steady` one."""
        self._turns.tell()
        self.cache.clear()
        self._exclusive = bool(self._active)
        for active in sorted(self._active.values(), key=lambda one: one.job.accepted, reverse=True):
            if active is not steady:
                self._begin_anew(active, "a module keeps state of other jobs")
        if not self._active:
            self._turns.put_back()

    def _begin_anew(self, active: Active, reason: str) -> None:
        """Have a job begin anew, if it can."""
        if active.fiber not in self._active or active.evicted:
            return
        if not active.repeatable:
            logger.warning("%r cannot begin anew, though %s", active.job, reason)
            return
        logger.info("%r begins anew: %s", active.job, reason)
        active.evicted = True
        if not active.elsewhere:
            if active.call is not None:
                self._queues.remove(active.call)
            self._end(active, Ending())

    def _advance(self, active: Active, answer: Any) -> None:
        """Let a fiber go on with the answer to what it waited for; one that is starved waits for
        the others to end."""
        active.starved = None
        if isinstance(answer, Starved) and len(self._active) > 1:
            active.starved = answer.call
        elif isinstance(answer, Starved):
            self._switch(active, active.fiber.throw, too_little(answer.call))
        elif isinstance(answer, BaseException):
            self._switch(active, active.fiber.throw, answer)
        else:
            self._switch(active, active.fiber.resume, answer)

    def _switch(self, active: Active, switch: Callable[[Any], Any], value: Any) -> None:
        request = switch(value)
        while True:
            if isinstance(request, Done):
                outcome: Outcome = request.outcome
                outcome.let_go()
                active.own_state()  # what it did after its last call
                del self._active[active.fiber]
                if not self._active:
                    self._turns.put_back()
                if active.evicted and active.job.ending() is None:
                    active.reset()
                    with self._wake:
                        self._waiting = {active.job.id: active.job, **self._waiting}
                else:
                    self._finish(active.job, outcome)
            elif active.evicted:  # its pipeline goes on regardless
                self._end(active, Ending())
            elif isinstance(request, Offload):
                self._elsewhere.run(active, request)
            elif request.ran_out:
                self._advance(active, self._forwarder.relieve(request))
            else:
                request.owner, request.task = active, active.job.task
                known = self._look_up.known(request, active)
                if known is not None:
                    request = active.fiber.resume(known)
                    continue
                self._planner.saw(active.job, request)
                active.call = request
                self._queues.add(request)
            return

    def _return(self, active: Active, answer: Any) -> None:
        with self._wake:
            self._returned.append((active, answer))
            self._wake.notify()

    def _finish(self, job: Job, outcome: Outcome | Exception) -> None:
        if isinstance(outcome, Exception):
            outcome = Outcome(error=outcome)
        if outcome.error is None:
            job.scope.ended(job)
        self._planner.leave(job, succeeded=outcome.error is None)
        told = job.finish(outcome)
        if told is not None:
            self._stats.finished(told)
            self._crowd.ended()
