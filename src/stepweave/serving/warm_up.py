"""Warm-up: the model's first images, certificates for shared forwards, and trials of its limits."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image

from stepweave.engine import Job, Latents, StepEngine
from stepweave.errors import (
    DeviceFailedError,
    LoadError,
    NonFiniteError,
    OutOfMemoryError,
    RequestError,
)
from stepweave.images.outputs import images_of, outputs_of
from stepweave.loading.first_images import check_images
from stepweave.loading.trials import Fault, Size, narrowed
from stepweave.parameters import Parameters, Sources
from stepweave.planning.workload import takes
from stepweave.reasons import reason_of
from stepweave.serving.model import ServedModel
from stepweave.telemetry.stages import enter_stage

logger = logging.getLogger(__name__)

STEPS = 2
STRENGTH = 0.5
SCHEDULER_STEPS = 5  # of the trial of each scheduler that runs with them
FEW = 4  # jobs, two of which have the same number of steps: enough for a certificate
DENSE = "7\u753b"  # characters of at least one token each
# after which trials end; limits not tried are those of the model's configuration
TRIAL_SECONDS = 120.0
PROFILE_SECONDS = 10.0  # after which the cost model is left to learn from requests


def warm_up(model: ServedModel, engine: StepEngine) -> None:
    """Run short jobs, so that the first requests are fast and find their calls certified.

    First one job of the native size alone; then, together, as many as fill the largest batch, a few
    of half the width and height, and a few edits of each kind; then single jobs at the model's
    limits; then growing numbers of jobs for the cost model. They differ in prompt, seed, steps and
    guidance, as requests do. Certification does not depend on the machine's speed: only trials and
    the last part have time limits.

    Edits and values that fail are not offered. Raises LoadError if images of the native size fail.
    """
    WarmUp(model, engine).run()


class WarmUp:
    """The warm-up of one model on one engine."""

    def __init__(self, model: ServedModel, engine: StepEngine) -> None:
        self._model = model
        self._engine = engine
        self._native = model.width, model.height
        self._until = time.monotonic() + TRIAL_SECONDS

    def run(self) -> None:
        settings, engine, native = self._model.settings, self._engine, self._native
        most = 1 if engine.mode in ("off", "threads") else max(FEW, -(-settings.max_rows // 2))
        few, half = min(most, FEW), self._model.half_size()
        with engine.in_lockstep():
            [alone] = self.run_together(native, 1)
            engine.forget_encodings()  # so that text encoders run again, too
            enter_stage("certifying")
            together = self.run_together(native, most)
            dtype = _dtype(self._model.pipeline)
            check_images(alone, together, dtype, lambda: self.run_together(native, FEW))
            if half is not None:
                try:
                    self.run_together(half, few)
                except (RequestError, NonFiniteError):
                    raise  # the engine was closed, or no request of this size can succeed
                except Exception as error:
                    logger.info(
                        "warm-up: images of %dx%d fail (%s); their cost is not measured",
                        *half,
                        type(error).__name__,
                    )
                    half = None
            self._edits(few)
            self._until = time.monotonic() + TRIAL_SECONDS
            enter_stage("trying_limits")
            self.trials()
        enter_stage("profiling")
        self._profile(half, most)

    def _edits(self, count: int) -> None:
        """Run edits of each kind, and stop offering those that fail."""
        for name, mask in (("image_to_image", None), ("inpaint", _mask(self._native))):
            pipeline = getattr(self._model, name)
            if pipeline is None:
                continue
            try:
                self.run_together(self._native, count, edits=True, mask=mask)
            except (RequestError, NonFiniteError):
                raise
            except Exception as error:
                logger.warning(
                    "warm-up: %s fails (%s); it is not offered", type(pipeline).__name__, error
                )
                setattr(self._model, name, None)

    def trials(self) -> None:
        """Try the limits, and narrow those that fail. Raises LoadError if the native size fails."""
        model, began = self._model, time.monotonic()
        logs = (diffusers.utils.logging, transformers.utils.logging)
        verbosities = [log.get_verbosity() for log in logs]
        for log in logs:
            log.set_verbosity_error()  # no warnings about truncated prompts
        try:
            for sources in self._kinds_of_sources():
                name = type(model.pipeline_for(sources)).__name__
                attempt = functools.partial(self._attempt, sources=sources)
                like = None if sources is None else model.limits
                limits, guidance = model.limits_for(sources), model.default_guidance
                limits = narrowed(limits, self._native, guidance, attempt, name, like)
                model.keep_to(sources, limits)
            self._schedulers()
        finally:
            for log, verbosity in zip(logs, verbosities, strict=True):
                log.set_verbosity(verbosity)
        logger.info(
            "warm-up: tried the limits of sizes, steps, guidance, prompts and images per request "
            "(%.1f s)",
            time.monotonic() - began,
        )

    def _schedulers(self) -> None:
        """Run the model with each scheduler that passed its rehearsal, and stop offering those that
        fail: pipelines may call them differently. Some only fail with a single step."""
        model = self._model
        sizes = model.limits.sizes
        small = self._native if sizes.only is not None else (sizes.min_side, sizes.min_side)
        usual = self._parameters(small)
        for name in (None, *(name for name in model.schedulers if name != model.scheduler)):
            for steps in (1,) if name is None else (SCHEDULER_STEPS, 1):
                parameters = replace(usual, num_inference_steps=steps, scheduler=name)
                runs = steps != model.default_steps and model.runs(parameters)
                if not runs or time.monotonic() > self._until:
                    continue
                fault = self._run(parameters)
                if fault is None or fault.made is not None:
                    continue
                if steps == 1:
                    model.refuse_steps(name, steps)
                elif name is not None:
                    model.drop_scheduler(name)
                    break

    def _kinds_of_sources(self) -> Iterator[Sources | None]:
        yield None
        if self._model.image_to_image is not None:
            yield Sources(_image(self._native))
        if self._model.inpaint is not None:
            yield Sources(_image(self._native), _mask(self._native))

    def _attempt(
        self,
        size: Size,
        *,
        sources: Sources | None,
        images: int = 1,
        guidance: float | None = None,
        characters: int | None = None,
    ) -> Fault | None:
        """Run one job; returns what is wrong with it, None also if time or memory are too little to
        tell. Raises LoadError if the device fails, and RequestError if the engine was closed."""
        if time.monotonic() > self._until:
            return None
        parameters = self._parameters(size, sources)
        if characters is not None:
            prompt = (parameters.prompt + DENSE * characters)[:characters]
            parameters = replace(parameters, prompt=prompt)
        if guidance is not None:
            parameters = replace(parameters, guidance_scale=guidance)
        return self._run(replace(parameters, n=images))

    def _parameters(
        self, size: Size, sources: Sources | None = None, index: int = 0, prompt: str = "to warm up"
    ) -> Parameters:
        guidance = self._model.default_guidance
        if guidance is not None and index % 4 == 3:
            guidance = guidance * 1.5
        strong = sources is not None and takes(self._model.pipeline_for(sources), "strength")
        return Parameters(
            prompt=prompt,
            negative_prompt=None,
            width=size[0],
            height=size[1],
            n=1,
            seed=index,
            num_inference_steps=STEPS + index % 3 if sources is None else 2 * STEPS,
            guidance_scale=guidance,
            strength=STRENGTH if strong else None,
            sources=sources,
        )

    def _run(self, parameters: Parameters) -> Fault | None:
        size, count = (parameters.width, parameters.height), parameters.n
        trial = (
            f"{count} images of {size[0]}x{size[1]}, guidance {parameters.guidance_scale}, "
            f"{len(parameters.prompt)} characters"
        )
        try:
            images = self._images(self._engine.submit(**self._model.call(parameters)).result())
            sizes = [image.size for image in images]
        except DeviceFailedError as error:
            raise LoadError(
                f"the device failed in a trial of the limits ({trial}): "
                f"{error.reason}; lower STEPWEAVE_MAX_PIXELS or STEPWEAVE_MAX_PROMPT_CHARACTERS, "
                "or set STEPWEAVE_WARMUP=false"
            ) from error
        except RequestError:
            raise
        except OutOfMemoryError:
            return None
        except Exception as error:
            fault = Fault(reason_of(error))
        else:
            if len(images) != count:
                fault = Fault(f"{len(images)} images instead of {count}")
            else:
                wrong = next((made for made in sizes if made != size), None)
                if wrong is None:
                    return None
                fault = Fault("{}x{} instead".format(*wrong), wrong)
        logger.info("warm-up: a trial failed: %s: %s", trial, fault.reason)
        return fault

    def _profile(self, half: Size | None, most: int) -> None:
        """Run growing numbers of jobs for the cost model; some end early, for smaller batches."""
        began = time.monotonic()
        counts = sorted({*(FEW**i for i in range(most.bit_length()) if FEW**i <= most), most})
        for size, count in [(self._native, count) for count in counts] + [
            (half, count) for count in counts[:2]
        ]:
            if size is not None and time.monotonic() - began <= PROFILE_SECONDS:
                self.run_together(size, count)

    def run_together(
        self, size: Size, count: int, *, edits: bool = False, mask: Image.Image | None = None
    ) -> list[Any]:
        """Run jobs that start in the same step; returns each one's first image, None if flagged."""
        jobs, start = [], _Start()
        try:
            for i in range(count):
                sources = Sources(_image(size, 90 * i), mask) if edits else None
                # prompts differ in their first token: encoders cut long ones
                parameters = self._parameters(size, sources, i, f"{i}, to warm up")
                observer = None if i else start
                jobs.append(self._engine.submit(**self._model.call(parameters), observer=observer))
        finally:
            start.all_are_there.set()
        outputs = [job.result() for job in jobs]
        return [
            None if any(outputs_of(output, 1).flagged) else self._images(output)[0]
            for output in outputs
        ]

    def _images(self, output: Any) -> list[Image.Image]:
        return images_of(output, self._model.pipeline_class)


class _Start:
    """An observer that blocks the engine at its job's start until the other jobs are submitted."""

    def __init__(self) -> None:
        self.all_are_there = threading.Event()

    def progressed(self, job: Job) -> None:
        self.all_are_there.wait()

    def wants(self, step: int, total: int) -> bool:
        return False

    def denoised(self, job: Job, latents: Latents) -> None:
        pass


def _image(size: Size, angle: int = 0) -> Image.Image:
    return Image.linear_gradient("L").rotate(angle).resize(size).convert("RGB")


def _mask(size: Size) -> Image.Image:
    return Image.linear_gradient("L").resize(size)


def _dtype(pipeline: Any) -> torch.dtype:
    """The pipeline's data type; float32 for pipelines that are not diffusers'."""
    dtype = getattr(pipeline, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32
