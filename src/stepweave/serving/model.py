"""The pipeline being served: what it accepts, its defaults, and how it is called."""

from __future__ import annotations

import logging
import secrets
from dataclasses import replace
from typing import Any

from stepweave.config import Settings
from stepweave.config.preset import Preset
from stepweave.engine import StepEngine
from stepweave.errors import InvalidRequestError, shown
from stepweave.loading.edit_pipelines import edit_pipeline
from stepweave.loading.kinds import check_served
from stepweave.loading.rehearsal import Course
from stepweave.loading.schedulers import Rehearsals
from stepweave.loading.sizes import (
    SizeLimits,
    latent_positions,
    max_side,
    native_size,
    size_multiple,
)
from stepweave.loading.trials import Limits
from stepweave.parameters import MAX_SEED, PASSED, ImageRequest, Parameters, Sources
from stepweave.planning.workload import arguments_of, takes
from stepweave.serving.call import (
    call_arguments,
    check_call,
    check_defaults,
    check_prompts,
    check_size,
    default_of,
    default_strength,
    resolve_strength,
)
from stepweave.serving.names import names_of

logger = logging.getLogger(__name__)

DRAWN_SEED_BITS = 32  # of a seed the server draws, easy to copy

# kinds of requests
TEXT_TO_IMAGE, IMAGE_TO_IMAGE, INPAINTING = "text_to_image", "image_to_image", "inpainting"
GUIDANCE = (0.0, 100.0)


