"""Warm-up: the model's first images, certificates for shared forwards, and trials of its limits."""

from __future__ import annotations

import functools
import logging
import threading
import time
from dataclasses import replace
from typing import Any, get_args, get_origin

import diffusers
import transformers
from PIL import Image

from stepweave.adapters.control_pipelines import guides_of, modes_of
from stepweave.calls import CONTROL_IMAGE, Argument, described
from stepweave.config.components import IP_ADAPTER
from stepweave.engine import Job, Latents, StepEngine
from stepweave.errors import (
    DeviceFailedError,
    LoadError,
    NonFiniteError,
    OutOfMemoryError,
    RequestError,
)
from stepweave.images.outputs import images_each, images_of, outputs_of
from stepweave.loading.first_images import agree, check_images
from stepweave.loading.trials import Fault, Limits, Size, narrowed
from stepweave.parameters import Parameters, Sources
from stepweave.planning.workload import takes
from stepweave.reasons import reason_of, refusal_of
from stepweave.serving.kinds import (
    INPAINTING,
    IP_ADAPTER_IMAGE,
    REFINER_START,
    TEXT_TO_IMAGE,
    Kind,
)
from stepweave.serving.model import ServedModel
from stepweave.serving.tensors import dtype_of
from stepweave.telemetry.stages import enter_stage

logger = logging.getLogger(__name__)

STEPS = 2
STRENGTH = 0.5
HALFWAY = 0.5  # where a refiner takes over, so that both models have one of few steps
SCHEDULER_STEPS = 5  # of the trial of each scheduler that runs with them
LEAST_REFERENCE = 64  # pixels a side
FEW = 4  # jobs, two of which have the same number of steps: enough for a certificate
# prompts differ in their first token: encoders cut long ones
PROMPT = "%d, to warm up"
JSON_PROMPT = '{"edit_instruction": "%d, to warm up", "short_description": "to warm up"}'
DENSE = "7\u753b"  # characters of at least one token each
# after which trials end; limits not tried are those of the model's configuration
TRIAL_SECONDS = 120.0
PROFILE_SECONDS = 10.0  # after which the cost model is left to learn from requests


