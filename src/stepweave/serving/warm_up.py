"""What a model runs before it serves: first images, the proofs that let jobs share forwards, and
trials of what it offers."""

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
SCHEDULER_STEPS = 5  # with which each scheduler is run, if it runs with them
FEW = 4  # jobs of a kind, of which two have as many steps: as many as a certificate needs
DENSE = "7\u753b"  # characters of which each is a token, or several
# after which no more is tried, and what is left is offered as the configuration tells
TRIAL_SECONDS = 120.0
# after which no more is run for the cost model's sake alone: it goes on to learn from requests
PROFILE_SECONDS = 10.0


def warm_up(model: ServedModel, engine: StepEngine) -> None:
    """Run short jobs, so that the first requests do not pay for first calls and find certified what
    the engine may merge.

    One of the native size alone; then, together, as many as fill the largest shared step, a few of
    half its sides, and a few edits of each kind; then jobs at the ends of what the model seems to
    take, one at a time; at last growing numbers for the cost model, so that what steps cost is
    known. The jobs differ in prompt, seed, steps and guidance, as requests do. What is certified is
    decided by counts of jobs, however slow the machine is: only the last part ends after some time.

    What fails of edits and trials is not offered. Raises LoadError if no image of the native size
    is one to serve.
    """
    WarmUp(model, engine).run()


class WarmUp:
    """One model that warms up on one engine."""

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
            engine.forget_encodings()  # so that text encoders, too, run the job again
            enter_stage("certifying")
            together = self.run_together(native, most)
            check_images(
                alone,
                together,
                _dtype(self._model.pipeline),
                lambda: self.run_together(native, FEW),
            )
            if half is not None:
                try:
                    self.run_together(half, few)
                except (RequestError, NonFiniteError):
                    # the engine was closed; or no request of this size would succeed
                    raise
                except Exception as error:
                    logger.info(
                        "images of %dx%d fail (%s); what they cost is not known",
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
        """Run edits of each kind; what fails is not offered."""
        for name, mask in (("image_to_image", None), ("inpaint", _mask(self._native))):
            pipeline = getattr(self._model, name)
            if pipeline is None:
                continue
            try:
                self.run_together(self._native, count, edits=True, mask=mask)
            except (RequestError, NonFiniteError):
                raise
            except Exception as error:
                logger.warning("%s fails (%s); it is not offered", type(pipeline).__name__, error)
                setattr(self._model, name, None)

    def trials(self) -> None:
        """Try the ends of what is offered, and leave out what fails. Raises LoadError if the native
        size does."""
        model, began = self._model, time.monotonic()
        verbosity = (
            diffusers.utils.logging.get_verbosity(),
            transformers.utils.logging.get_verbosity(),
        )
        diffusers.utils.logging.set_verbosity_error()  # of prompts that are cut
        transformers.utils.logging.set_verbosity_error()
        try:
            for sources in self._kinds_of_sources():
                name = type(model.pipeline_for(sources)).__name__
                attempt = functools.partial(self._attempt, sources=sources)
                like = None if sources is None else model.limits
                limits = narrowed(
                    model.limits_for(sources),
                    self._native,
                    model.default_guidance,
                    attempt,
                    name,
                    like,
                )
                model.keep_to(sources, limits)
            self._schedulers()
        finally:
            diffusers.utils.logging.set_verbosity(verbosity[0])
            transformers.utils.logging.set_verbosity(verbosity[1])
        logger.info(
            "self-check: tried the limits of sizes, steps, guidance, prompts and numbers of images "
            "(%.1f s)",
            time.monotonic() - began,
        )

    def _schedulers(self) -> None:
        """Run the model with each scheduler that rehearses well: some pipelines call them in a way
        of their own.

        What fails is not offered. A single step is tried by itself: where there is one, some take
        another scheduler's results.
        """
        model = self._model
        sizes = model.limits.sizes
        small = self._native if sizes.only is not None else (sizes.min_side, sizes.min_side)
        for name in (None, *(name for name in model.schedulers if name != model.scheduler)):
            for steps in (1,) if name is None else (SCHEDULER_STEPS, 1):
                parameters = replace(
                    self._parameters(small), num_inference_steps=steps, scheduler=name
                )
                if (
                    steps == model.default_steps
                    or not model.runs(parameters)
                    or time.monotonic() > self._until
                ):
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
        """Run one job. Raises LoadError if the device fails at it, and RequestError if the engine
        was closed.

        For want of memory, or of time, what is tried is taken to work.
        """
        if time.monotonic() > self._until:
            return None
        parameters = self._parameters(size, sources)
        if characters is not None:
            parameters = replace(
                parameters, prompt=(parameters.prompt + DENSE * characters)[:characters]
            )
        if guidance is not None:
            parameters = replace(parameters, guidance_scale=guidance)
        return self._run(replace(parameters, n=images))

    def _parameters(
        self,
        size: Size,
        sources: Sources | None = None,
        index: int = 0,
        prompt: str = "to warm up",
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
        what = (
            f"{count} of {size[0]}x{size[1]}, guidance {parameters.guidance_scale}, "
            f"{len(parameters.prompt)} characters"
        )
        try:
            made = self._images(self._engine.submit(**self._model.call(parameters)).result())
            sizes = [image.size for image in made]
        except DeviceFailedError as error:
            raise LoadError(
                f"the device failed when what requests may ask for was tried ({what}): "
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
            if len(made) != count:
                fault = Fault(f"{len(made)} images in place of {count}")
            else:
                wrong = next((made_size for made_size in sizes if made_size != size), None)
                if wrong is None:
                    return None
                fault = Fault("{}x{} in place of it".format(*wrong), wrong)
        logger.info("tried, and failed: %s: %s", what, fault.reason)
        return fault

    def _profile(self, half: Size | None, most: int) -> None:
        """Show the cost model what steps of growing numbers of rows take.

        Some of the jobs end sooner than others, so that what a step of half as many takes is seen
        as well.
        """
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
        """Run jobs that start in one turn of the engine; the first image of each, None if a safety
        checker flags it."""
        jobs, start = [], _Start()
        try:
            for i in range(count):
                sources = Sources(_image(size, 90 * i), mask) if edits else None
                # prompts differ in their first token: encoders cut long ones
                parameters = self._parameters(size, sources, i, f"{i}, to warm up")
                jobs.append(
                    self._engine.submit(
                        **self._model.call(parameters), observer=None if i else start
                    )
                )
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
    """The observer of a job that holds up the engine where it starts, until others are there."""

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
    """What the pipeline computes in; float32 for one that is not of diffusers."""
    dtype = getattr(pipeline, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32
