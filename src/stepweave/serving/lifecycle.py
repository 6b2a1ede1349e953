"""The life of a server: it loads its model, reports its health, drains, and shuts down."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from stepweave.config import Settings, removed_settings
from stepweave.errors import DeviceFailedError, LoadError, StepweaveError, UnavailableError
from stepweave.images.decoders import Decoders
from stepweave.reasons import reason_of
from stepweave.scheduling.policy import Policy, srpt
from stepweave.serving import heap
from stepweave.serving.admission import Admission
from stepweave.serving.drain import Drain, DrainToken
from stepweave.serving.jobs import Jobs
from stepweave.serving.keys import ApiKeys
from stepweave.serving.names import told_name
from stepweave.serving.request import ActiveRequest
from stepweave.serving.status import DRAINING_RETRY_SECONDS, Stage, Status
from stepweave.telemetry.metrics import Metrics
from stepweave.threads import DaemonExecutor, on_thread

if TYPE_CHECKING:
    from stepweave.engine import StepEngine
    from stepweave.previews.decoder import Previewer
    from stepweave.serving.model import ServedModel
    from stepweave.serving.startup import Loaded, LoadPipeline

logger = logging.getLogger(__name__)

ENCODERS = 2  # threads that encode image files
# after the grace period, until jobs are cancelled, results stored, and the process has ended
ENDING_SECONDS = 30.0
PROGRESS_SECONDS = 5.0  # between two lines of the log about one stage of a start
KEEPING_SECONDS = 5.0  # of these, reserved for storing results once the engine is closed


class Lifecycle:
    """A server's start and shutdown. `load` replaces the loader, to serve a pipeline made in code;
    `on_failure` is called with the reason if the server cannot start, on any thread."""

    def __init__(
        self,
        settings: Settings,
        load: LoadPipeline | None = None,
        on_failure: Callable[[str], None] | None = None,
        policy: Policy = srpt,
    ) -> None:
        self.settings = settings
        self._load_pipeline = load
        self._policy = policy
        self._on_failure = on_failure
        self.status = Status("starting", 0.0)
        self._told = -math.inf  # when the last line of the log about the start was written
        self.created = int(time.time())
        self.model: ServedModel | None = None
        self.device = ""
        self.dtype = ""
        self.engine: StepEngine | None = None
        self.previewer: Previewer | None = None
        self.keys = ApiKeys(settings.api_keys, settings.api_keys_file)
        self.jobs: Jobs | None = None  # once started
        self.leaving = Drain(settings.drain_notice, settings.grace, self._end)
        self.drain_token: DrainToken | None = None  # once started
        self.active: dict[str, ActiveRequest] = {}  # accepted and not yet done, by id
        self._admission: Admission | None = None
        self.metrics = Metrics(
            model_name=told_name(settings),
            clients=self.keys.names,
            refused=lambda: self._admission.refused if self._admission else {},
            in_flight=lambda: self._admission.in_flight if self._admission else 0,
            waiting=lambda: self.engine.waiting if self.engine else 0,
            engine=lambda: self.engine.stats() if self.engine else None,
            ready=lambda: self.health().ready,
            stores=lambda: self.jobs.stores() if self.jobs else {},
            free_bytes=lambda: self.jobs.free_bytes() if self.jobs else math.nan,
            loras=lambda: self.model.loras.stats() if self.model and self.model.loras else None,
        )
        self._encoders = DaemonExecutor(ENCODERS, "stepweave-encode")
        # a separate thread, so that previews do not delay images
        self._drawers = DaemonExecutor(1, "stepweave-preview", self._use_device)
        self._closers = DaemonExecutor(2, "stepweave-close")
        self.decoders = Decoders(settings.max_input_pixels)
        self._has_images = False  # whether the model has been seen to make images
        self._loader = threading.Thread(target=self._load, name="stepweave-load", daemon=True)

    def start(self) -> None:
        """Start loading in the background; `status` has the progress."""
        self.metrics.load_times.enter("starting")
        for message in removed_settings():
            logger.warning("%s", message)
        try:
            self.jobs = Jobs.open(self.settings, self.active)
            self.drain_token = DrainToken(self.jobs.directory)
        except StepweaveError as error:
            logger.error("%s", error.message)
            # without the path
            self._fail(f"STEPWEAVE_STATE_DIR: {error.message.rpartition(': ')[2]}")
        except Exception as error:  # of the database, or the disk
            logger.exception("STEPWEAVE_STATE_DIR could not be opened")
            self._fail(f"STEPWEAVE_STATE_DIR: {reason_of(error)}")
        else:
            logger.info("the token of POST /drain is in %s", self.drain_token.path)
            self._loader.start()

    def drain(self) -> None:
        """Announce a drain; new work is still accepted for `STEPWEAVE_DRAIN_NOTICE` seconds."""
        if not self.leaving.announced:
            logger.info("draining: new requests are refused in %g s", self.settings.drain_notice)
        self.leaving.announce()

    def take_back_drain(self) -> None:
        """Cancel a drain. Raises ConflictError once the process is terminating."""
        if self.leaving.announced:
            self.leaving.take_back()
            logger.info("the drain was cancelled: new requests are accepted again")

    def terminate(self) -> None:
        """Refuse new work for good; accepted work has the grace period to finish."""
        if self.leaving.terminated:
            return
        self.leaving.terminate()
        assert self.leaving.ending_at is not None
        seconds = max(0.0, self.leaving.ending_at - time.monotonic())
        logger.info(
            "terminating: new requests are refused; %d in flight have %.0f s to finish",
            len(self.active),
            seconds,
        )
        # the shutdown hook waits for connections, and these wait for answers
        asyncio.get_running_loop().call_later(
            seconds + ENDING_SECONDS - KEEPING_SECONDS, self._cut_off
        )

    def _cut_off(self) -> None:
        """Fail requests that hang."""
        if self.active and self.engine is not None:
            self._closers.submit(self.engine.close, 0.0)

    def _end(self) -> None:
        message = "The server shut down before the image was done; retry the request."
        for active in list(self.active.values()):
            active.cancel(
                UnavailableError(message, code="draining", retry_after=DRAINING_RETRY_SECONDS)
            )

    async def shut_down(self) -> None:
        """Terminate, wait for accepted work, and close, `ENDING_SECONDS` after the grace period."""
        self.terminate()
        ending = time.monotonic() if self.leaving.ending_at is None else self.leaving.ending_at
        if await self._wait(ending):
            self._end()
            until = max(ending + ENDING_SECONDS, time.monotonic() + KEEPING_SECONDS)
        else:
            until = time.monotonic() + ENDING_SECONDS
        await self._wait(until - KEEPING_SECONDS)
        if self.engine is not None:
            left = max(0.0, until - KEEPING_SECONDS - time.monotonic())
            await on_thread(self._closers, self.engine.close, left)
        await self._wait(until - KEEPING_SECONDS / 2)
        closing = asyncio.ensure_future(on_thread(self._closers, self.close, until))
        if not (await asyncio.wait({closing}, timeout=max(0.0, until - time.monotonic())))[0]:
            logger.error(
                "shutdown: the stores of jobs and images were not closed in time; the process "
                "ends anyway"
            )
        else:
            closing.result()

    async def _wait(self, until: float) -> bool:
        """Wait for all work until a time of the monotonic clock; returns whether some is left."""
        while left := [request.ended() for request in self.active.values()] + (
            self.jobs.keeping() if self.jobs else []
        ):
            if (await asyncio.wait(left, timeout=max(0.0, until - time.monotonic())))[1]:
                return True
        return False

    def close(self, until: float | None = None) -> None:
        """Close the engine and the stores. Jobs fail at their next step; threads that hang are left
        at `until`, a time of the monotonic clock (default: `ENDING_SECONDS` from now)."""
        until = time.monotonic() + ENDING_SECONDS if until is None else until

        def left() -> float:
            return max(0.0, until - time.monotonic())

        self.status = Status("closed", 0.0, "the server has shut down")
        self.decoders.close()
        if self.engine is not None:
            self.engine.close(left())
        if not self._drawers.end(left(), cancel_futures=True) or not self._encoders.end(left()):
            logger.error("shutdown: images or previews are still being encoded; they are lost")
        if self.jobs is not None:
            self.jobs.close()
        heap.take_back()

    def _load(self) -> None:
        from stepweave.serving.startup import load

        began = time.monotonic()
        try:
            assert self.jobs is not None
            self.jobs.resume()
            with self.metrics.load_times.timed():
                loaded = load(
                    self.settings, self._load_pipeline, self.metrics.step, self._enter, self._policy
                )
        except StepweaveError as error:
            self._fail(error.message)
        except BaseException as error:
            logger.exception("stage %s of the start failed", self.status.stage)
            reason = reason_of(error, self.settings.local_folder())
            self._fail(f"{self.status.stage} failed: {reason}")
        else:
            self._serve(loaded)
            logger.info("ready after %.1f s", time.monotonic() - began)

    def _serve(self, loaded: Loaded) -> None:
        settings, model = self.settings, loaded.model
        served_at_once = settings.threads if settings.batching == "threads" else 1
        self._admission = Admission(
            served_at_once + settings.max_queue, loaded.engine.drain, max_wait=settings.max_wait
        )
        self.model, self.previewer = model, loaded.previewer
        self._has_images = loaded.warmed_up
        self.device, self.dtype = loaded.device, loaded.dtype
        self.metrics.loaded(model.pipeline_class, settings.revision, loaded.device, loaded.dtype)
        self.engine = loaded.engine
        try:
            message = f"{model.id} on {loaded.device}, {loaded.threads} CPU threads"
            self._enter("ready", 1.0, message)
        except LoadError:  # closed meanwhile
            loaded.engine.close()
            heap.take_back()

    def _use_device(self) -> None:
        """Make the model's device the calling thread's."""
        import torch

        from stepweave.compat.torch_state import use_device

        use_device(torch.device(self.device or "cpu"))

    def _enter(self, stage: Stage, progress: float, message: str) -> None:
        if self.status.stage == "closed" or self.leaving.terminated:
            raise LoadError("the server was shut down while it was loading")
        new = stage != self.status.stage
        self.status = Status(stage, progress, message)
        if new:
            self.metrics.load_times.enter(stage)
        now = time.monotonic()
        if new or now - self._told >= PROGRESS_SECONDS:
            self._told = now
            logger.info("%s: %s", stage, message)

    def _fail(self, message: str) -> None:
        self.metrics.load_times.enter(None)
        if self.status.stage != "closed" and not self.leaving.terminated:
            action = "serve" if self.status.ready else "start"
            logger.error("the server cannot %s: %s", action, message)
            self.status = Status("failed", 0.0, message)
            if self._on_failure is not None:
                self._on_failure(message)

    def health(self) -> Status:
        """The status, `stuck` or `failed` if engine or device are. Never waits for the device."""
        status, engine = self.status, self.engine
        if engine is not None and status.ready:
            if engine.failure is not None:
                return Status("failed", 0.0, f"the device has failed: {engine.failure}")
            limit = self.settings.stuck_seconds
            for part, seconds in (
                ("the engine has made", engine.stalled()),
                ("the image encoders have made", self._encoders.stalled()),
            ):
                if seconds > limit:
                    message = f"{part} no progress for {seconds:.0f} s; the limit is {limit:g} s"
                    return Status("stuck", 0.0, message)
        if self.leaving.announced and status.stage not in ("failed", "closed"):
            message = f"{len(self.active)} requests in flight"
            if self.leaving.overdue:
                message += "; the grace period is over, and the process got no signal to end"
            return Status("draining", 1.0, message)
        return status

    def alive(self) -> bool:
        """Whether the kubelet should keep the process: it is ready, may become ready, or finishes
        accepted work.

        A failed load or a stuck engine does not recover, and a drained server that got no signal
        accepts no more work: these should be restarted.
        """
        return self.health().stage not in ("failed", "stuck") and not self.leaving.overdue

    def unavailable(self) -> UnavailableError:
        """The error to answer while the server is not ready."""
        status, engine = self.health(), self.engine
        if status.stage == "failed" and engine is not None and engine.failure is not None:
            return DeviceFailedError(engine.failure)
        return status.unavailable()
