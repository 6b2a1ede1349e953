"""The pipeline being served: what it accepts, its defaults, and how it is called."""

from __future__ import annotations

import difflib
import inspect
import logging
import secrets
import threading
import time
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from stepweave.config import Settings
from stepweave.engine import Job, Latents, StepEngine
from stepweave.engine.shapes import arguments_of
from stepweave.errors import InvalidRequest, LoadError, NonFinite, RequestError, shown
from stepweave.first_images import check_images
from stepweave.generation import MAX_SEED, Parameters, Sources
from stepweave.images.outputs import outputs_of
from stepweave.loading.preset import FILE_NAME, Preset
from stepweave.loading.rehearsal import Course
from stepweave.loading.schedulers import Rehearsals
from stepweave.loading.siblings import sibling
from stepweave.loading.sizes import SizeLimits, max_side, native_size, size_multiple

logger = logging.getLogger(__name__)

DRAWN_SEED_BITS = 32  # of a seed the server draws, easy to copy

WARM_UP_STEPS = 2
WARM_UP_STRENGTH = 0.5
WARM_UP_FEW = 4  # jobs of a kind, of which two have as many steps: as many as a certificate needs
DEFAULT_STRENGTH = 0.8  # where the pipeline has none of its own
PROFILE_SECONDS = 10.0  # after which no more is run for the cost model's sake alone: it goes on to learn from requests