def warm_up(model: ServedModel, engine: StepEngine) -> None:
    """Run short jobs, so that the first requests are fast and find their calls certified.

    First one job of the native size alone; then, together, as many as fill the largest batch, a few
    of half the width and height, and a few requests of each other kind; then single jobs at the
    model's limits; then growing numbers of jobs for the cost model. They differ in prompt, seed,
    steps, guidance and images, as requests do. Images are made up where a pipeline needs them.
    Certification does not depend on the machine's speed: only trials and the last part have time
    limits.

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
        self._prompt, self._steps = PROMPT, STEPS

    def run(self) -> None:
        settings, engine, native = self._model.settings, self._engine, self._native
        most = 1 if engine.mode in ("off", "threads") else max(FEW, -(-settings.max_rows // 2))
        few = min(most, FEW)
        with engine.in_lockstep():
            alone = self._first()
            self._native = native = self._measure(alone)
            half = self._model.half_size()
            engine.forget_encodings()  # so that text encoders run again, too
            enter_stage("certifying")
            together = self.run_together(native, most)
            dtype = dtype_of(self._model.pipeline)
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

    def _first(self) -> Any:
        """The model's first image. A pipeline that refuses a prompt in words is asked in JSON, and
        one that fails with few steps runs as many as it does by default."""
        model = self._model
        ways = [(PROMPT, STEPS), (JSON_PROMPT, STEPS), (PROMPT, model.default_steps)]
        first: Exception | None = None
        for self._prompt, self._steps in ways:
            refused = first is not None and refusal_of(first) is not None
            if first is not None and (self._prompt == JSON_PROMPT) is not refused:
                continue
            try:
                return self.run_together(self._native, 1)[0]
            except (RequestError, DeviceFailedError, OutOfMemoryError, NonFiniteError):
                raise
            except Exception as error:
                first = first or error
        assert first is not None
        raise first

    def _measure(self, image: Any) -> Size:
        """Adopt the size of the model's first image, if it is another one than was asked for: some
        pipelines enlarge the image that they are given, others make one size only."""
        model, native = self._model, self._native
        if not isinstance(image, Image.Image) or image.size == native:
            return native
        call = described(model.pipeline)
        if {"width", "height"} <= call.takes:
            return native  # the trials find out about it
        times, rest = divmod(image.width, native[0])
        if call.scaled is not None and not rest and image.height == times * native[1]:
            model.enlarges(model.kind, times)
        else:
            model.makes_only(image.size)
        return model.width, model.height

    def _edits(self, count: int) -> None:
        """Run requests of each further kind, and stop offering those that fail. Find out of which
        images a pipeline takes several. Raises LoadError for a component of which no kind runs."""
        reasons: dict[Kind, str] = {}
        for kind, pipeline in self._model.pipelines.by_kind().items():
            if kind not in self._model.pipelines.by_kind():
                continue  # its task has failed
            if kind != self._model.kind:
                try:
                    self.run_together(self._native, count, kind)
                except (RequestError, NonFiniteError):
                    raise
                except Exception as error:
                    logger.warning(
                        "warm-up: %s fails (%s); it is not offered", type(pipeline).__name__, error
                    )
                    self._model.drop(kind)
                    reasons[kind] = f"{type(pipeline).__name__} fails: {reason_of(error)}"
                    continue
            self._try_several(kind, pipeline)
            self._try_copies(kind, pipeline)
        for kind, reason in reasons.items():
            if not kind.components:
                continue
            [(field, [name])] = kind.components
            if not self._model.pipelines.tasks_of(field, name):
                raise LoadError(f"the component {name!r} does not work with this model: {reason}")

    def _try_several(self, kind: Kind, pipeline: Any) -> None:
        """Run a job with two images in place of one, where the call's annotation allows a list that
        is not a batch. The pipeline takes several if it makes one image of both."""
        call = described(pipeline)
        sources = self._sources(kind, self._native)
        for name in (name for name, argument in call.images.items() if argument.several):
            given = "image" if name == call.image else name
            if sources is None or name == call.scaled or given not in sources.images:
                continue
            # darker, so that not even their means are equal
            other = _image(sources.images[given][0].size, 90).point(lambda level: level // 3)
            two = (*sources.images[given], other)
            several = replace(sources, images={**sources.images, given: two})
            results = [
                self._made(replace(self._parameters(self._native, kind), sources=one))
                for one in (sources, several)
            ]
            one, both = results
            if one and both and len(both) == 1 and one[0].tobytes() != both[0].tobytes():
                self._model.note_several(pipeline, name)

    def _try_copies(self, kind: Kind, pipeline: Any) -> None:
        """Find out whether a pipeline makes several images of one that is passed once, or once for
        each: image 1 of a job must be that of the next seed. If neither works, it makes one at a
        time."""
        model, parameters = self._model, self._parameters(self._native, kind)
        limits = model.limits_of(kind)
        if kind == (TEXT_TO_IMAGE, ()) or limits.images == 1:
            return
        second = self._made(replace(parameters, seed=parameters.seed + 1))
        usual = model.inputs.copies[kind]
        for copies in (usual, not usual):
            model.inputs.copies[kind] = copies
            both = self._made(replace(parameters, n=2))
            if both and second and len(both) == 2 * len(second):
                if agree(both[len(second)], second[0], dtype_of(pipeline)):
                    return
        logger.warning(
            "%s: images of one request are not those of their seeds; max_images is 1",
            type(pipeline).__name__,
        )
        model.inputs.copies[kind] = usual
        model.keep_to(kind, replace(limits, images=1))

    def _made(self, parameters: Parameters) -> list[Image.Image] | None:
        """The images of a job; None if it fails for its parameters."""
        try:
            output = self._engine.submit(**self._model.call(parameters)).result()
            return self._images(output)
        except (RequestError, DeviceFailedError):
            raise
        except Exception as error:
            logger.info("warm-up: several images in a job fail (%s)", reason_of(error))
            return None

    def trials(self) -> None:
        """Try the limits, and narrow those that fail. Raises LoadError if the native size fails."""
        model, began = self._model, time.monotonic()
        logs = (diffusers.utils.logging, transformers.utils.logging)
        verbosities = [log.get_verbosity() for log in logs]
        for log in logs:
            log.set_verbosity_error()  # no warnings about truncated prompts
        try:
            for kind, pipeline in model.pipelines.by_kind().items():
                if kind.components:  # of the same modules as its task
                    model.keep_to(kind, self._limits_of_task(kind))
                    continue
                attempt = functools.partial(self._attempt, kind=kind)
                like = None if kind == model.kind else model.limits
                limits, guidance = model.limits_of(kind), model.default_guidance
                name = type(pipeline).__name__
                model.keep_to(kind, narrowed(limits, self._native, guidance, attempt, name, like))
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
        usual = self._parameters(small, model.kind)
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

    def _limits_of_task(self, kind: Kind) -> Limits:
        """The limits of a kind with a component: those of its task, and its own of images."""
        limits = self._model.limits_of(Kind(kind.task))
        return replace(limits, images=min(limits.images, self._model.limits_of(kind).images))

    def _sources(self, kind: Kind, size: Size, index: int = 0) -> Sources | None:
        """Made-up images for a request of a kind whose result has this size."""
        if kind.task == TEXT_TO_IMAGE and not kind.shown_images:
            return None
        model = self._model
        pipeline = model.pipelines.of(kind)
        call = described(pipeline)
        masks = (call.mask,) if kind.task == INPAINTING else ()
        names = {*call.needs_images, call.image, *masks}
        images = {}
        for name in sorted(name for name in names if name is not None):
            mask = call.images[name].type == "mask"
            leads = name == call.scaled or (mask and call.scaled is not None)
            # some pipelines refuse references that are smaller
            fit = (
                model.size_of_image(kind, size)
                if leads
                else (max(size[0], LEAST_REFERENCE), max(size[1], LEAST_REFERENCE))
            )
            made = _mask(fit) if mask else _image(fit, 90 * index)
            if model.takes_alpha and not mask:
                made = made.convert("RGBA")
            given = {call.image: "image", call.mask: "mask"}.get(name, name)
            if kind.shown_images and name == call.control:
                given = CONTROL_IMAGE
            count = max(1, len(guides_of(pipeline))) if name == call.control else 1
            images[given] = (made,) * count
        if IP_ADAPTER in dict(kind.components):
            images[IP_ADAPTER_IMAGE] = (_image(self._native, 90 * index),)
        return Sources(images)

    def _attempt(
        self,
        size: Size,
        *,
        kind: Kind,
        images: int = 1,
        guidance: float | None = None,
        characters: int | None = None,
    ) -> Fault | None:
        """Run one job; returns what is wrong with it, None also if time or memory are too little to
        tell. Raises LoadError if the device fails, and RequestError if the engine was closed."""
        if time.monotonic() > self._until:
            return None
        parameters = self._parameters(size, kind)
        if characters is not None and parameters.prompt and self._prompt == PROMPT:
            prompt = (parameters.prompt + DENSE * characters)[:characters]
            parameters = replace(parameters, prompt=prompt)
        if guidance is not None:
            parameters = replace(parameters, guidance_scale=guidance)
        return self._run(replace(parameters, n=images))

    def _parameters(self, size: Size, kind: Kind, index: int = 0) -> Parameters:
        model = self._model
        guidance = model.default_guidance
        if guidance is not None and index % 4 == 3:
            guidance = guidance * 1.5
        pipeline = model.pipelines.of(kind)
        call = described(pipeline)
        strong = kind.task != TEXT_TO_IMAGE and takes(pipeline, "strength")
        # of pipelines with a number of steps for each of their stages
        stages = dict.fromkeys(call.arguments.keys() & set(call.steps), STEPS)
        needed = {name: made_up(call.arguments[name]) for name in model.fields.needs}
        if "control_mode" in call.arguments and modes_of(guides := guides_of(pipeline)) is not None:
            needed["control_mode"] = 0 if len(guides) == 1 else [0] * len(guides)
        if REFINER_START in call.arguments:
            needed[REFINER_START] = HALFWAY
        return Parameters(
            prompt=self._prompt % index if "prompt" in call.takes else "",
            negative_prompt=None,
            width=size[0],
            height=size[1],
            n=1,
            seed=index,
            num_inference_steps=2 * self._steps if strong else self._steps + index % 3,
            guidance_scale=guidance,
            strength=STRENGTH if strong else None,
            sources=self._sources(kind, size, index),
            arguments=needed | stages,
            components=kind.components,
        )

    def _run(self, parameters: Parameters) -> Fault | None:
        size, count = (parameters.width, parameters.height), parameters.n
        trial = (
            f"{count} images of {size[0]}x{size[1]}, guidance {parameters.guidance_scale}, "
            f"{len(parameters.prompt)} characters"
        )
        try:
            output = self._engine.submit(**self._model.call(parameters)).result()
            images = self._images(output)
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
            if not images_each(output, images, count):
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

    def run_together(self, size: Size, count: int, kind: Kind | None = None) -> list[Any]:
        """Run jobs of a kind, the model's main one if None, that start in the same step; returns
        each one's first image, None if flagged."""
        kind = kind or self._model.kind
        jobs, start = [], _Start()
        try:
            for i in range(count):
                parameters = self._parameters(size, kind, i)
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


def made_up(argument: Argument) -> Any:
    """A value of an argument that every call needs: a text, 1, or a list of one of them; of boxes,
    one in the middle."""
    if "boxes" in argument.name:
        return [[0.25, 0.25, 0.75, 0.75]]
    return argument.passed(_made_up(argument.value))


def _made_up(value: Any) -> Any:
    if value in (int, float):
        return value(1)
    if value is bool:
        return True
    if value is str:
        return "to warm up"
    inner = get_args(value)
    return [_made_up(inner[0])] if get_origin(value) in (list, tuple) else _made_up(inner[0])


def _image(size: Size, angle: int = 0) -> Image.Image:
    return Image.linear_gradient("L").rotate(angle).resize(size).convert("RGB")


def _mask(size: Size) -> Image.Image:
    return Image.linear_gradient("L").resize(size)
