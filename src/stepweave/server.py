"""The server behind every HTTP surface: loads the model in the background, then takes generations."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stepweave.config import Settings
from stepweave.errors import (
    DeadlineExceeded,
    InvalidRequest,
    LoadError,
    NotFound,
    OutOfMemory,
    RequestError,
    StepweaveError,
    Unavailable,
    shown,
)
from stepweave.generation import Generation, Timings
from stepweave.images.encode import MAX_SIDES, OutputFormat, encode
from stepweave.scheduling.admission import Admission
from stepweave.telemetry.metrics import Metrics

if TYPE_CHECKING:
    import torch

    from stepweave.api.schemas import ImageRequest
    from stepweave.engine import Job, StepEngine
    from stepweave.loading.preset import Preset
    from stepweave.model import ServedModel

logger = logging.getLogger(__name__)

ENCODERS = 2  # threads that encode picture files
LOADING_RETRY_SECONDS = 5

LoadPipeline = Callable[[Settings, "torch.device", "torch.dtype"], "tuple[Any, Preset]"]


@dataclass(frozen=True)
class Status:
    """Where the server stands. `progress` is the share of the way to `ready`, 0 to 1."""

    stage: str  # starting, importing, loading, warming_up, ready, closed or failed
    progress: float
    message: str = ""


@dataclass(frozen=True)
class PictureFile:
    """One encoded picture and the parameters that made it."""

    data: bytes
    seed: int
    values: dict[str, Any]


class Server:
    """One model, one engine, one set of metrics. `load` may be replaced, to serve a pipeline that is made in code."""

    def __init__(self, settings: Settings, load: LoadPipeline | None = None) -> None:
        self.settings = settings
        self._load_pipeline = load
        self.status = Status("starting", 0.0)
        self.created = int(time.time())
        self.model: ServedModel | None = None
        self.device = ""
        self.dtype = ""
        self.engine: StepEngine | None = None
        self._admission: Admission | None = None
        self.metrics = Metrics(
            refused=lambda: self._admission.refused if self._admission else {},
            in_flight=lambda: self._admission.in_flight if self._admission else 0,
            waiting=lambda: self.engine.waiting if self.engine else 0,
            engine=lambda: self.engine.stats() if self.engine else None,
        )
        self._encoders = ThreadPoolExecutor(ENCODERS, thread_name_prefix="stepweave-encode")
        self._loader = threading.Thread(target=self._load, name="stepweave-load", daemon=True)

    def start(self) -> None:
        """Begin to load in the background; `status` tells how far it is."""
        self._loader.start()

    def close(self) -> None:
        """End the engine. What is still running ends at its next step with an error."""
        self.status = Status("closed", 0.0, "the server has shut down")
        if self.engine is not None:
            self.engine.close()
        self._encoders.shutdown(wait=True)

    def _load(self) -> None:
        began = time.monotonic()
        try:
            self._enter("importing", 0.05, "importing torch and diffusers")
            from stepweave.engine import StepEngine
            from stepweave.loading.device import choose_device, choose_dtype, set_cpu_threads
            from stepweave.loading.loader import load_pipeline
            from stepweave.loading.switches import apply_switches, check_switches
            from stepweave.model import ServedModel

            device = choose_device(self.settings)
            dtype = choose_dtype(self.settings, device)
            check_switches(self.settings, device)
            threads = set_cpu_threads(self.settings)
            self._enter("loading", 0.4, f"loading {self.settings.model} onto {device} in {dtype}")
            pipeline, preset = (self._load_pipeline or load_pipeline)(self.settings, device, dtype)
            apply_switches(pipeline, self.settings, device)
            model = ServedModel(pipeline, preset, self.settings)
            engine = self._make_engine(StepEngine, pipeline)
            try:
                if self.settings.warmup:
                    self._enter("warming_up", 0.8, f"first pictures of {model.width}x{model.height}, and certificates")
                    model.warm_up(engine)
            except BaseException:
                engine.close()
                raise
            self.device, self.dtype = str(device), str(dtype).removeprefix("torch.")
            self.metrics.vram.device = self.device
            self.metrics.model.info(
                {
                    "model": model.id,
                    "pipeline": model.pipeline_class,
                    "revision": self.settings.revision or "",
                    "device": self.device,
                    "dtype": self.dtype,
                }
            )
            self.model = model
        except LoadError as error:
            self._fail(error.message)
        except Exception as error:
            logger.exception("starting failed")
            self._fail(f"starting failed with {type(error).__name__}; the log has the details")
        else:
            served_at_once = self.settings.threads if self.settings.batching == "threads" else 1
            self._admission = Admission(
                served_at_once + self.settings.max_queue,
                engine.drain,
                max_wait=self.settings.max_wait,
            )
            self.engine = engine
            try:
                self._enter("ready", 1.0, f"{model.id} on {device}, {threads} CPU threads")
                logger.info("ready after %.1f s", time.monotonic() - began)
            except LoadError:  # closed meanwhile
                engine.close()

    def _make_engine(self, kind: type[StepEngine], pipeline: Any) -> StepEngine:
        settings = self.settings
        return kind(
            pipeline,
            settings.batching,
            settings.max_rows,
            max_decode_rows=settings.max_decode_rows,
            max_jobs=settings.max_jobs,
            threads=settings.threads,
            cache_bytes=settings.encoder_cache_bytes,
            policy=settings.policy,
            on_step=self.metrics.step,
        )

    def _enter(self, stage: str, progress: float, message: str) -> None:
        if self.status.stage == "closed":
            raise LoadError("the server was closed while it was loading")
        self.status = Status(stage, progress, message)
        logger.info("%s: %s", stage, message)

    def _fail(self, message: str) -> None:
        if self.status.stage != "closed":
            self.status = Status("failed", 0.0, message)
            logger.error("the server cannot start: %s", message)

    def ready(self) -> tuple[ServedModel, StepEngine]:
        """The model and its engine. Raises Unavailable while there are none."""
        if self.model is None or self.engine is None or self.status.stage != "ready":
            raise self.unavailable()
        return self.model, self.engine

    def unavailable(self) -> Unavailable:
        """What to answer while the server is not ready."""
        code = {"failed": "load_failed", "closed": "draining"}.get(self.status.stage, "loading")
        return Unavailable(
            f"The server is not ready: {self.status.stage}, {self.status.message or 'please wait'}.",
            code=code,
            retry_after=LOADING_RETRY_SECONDS,
        )

    async def generate(
        self, request: ImageRequest, *, n: int = 1, model: str | None = None
    ) -> tuple[Generation, list[PictureFile]]:
        """Serve one generation of n pictures. Cancelling the awaiting task cancels the job.

        Raises NotFound if `model` is given and not the one served, Refused if admission does not let it in, and what
        `ServedModel.resolve` and the job raise.
        """
        began = time.monotonic()
        served, engine = self.ready()
        if model is not None and model != served.id:
            raise NotFound(
                f"There is no model {shown(model)}; this server has {served.id!r}.",
                code="model_not_found",
                param="model",
            )
        parameters = served.resolve(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            size=request.size,
            n=n,
            seed=request.seed,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            reproducible=request.reproducible,
        )
        longest = max(parameters.width, parameters.height)
        if longest > MAX_SIDES[request.output_format]:
            raise InvalidRequest(
                f"size is {shown(request.size)}; {request.output_format} takes {MAX_SIDES[request.output_format]} a side.",
                param="size",
            )
        assert self._admission is not None
        call = served.call(parameters)
        deadline = None if request.deadline_ms is None else request.deadline_ms / 1000
        options: dict[str, Any] = {"priority": request.priority, "reproducible": parameters.reproducible}
        expected = self._admission.enter(
            request.model_dump_json(), lambda: engine.outlook(**call, **options, deadline=deadline), deadline
        )
        due = None if expected is None else time.monotonic() + expected.finish
        try:
            left = None if deadline is None else max(1e-3, deadline - (time.monotonic() - began))
            job = engine.submit(**call, **options, deadline=left)
            try:
                output = await job
            except DeadlineExceeded:
                self.metrics.deadline_missed.inc()
                raise
            except (RequestError, OutOfMemory):
                raise
            except Exception as error:
                logger.exception("a job failed: %r, %s", job, _without_prompts(parameters.of_image(0)))
                failure = f"The generation failed ({type(error).__name__})."
                raise StepweaveError(failure, code="generation_failed") from error
            self.metrics.generated(job, due)
            generation = Generation(parameters, output.images, timings_of(job), job.warnings)
            files = await self._encode(generation, request.output_format, served.id)
        finally:
            self._admission.leave()
        generation.timings.total = time.monotonic() - began
        self.metrics.request_seconds.observe(generation.timings.total)
        return generation, files

    async def _encode(self, generation: Generation, output_format: OutputFormat, model: str) -> list[PictureFile]:
        began = time.monotonic()
        loop = asyncio.get_running_loop()
        values = [generation.parameters.of_image(i) for i in range(len(generation.images))]
        encoded = await asyncio.gather(
            *(
                loop.run_in_executor(self._encoders, encode, image, output_format, value, model)
                for image, value in zip(generation.images, values, strict=True)
            )
        )
        generation.timings.encode_image = time.monotonic() - began
        return [PictureFile(data, value["seed"], value) for data, value in zip(encoded, values, strict=True)]


def timings_of(job: Job) -> Timings:
    """Where a finished job's seconds went."""
    assert job.started is not None and job.finished is not None
    begun = job.begun or job.started
    opened = max(job.opened or begun, begun)  # a remembered prompt needs no forward before the first step
    stepped = job.stepped or opened
    return Timings(
        queued=begun - job.accepted,
        encode=opened - begun,
        denoise=stepped - opened,
        decode=job.finished - stepped,
    )


def _without_prompts(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if "prompt" not in name}


def as_stepweave_error(error: Exception, request_id: str) -> StepweaveError:
    """The error to answer with: itself if it is ours, else a 500 that names only the request's id, which the log has too."""
    if isinstance(error, StepweaveError) and error.status != 500:
        return error
    logger.error("request %s failed", request_id, exc_info=error)
    message = error.message if isinstance(error, StepweaveError) else "Internal error."
    message = f"{message} Request id: {request_id}"
    return OutOfMemory(message) if isinstance(error, OutOfMemory) else StepweaveError(message, code="internal_error")