class ServedModel:
    """One text-to-image pipeline with its preset, and those of its modules that make edits.

    `image_to_image` and `inpaint` are pipelines, or None; `schedulers` are those that requests may
    name.

    `settings.preset` has precedence over `preset`. Raises LoadError if the pipeline does not make
    images of prompts, or if a preset says what the model does not take.
    """

    def __init__(self, pipeline: Any, preset: Preset, settings: Settings) -> None:
        self.pipeline = pipeline
        self.settings = settings
        self.preset = preset = settings.preset_over(preset)
        check_served(type(pipeline), preset.call)
        self.arguments = arguments_of(pipeline)
        self.call_arguments = {
            name: value for name, value in preset.call.items() if value is not None
        }
        self.names = names_of(settings, preset)
        self.id = self.names.told
        scheduler = getattr(pipeline, "scheduler", None)
        self.scheduler = None if scheduler is None else type(scheduler).__name__
        check_call(pipeline, preset)
        self.image_to_image = edit_pipeline(pipeline, "image_to_image")
        self.inpaint = edit_pipeline(pipeline, "inpaint")
        width, height = native_size(pipeline)
        self.width, self.height = preset.width or width, preset.height or height
        self._multiple, native = size_multiple(pipeline), (self.width, self.height)
        sizes = SizeLimits(
            self._multiple, max_side(pipeline), settings.max_pixels, self._multiple, native=native
        )
        check_size(pipeline, preset, native, (width, height), sizes)
        self.default_steps = (
            preset.num_inference_steps or default_of(pipeline, "num_inference_steps") or 50
        )
        guidance = (
            preset.guidance_scale
            if preset.guidance_scale is not None
            else default_of(pipeline, "guidance_scale")
        )
        self.default_guidance: float | None = (
            guidance if "guidance_scale" in self.arguments else None
        )
        check_defaults(settings, self.default_steps, self.width * self.height)
        if said := preset.given():
            logger.info(
                "defaults: %s; others are the pipeline's own",
                ", ".join(
                    f"{name}={shown(value)} ({preset.source(name)})" for name, value in said.items()
                ),
            )
        like = Course(self.default_steps, None, self._tokens(self.width, self.height))
        rehearsals = Rehearsals.of(pipeline, like, settings.max_steps)
        self.schedulers = rehearsals.schedulers
        self._rehearsals = {id(pipeline): rehearsals}
        for edits in (self.image_to_image, self.inpaint):
            if edits is not None and edits is not pipeline:
                self._rehearsals[id(edits)] = rehearsals.of_edits(
                    edits, replace(like, strength=default_strength(edits))
                )
        self._limits = {
            kind: Limits(
                sizes,
                GUIDANCE,
                settings.max_images if takes(kind_pipeline, "num_images_per_prompt") else 1,
                settings.max_prompt_characters,
            )
            for kind, kind_pipeline in self._pipelines().items()
        }

    def _pipelines(self) -> dict[str, Any]:
        """The pipeline of each kind of request, of those that there are."""
        kinds = {
            TEXT_TO_IMAGE: self.pipeline,
            IMAGE_TO_IMAGE: self.image_to_image,
            INPAINTING: self.inpaint,
        }
        return {kind: pipeline for kind, pipeline in kinds.items() if pipeline is not None}

    @property
    def pipeline_class(self) -> str:
        return type(self.pipeline).__name__

    @property
    def limits(self) -> Limits:
        """Those of images that start from nothing."""
        return self._limits[TEXT_TO_IMAGE]

    @property
    def limits_of_edits(self) -> dict[str, Limits]:
        """Those of `edits`."""
        return {name: self._limits[name] for name in self.edits}

    def limits_for(self, sources: Sources | None) -> Limits:
        """Those of requests that start from such sources."""
        return self._limits[_kind(sources)]

    def keep_to(self, sources: Sources | None, limits: Limits) -> None:
        """Have requests that start from such sources keep to other limits."""
        self._limits[_kind(sources)] = limits

    def drop_scheduler(self, name: str) -> None:
        """Offer a scheduler no more, for edits neither."""
        logger.warning("%s is not offered: %s fails with it", name, self.pipeline_class)
        for rehearsals in self._rehearsals.values():  # `schedulers` is the first's
            rehearsals.schedulers.pop(name, None)

    def refuse_steps(self, name: str | None, steps: int) -> None:
        """Refuse this number of steps with a scheduler, None for the own one, where images start
        from nothing."""
        self._rehearsals[id(self.pipeline)].refuse(name, steps)

    @property
    def edits(self) -> tuple[str, ...]:
        """What edits it makes, among `image_to_image` and `inpainting`."""
        return tuple(kind for kind in self._pipelines() if kind != TEXT_TO_IMAGE)

    def resolve(
        self,
        request: ImageRequest,
        *,
        n: int = 1,
        strength: float | None = None,
        sources: Sources | None = None,
        rehearse: bool = True,
    ) -> Parameters:
        """Fill in the defaults and hold every value against the limits. Raises InvalidRequestError
        naming value and limit.

        With `sources` it is an edit, by default of the size of the image it starts from, or the
        nearest that is allowed. Without `rehearse`, `check_steps` is left to be called.
        """
        pipeline = self.pipeline_for(sources)
        limits, arguments = self.limits_for(sources), arguments_of(pipeline)
        check_prompts(request.prompt, request.negative_prompt, limits.prompt_characters)
        if n > limits.images:
            raise InvalidRequestError(f"n is {n}; the limit is {limits.images}.", param="n")
        seed = secrets.randbits(DRAWN_SEED_BITS) if request.seed is None else request.seed
        if seed + n - 1 > MAX_SEED:
            raise InvalidRequestError(
                f"seed is {seed} and n is {n}; the limit of seed + n - 1 is {MAX_SEED}.",
                param="seed",
            )
        width, height = self._size(
            request.size, limits, None if sources is None else sources.image.size
        )
        steps = request.num_inference_steps or self.default_steps
        if steps > self.settings.max_steps:
            raise InvalidRequestError(
                f"num_inference_steps is {steps}; the limit is {self.settings.max_steps}.",
                param="num_inference_steps",
            )
        for name in ("negative_prompt", "guidance_scale"):
            value = getattr(request, name)
            if value is not None and name not in arguments:
                kind = type(pipeline).__name__
                raise InvalidRequestError(
                    f"{name} is {shown(value)}, but {kind} has no {name}.", param=name
                )
        parameters = Parameters(
            width=width,
            height=height,
            n=n,
            seed=seed,
            num_inference_steps=steps,
            guidance_scale=self._resolve_guidance(request.guidance_scale, limits),
            scheduler=self._resolve_scheduler(request.scheduler, pipeline),
            strength=resolve_strength(strength, steps, pipeline, sources),
            sources=sources,
            **{name: getattr(request, name) for name in PASSED},
        )
        if rehearse:
            self.check_steps(parameters)
        return parameters

    def size_of_edit(
        self, source: tuple[int, int], size: str | None, *, masked: bool
    ) -> tuple[int, int]:
        """Width and height of an edit of an image of the size `source`: `size`, else the nearest
        that the model makes.

        Raises InvalidRequestError for a size, or a kind of edit, that it does not make.
        """
        self._pipeline_of_edits(masked=masked)
        return self._size(size, self._limits[INPAINTING if masked else IMAGE_TO_IMAGE], source)

    def _size(
        self, size: str | None, limits: Limits, source: tuple[int, int] | None
    ) -> tuple[int, int]:
        if size is not None and size != "auto":
            return limits.sizes.read(size)
        native = self.width, self.height
        return native if source is None else limits.sizes.of_edit(source, native[0] * native[1])

    def _pipeline_of_edits(self, *, masked: bool) -> Any:
        param, pipeline = ("mask", self.inpaint) if masked else ("image", self.image_to_image)
        if pipeline is None:
            what = "inpainting" if masked else "image to image"
            given = "mask is given, or image is transparent in part" if masked else "image is given"
            raise InvalidRequestError(
                f"{given}, but {self.pipeline_class} has no pipeline for {what}.",
                param=param,
                code="unsupported",
            )
        return pipeline

    def pipeline_for(self, sources: Sources | None) -> Any:
        """The pipeline that a request is for. Raises InvalidRequestError for an edit that the model
        cannot make."""
        if sources is None:
            return self.pipeline
        pipeline = self._pipeline_of_edits(masked=sources.mask is not None)
        if sources.mask is not None and sources.mask.size != sources.image.size:
            (width, height), (other_width, other_height) = sources.mask.size, sources.image.size
            raise InvalidRequestError(
                f"mask is {width}x{height} and image {other_width}x{other_height}; they must be of "
                f"one size.",
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
            raise InvalidRequestError(
                f"scheduler is {shown(name)}; {type(pipeline).__name__} takes {choice}.",
                param="scheduler",
            )
        return None if name == self.scheduler else name

    def _resolve_guidance(self, guidance: float | None, limits: Limits) -> float | None:
        if guidance is None:
            return self.default_guidance
        low, high = limits.guidance
        if not low <= guidance <= high:
            raise InvalidRequestError(
                f"guidance_scale is {guidance:g}; it must be at least {low:g} and at most "
                f"{high:g}.",
                param="guidance_scale",
            )
        return guidance

    def _tokens(self, width: int, height: int) -> int:
        return (width // self._multiple) * (height // self._multiple)

    def _course(self, parameters: Parameters) -> Course:
        tokens = self._tokens(parameters.width, parameters.height)
        return Course(parameters.num_inference_steps, parameters.strength, tokens)

    def _rehearsals_for(self, parameters: Parameters) -> Rehearsals:
        return self._rehearsals[id(self.pipeline_for(parameters.sources))]

    def knows_steps(self, parameters: Parameters) -> bool:
        """Whether `check_steps` answers at once; else it takes some 0.1 ms a step."""
        return self._rehearsals_for(parameters).knows(
            parameters.scheduler, self._course(parameters)
        )

    def runs(self, parameters: Parameters) -> bool:
        """Whether the scheduler runs with the number of steps, as a rehearsal tells."""
        return self._rehearsals_for(parameters).runs(parameters.scheduler, self._course(parameters))

    @property
    def scheduler_steps(self) -> dict[str, dict[str, list[int]]]:
        """Of schedulers that run with some numbers of steps only, those numbers that were tried:
        `works` and `fails`."""
        tried = {name: self._rehearsals[id(self.pipeline)].tried(name) for name in self.schedulers}
        return {
            name: {"works": works, "fails": fails}
            for name, (works, fails) in tried.items()
            if works and fails
        }

    def check_steps(self, parameters: Parameters) -> None:
        """Raise InvalidRequestError where the scheduler does not run with the number of steps, as a
        rehearsal tells."""
        if self.runs(parameters):
            return
        given = f"num_inference_steps is {parameters.num_inference_steps}"
        if parameters.strength is not None:
            given += f" and strength is {parameters.strength}"
        works = ", ".join(map(str, self._rehearsals_for(parameters).tried(parameters.scheduler)[0]))
        raise InvalidRequestError(
            f"{given}; {parameters.scheduler or self.scheduler} does not run so at "
            f"{parameters.width}x{parameters.height}. What was tried by default, and works: "
            f"{works} steps.",
            param="num_inference_steps",
        )

    def latent_positions(self, width: int, height: int) -> int:
        """Positions of the latents of an image of so many pixels, before they are packed or made
        into patches."""
        return latent_positions(self.pipeline, width, height)

    def drop_edits(self, engine: StepEngine) -> None:
        """Offer no edits that the engine does not take; to be called before it serves."""
        for name in ("image_to_image", "inpaint"):
            pipeline = getattr(self, name)
            if pipeline is not None and not engine.takes(pipeline):
                kind = type(pipeline).__name__
                logger.warning(
                    "%s is not offered: batching by %r does not take it", kind, engine.mode
                )
                setattr(self, name, None)

    def half_size(self) -> tuple[int, int] | None:
        """Half the native sides, as far as the pipeline's configuration tells; None where there is
        no such image."""
        width, height = (
            side // 2 // self._multiple * self._multiple for side in (self.width, self.height)
        )
        return (width, height) if width and height else None

    def call(self, parameters: Parameters) -> dict[str, Any]:
        """The keyword arguments of `StepEngine.submit` for n RGB images of height x width.

        They are those of the pipeline's own call; `scheduler` and `pipeline` too, where they are
        not the model's own. It resizes the images of an edit, so it may take some time.
        """
        pipeline = self.pipeline_for(parameters.sources)
        chosen = {"pipeline": pipeline} if pipeline is not self.pipeline else {}
        if parameters.scheduler is not None:
            chosen["scheduler"] = self.schedulers[parameters.scheduler]
        return {**chosen, **call_arguments(pipeline, self.call_arguments, parameters)}


def _kind(sources: Sources | None) -> str:
    return (
        TEXT_TO_IMAGE if sources is None else IMAGE_TO_IMAGE if sources.mask is None else INPAINTING
    )