class ServedModel:
    """One text-to-image pipeline with its preset, and those of its modules that make edits.

    `image_to_image` and `inpaint` are pipelines, or None; `schedulers` are those that requests may name.

    Raises LoadError if the pipeline cannot serve text to image or the preset names arguments that its call lacks.
    """

    def __init__(self, pipeline: Any, preset: Preset, settings: Settings) -> None:
        self.pipeline = pipeline
        self.settings = settings
        self.arguments = arguments_of(pipeline)
        self.call_arguments = preset.call
        directory = settings.model_directory()
        self.id = preset.id or (directory.resolve().name if directory else settings.model)
        own = getattr(pipeline, "scheduler", None)
        self.scheduler = None if own is None else type(own).__name__
        for name in ("prompt", "num_inference_steps", "generator"):
            if name not in self.arguments:
                raise LoadError(f"{self.pipeline_class} takes no argument {name!r}: it makes no images of prompts")
        for name in preset.call:
            if name not in self.arguments:
                close = difflib.get_close_matches(name, self.arguments, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(self.arguments)}"
                raise LoadError(f"{FILE_NAME}: call.{name}: {self.pipeline_class} takes no argument {name!r} ({hint})")
        self.image_to_image = sibling(pipeline, "image_to_image")
        self.inpaint = sibling(pipeline, "inpaint")
        self.guidance_range = (0.0, 100.0)
        width, height = native_size(pipeline)
        self.width, self.height = preset.width or width, preset.height or height
        self.multiple, self.max_side = size_multiple(pipeline), max_side(pipeline)
        self.sizes = SizeLimits(self.multiple, self.max_side, settings.max_pixels)
        self.default_steps = preset.num_inference_steps or self._default("num_inference_steps") or 50
        guidance = preset.guidance_scale if preset.guidance_scale is not None else self._default("guidance_scale")
        self.default_guidance: float | None = guidance if "guidance_scale" in self.arguments else None
        for setting, limit, default in (
            ("MAX_STEPS", settings.max_steps, self.default_steps),
            ("MAX_PIXELS", settings.max_pixels, self.width * self.height),
        ):
            if default > limit:
                raise LoadError(f"STEPWEAVE_{setting}={limit} is less than the model's own default, {default}")
        like = Course(self.default_steps, None, self._tokens(self.width, self.height))
        rehearsals = Rehearsals.of(pipeline, like, settings.max_steps)
        self.schedulers = rehearsals.schedulers
        self._rehearsals = {id(pipeline): rehearsals}
        for one in (self.image_to_image, self.inpaint):
            if one is not None and one is not pipeline:
                strength = _default_strength(one) if _takes(one, "strength") else None
                self._rehearsals[id(one)] = rehearsals.of_edits(one, replace(like, strength=strength))

    @property
    def pipeline_class(self) -> str:
        return type(self.pipeline).__name__

    @property
    def edits(self) -> tuple[str, ...]:
        """What edits it makes, among `image_to_image` and `inpainting`."""
        kinds = (("image_to_image", self.image_to_image), ("inpainting", self.inpaint))
        return tuple(name for name, pipeline in kinds if pipeline is not None)

    def _default(self, name: str) -> Any:
        return _default(self.pipeline, name)

    def resolve(
        self,
        *,
        prompt: str,
        negative_prompt: str | None = None,
        size: str | None = None,
        n: int = 1,
        seed: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        reproducible: bool = False,
        scheduler: str | None = None,
        strength: float | None = None,
        sources: Sources | None = None,
        rehearse: bool = True,
    ) -> Parameters:
        """Fill in the defaults and hold every value against the limits. Raises InvalidRequest naming value and limit.

        With `sources` it is an edit, by default of the size of the picture it starts from, or the nearest that is allowed.
        Without `rehearse`, `check_steps` is left to be called.
        """
        limits = self.settings
        pipeline = self._pipeline_for(sources)
        arguments = arguments_of(pipeline)
        for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            if text is not None and len(text) > limits.max_prompt_characters:
                raise InvalidRequest(
                    f"{name} has {len(text)} characters; the limit is {limits.max_prompt_characters}.", param=name
                )
            if text is not None and "\0" in text:
                raise InvalidRequest(f"{name} is {shown(text)}; it must not hold the character NUL.", param=name)
        if not prompt.strip():
            raise InvalidRequest(f"prompt is empty: {shown(prompt)}. Say what the picture should show.", param="prompt")
        most = limits.max_images if "num_images_per_prompt" in arguments else 1
        if n > most:
            raise InvalidRequest(f"n is {n}; the limit is {most}.", param="n")
        if seed is not None and seed + n - 1 > MAX_SEED:
            raise InvalidRequest(f"seed is {seed} and n is {n}; the limit of seed + n - 1 is {MAX_SEED}.", param="seed")
        if size is not None and size != "auto":
            width, height = self.sizes.read(size)
        else:
            width, height = (self.width, self.height) if sources is None else self.sizes.of_edit(sources.image.size)
        steps = self.default_steps if num_inference_steps is None else num_inference_steps
        if steps > limits.max_steps:
            raise InvalidRequest(
                f"num_inference_steps is {steps}; the limit is {limits.max_steps}.", param="num_inference_steps"
            )
        for name, value in (("negative_prompt", negative_prompt), ("guidance_scale", guidance_scale)):
            if value is not None and name not in arguments:
                kind = type(pipeline).__name__
                raise InvalidRequest(f"{name} is {shown(value)}, but {kind} has no {name}.", param=name)
        parameters = Parameters(
            prompt=prompt,
            negative_prompt=negative_prompt,
            width=width,
            height=height,
            n=n,
            seed=secrets.randbits(DRAWN_SEED_BITS) if seed is None else seed,
            num_inference_steps=steps,
            guidance_scale=self.default_guidance if guidance_scale is None else guidance_scale,
            reproducible=reproducible,
            scheduler=self._resolve_scheduler(scheduler, pipeline),
            strength=self._resolve_strength(strength, steps, pipeline, sources),
            sources=sources,
        )
        if rehearse:
            self.check_steps(parameters)
        return parameters

    def _pipeline_for(self, sources: Sources | None) -> Any:
        """The pipeline that a request is for. Raises InvalidRequest for an edit that the model cannot make."""
        if sources is None:
            return self.pipeline
        param, pipeline = ("image", self.image_to_image) if sources.mask is None else ("mask", self.inpaint)
        if pipeline is None:
            what = "image to image" if sources.mask is None else "inpainting"
            raise InvalidRequest(
                f"{param} is given, but {self.pipeline_class} has no pipeline for {what}.",
                param=param,
                code="unsupported",
            )
        if sources.mask is not None and sources.mask.size != sources.image.size:
            (width, height), (other_width, other_height) = sources.mask.size, sources.image.size
            raise InvalidRequest(
                f"mask is {width}x{height} and image {other_width}x{other_height}; they must be of one size.",
                param="mask",
            )
        return pipeline

    def _resolve_scheduler(self, name: str | None, pipeline: Any) -> str | None:
        """The name of a scheduler that is not the pipeline's own."""
        if name is None:
            return None
        allowed = self._rehearsals[id(pipeline)].schedulers
        if name not in allowed:
            choice = ", ".join(allowed) or "no other than its own"
            raise InvalidRequest(
                f"scheduler is {shown(name)}; {type(pipeline).__name__} takes {choice}.", param="scheduler"
            )
        return None if name == self.scheduler else name

    def _resolve_strength(
        self, strength: float | None, steps: int, pipeline: Any, sources: Sources | None
    ) -> float | None:
        takes = sources is not None and _takes(pipeline, "strength")
        if strength is None and not takes:
            return None
        if not takes:
            reason = "no image is given" if sources is None else f"{type(pipeline).__name__} has no strength"
            raise InvalidRequest(f"strength is {strength}, but {reason}.", param="strength")
        value = _default_strength(pipeline) if strength is None else float(strength)
        if not 0 < value <= 1:
            raise InvalidRequest(f"strength is {value}; it must be more than 0 and at most 1.", param="strength")
        if int(steps * value) < 1:
            raise InvalidRequest(
                f"strength is {value} and num_inference_steps is {steps}; their product, the steps that run, must be at "
                "least 1.",
                param="strength",
            )
        return value

    def _tokens(self, width: int, height: int) -> int:
        return (width // self.multiple) * (height // self.multiple)

    def _course(self, parameters: Parameters) -> Course:
        tokens = self._tokens(parameters.width, parameters.height)
        return Course(parameters.num_inference_steps, parameters.strength, tokens)

    def knows_steps(self, parameters: Parameters) -> bool:
        """Whether `check_steps` answers at once; else it takes some 0.1 ms a step."""
        rehearsals = self._rehearsals[id(self._pipeline_for(parameters.sources))]
        return rehearsals.knows(parameters.scheduler, self._course(parameters))

    @property
    def scheduler_steps(self) -> dict[str, dict[str, list[int]]]:
        """Of schedulers that run with some numbers of steps only, those numbers that were tried: `works` and `fails`."""
        tried = {name: self._rehearsals[id(self.pipeline)].tried(name) for name in self.schedulers}
        return {name: {"works": works, "fails": fails} for name, (works, fails) in tried.items() if works and fails}

    def check_steps(self, parameters: Parameters) -> None:
        """Raise InvalidRequest where the scheduler does not run with the number of steps, as a rehearsal tells."""
        rehearsals = self._rehearsals[id(self._pipeline_for(parameters.sources))]
        if rehearsals.runs(parameters.scheduler, self._course(parameters)):
            return
        given = f"num_inference_steps is {parameters.num_inference_steps}"
        if parameters.strength is not None:
            given += f" and strength is {parameters.strength}"
        works = ", ".join(map(str, rehearsals.tried(parameters.scheduler)[0]))
        raise InvalidRequest(
            f"{given}; {parameters.scheduler or self.scheduler} does not run so at {parameters.width}x{parameters.height}. "
            f"What was tried by default, and works: {works} steps.",
            param="num_inference_steps",
        )

    def drop_edits(self, engine: StepEngine) -> None:
        """Offer no edits that the engine does not take; to be called before it serves."""
        for name in ("image_to_image", "inpaint"):
            pipeline = getattr(self, name)
            if pipeline is not None and not engine.takes(pipeline):
                kind = type(pipeline).__name__
                logger.warning("%s is not offered: batching by %r does not take it", kind, engine.mode)
                setattr(self, name, None)

    def warm_up(self, engine: StepEngine) -> None:
        """Run short jobs, so that the first requests do not pay for first calls and find certified what the engine may merge.

        One of the native size alone; then, together, as many as fill the largest shared step, a few of half its sides, and a few
        edits of each kind; at last growing numbers for the cost model, so that what steps cost is known. The jobs differ in
        prompt, seed, steps and guidance, as requests do. What is certified is decided by counts of jobs, however slow the machine
        is: only the last part ends after some time.
        """
        most = 1 if engine.mode in ("off", "threads") else max(WARM_UP_FEW, -(-self.settings.max_rows // 2))
        few = min(most, WARM_UP_FEW)
        native, half = (self.width, self.height), self._half_size()
        with engine.in_lockstep():
            [alone] = self._run_together(engine, native, 1)
            engine.forget_encodings()  # so that text encoders, too, run the job again
            together = self._run_together(engine, native, most)
            check_images(
                alone, together, _dtype(self.pipeline), lambda: self._run_together(engine, native, WARM_UP_FEW)
            )
            if half is not None:
                try:
                    self._run_together(engine, half, few)
                except (RequestError, NonFinite):  # the engine was closed; or no request of this size would succeed
                    raise
                except Exception as error:
                    logger.info("pictures of %dx%d fail (%s); what they cost is not known", *half, type(error).__name__)
                    half = None
            self._warm_up_edits(engine, native, few)
        self._profile(engine, native, half, most)

    def _warm_up_edits(self, engine: StepEngine, native: tuple[int, int], count: int) -> None:
        """Run edits of each kind; what fails is not offered."""
        for name, mask in (("image_to_image", None), ("inpaint", Image.linear_gradient("L").resize(native))):
            if getattr(self, name) is None:
                continue
            try:
                self._run_together(engine, native, count, edits=True, mask=mask)
            except (RequestError, NonFinite):
                raise
            except Exception as error:
                logger.warning("%s fails (%s); it is not offered", type(getattr(self, name)).__name__, error)
                setattr(self, name, None)

    def _profile(self, engine: StepEngine, native: tuple[int, int], half: tuple[int, int] | None, most: int) -> None:
        """Show the cost model what steps of growing numbers of rows take."""
        began = time.monotonic()
        counts = [2**i for i in range(most.bit_length())]
        for size, count in [(native, count) for count in counts] + [(half, count) for count in counts[:3]]:
            if size is not None and time.monotonic() - began <= PROFILE_SECONDS:
                self._run_together(engine, size, count)

    def _run_together(
        self,
        engine: StepEngine,
        size: tuple[int, int],
        count: int,
        *,
        edits: bool = False,
        mask: Image.Image | None = None,
    ) -> list[Any]:
        """Run jobs that start in one turn of the engine; the first image of each, None if a safety checker flags it."""
        jobs, start = [], _Start()
        try:
            for i in range(count):
                parameters = self._warm_up_parameters(i, *size)
                if edits:
                    picture = Image.linear_gradient("L").rotate(90 * i).resize(size).convert("RGB")
                    sources = Sources(picture, mask)
                    strength = WARM_UP_STRENGTH if _takes(self._pipeline_for(sources), "strength") else None
                    parameters = replace(
                        parameters, num_inference_steps=WARM_UP_STEPS * 2, strength=strength, sources=sources
                    )
                jobs.append(engine.submit(**self.call(parameters), observer=None if i else start))
        finally:
            start.all_are_there.set()
        outputs = [job.result() for job in jobs]
        return [None if any(outputs_of(one, 1).flagged) else one.images[0] for one in outputs]

    def _half_size(self) -> tuple[int, int] | None:
        width, height = (side // 2 // self.multiple * self.multiple for side in (self.width, self.height))
        return (width, height) if width and height else None

    def _warm_up_parameters(self, index: int, width: int, height: int) -> Parameters:
        guidance = self.default_guidance
        if guidance is not None and index % 4 == 3:
            guidance = guidance * 1.5
        prompt = f"{index}, to warm up"  # differs in its first token: encoders cut long prompts
        return Parameters(prompt, None, width, height, 1, index, WARM_UP_STEPS + index % 3, guidance)

    def call(self, parameters: Parameters) -> dict[str, Any]:
        """The keyword arguments of `StepEngine.submit` for n RGB pictures of height x width.

        They are those of the pipeline's own call; `scheduler` and `pipeline` too, where they are not the model's own. It resizes
        the pictures of an edit, so it may take some time.
        """
        pipeline = self._pipeline_for(parameters.sources)
        arguments = arguments_of(pipeline)
        # on the CPU whatever the device: a seed then gives the same noise everywhere
        generators = [torch.Generator("cpu").manual_seed(parameters.seed + i) for i in range(parameters.n)]
        optional = {
            "negative_prompt": parameters.negative_prompt,
            "width": parameters.width,
            "height": parameters.height,
            "guidance_scale": parameters.guidance_scale,
            "num_images_per_prompt": parameters.n,
            "strength": parameters.strength,
            **self._pictures(parameters),
        }
        chosen = {"pipeline": pipeline} if pipeline is not self.pipeline else {}
        if parameters.scheduler is not None:
            chosen["scheduler"] = self.schedulers[parameters.scheduler]
        return {
            **chosen,
            **{name: value for name, value in self.call_arguments.items() if name in arguments},
            "prompt": parameters.prompt,
            "num_inference_steps": parameters.num_inference_steps,
            "generator": generators,
            "output_type": "pil",
            **{name: value for name, value in optional.items() if value is not None and name in arguments},
        }

    def _pictures(self, parameters: Parameters) -> dict[str, Any]:
        """The pictures of an edit, of the size that is asked for."""
        sources, size = parameters.sources, (parameters.width, parameters.height)
        if sources is None:
            return {}
        image = _resized(sources.image, size)
        # one for each to be made: with one for all, pipelines encode it with the first generator alone, or fail
        pictures: dict[str, Any] = {"image": image if parameters.n == 1 else [image] * parameters.n}
        if sources.mask is not None:
            pictures["mask_image"] = _resized(sources.mask, size)
        return pictures


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


def _takes(pipeline: Any, name: str) -> bool:
    return name in arguments_of(pipeline)


def _dtype(pipeline: Any) -> torch.dtype:
    """What the pipeline computes in; float32 for one that is not of diffusers."""
    dtype = getattr(pipeline, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32


def _default(pipeline: Any, name: str) -> Any:
    """What an argument of the pipeline's call is by default; None where it has none."""
    parameters = arguments_of(pipeline)
    default = parameters[name].default if name in parameters else None
    return None if default is inspect.Parameter.empty else default


def _default_strength(pipeline: Any) -> float:
    default = _default(pipeline, "strength")
    return float(DEFAULT_STRENGTH if default is None else default)


def _resized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)
