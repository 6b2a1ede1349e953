"""The served pipeline: its limits, defaults, schedulers and edits."""

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
from stepweave.parameters import (
    MAX_SEED,
    OPTIONAL_ARGUMENTS,
    PASSED,
    ImageRequest,
    Parameters,
    Sources,
)
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

DRAWN_SEED_BITS = 32  # of a seed that the server draws, short enough to copy

TEXT_TO_IMAGE, IMAGE_TO_IMAGE, INPAINTING = "text_to_image", "image_to_image", "inpainting"
GUIDANCE = (0.0, 100.0)


class ServedModel:
    """One text-to-image pipeline with its preset, and pipelines of the same modules for edits.

    `image_to_image` and `inpaint` are pipelines, or None; `schedulers` are those that requests may
    name. `settings.preset` has precedence over `preset`. Raises LoadError if the pipeline does not
    make images from prompts, or does not support a value of a preset.
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
        self.default_guidance: float | None = preset.guidance_scale
        if self.default_guidance is None:
            self.default_guidance = default_of(pipeline, "guidance_scale")
        check_defaults(settings, self.default_steps, self.width * self.height)
        given = ", ".join(
            f"{name}={shown(value)} ({preset.source(name)})"
            for name, value in preset.given().items()
        )
        if given:
            logger.info("preset: %s; other defaults are the pipeline's own", given)
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
        """The pipeline of each kind of request that the model supports."""
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
        """The limits of text-to-image requests."""
        return self._limits[TEXT_TO_IMAGE]

    @property
    def limits_of_edits(self) -> dict[str, Limits]:
        """The limits of each of `edits`."""
        return {name: self._limits[name] for name in self.edits}

    def limits_for(self, sources: Sources | None) -> Limits:
        """The limits of requests with such sources."""
        return self._limits[_kind(sources)]

    def keep_to(self, sources: Sources | None, limits: Limits) -> None:
        """Set the limits of requests with such sources."""
        self._limits[_kind(sources)] = limits

    def drop_scheduler(self, name: str) -> None:
        """Stop offering a scheduler, for edits too."""
        logger.warning("scheduler %s is not offered: %s fails with it", name, self.pipeline_class)
        for rehearsals in self._rehearsals.values():  # `schedulers` belongs to the first
            rehearsals.schedulers.pop(name, None)

    def refuse_steps(self, name: str | None, steps: int) -> None:
        """Refuse a number of steps of text-to-image with a scheduler (None: the pipeline's)."""
        self._rehearsals[id(self.pipeline)].refuse(name, steps)

    @property
    def edits(self) -> tuple[str, ...]:
        """The supported edits: `image_to_image`, `inpainting`."""
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
        """Fill in the defaults and check every value. Raises InvalidRequestError with value and
        limit.

        With `sources` it is an edit, whose default size is the allowed one nearest to its source's.
        Without `rehearse`, the caller must call `check_steps`.
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
        for name in OPTIONAL_ARGUMENTS:
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
        """Width and height of an edit: `size`, else the allowed size nearest to `source`. Raises
        InvalidRequestError if the size or the kind of edit is not supported."""
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
            kind = "inpainting" if masked else "image-to-image"
            why = "mask is set, or image has transparency" if masked else "image is set"
            raise InvalidRequestError(
                f"{why}, but {self.pipeline_class} does not support {kind}.",
                param=param,
                code="unsupported",
            )
        return pipeline

    def pipeline_for(self, sources: Sources | None) -> Any:
        """The pipeline for a request with such sources. Raises InvalidRequestError if the model
        does not support the edit, or mask and image differ in size."""
        if sources is None:
            return self.pipeline
        pipeline = self._pipeline_of_edits(masked=sources.mask is not None)
        if sources.mask is not None and sources.mask.size != sources.image.size:
            (width, height), (other_width, other_height) = sources.mask.size, sources.image.size
            raise InvalidRequestError(
                f"mask is {width}x{height} and image {other_width}x{other_height}; they must have "
                f"the same size.",
                param="mask",
            )
        return pipeline

    def _resolve_scheduler(self, name: str | None, pipeline: Any) -> str | None:
        """The scheduler's name; None if it is the pipeline's own. Raises InvalidRequestError."""
        if name is None:
            return None
        allowed = self._rehearsals[id(pipeline)].schedulers
        if name not in allowed:
            choice = ", ".join(allowed) or "only its own"
            raise InvalidRequestError(
                f"scheduler is {shown(name)}; {type(pipeline).__name__} supports {choice}.",
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
        """Whether `check_steps` is immediate; otherwise it takes some 0.1 ms a step."""
        course = self._course(parameters)
        return self._rehearsals_for(parameters).knows(parameters.scheduler, course)

    def runs(self, parameters: Parameters) -> bool:
        """Whether the scheduler runs with this number of steps, in a rehearsal."""
        return self._rehearsals_for(parameters).runs(parameters.scheduler, self._course(parameters))

    @property
    def scheduler_steps(self) -> dict[str, dict[str, list[int]]]:
        """Tried numbers of steps, `works` and `fails`, of schedulers that fail with some."""
        tried = {name: self._rehearsals[id(self.pipeline)].tried(name) for name in self.schedulers}
        return {
            name: {"works": works, "fails": fails}
            for name, (works, fails) in tried.items()
            if works and fails
        }

    def check_steps(self, parameters: Parameters) -> None:
        """Raise InvalidRequestError if a rehearsal with the scheduler and the steps fails."""
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
        """Latent positions of an image of `width` x `height` pixels, before packing or patching."""
        return latent_positions(self.pipeline, width, height)

    def drop_edits(self, engine: StepEngine) -> None:
        """Stop offering edits that the engine cannot run; call it before serving."""
        for name in ("image_to_image", "inpaint"):
            pipeline = getattr(self, name)
            if pipeline is not None and not engine.takes(pipeline):
                kind = type(pipeline).__name__
                logger.warning(
                    "%s is not offered: STEPWEAVE_BATCHING=%s does not support it",
                    kind,
                    engine.mode,
                )
                setattr(self, name, None)

    def half_size(self) -> tuple[int, int] | None:
        """Half the native width and height, in allowed multiples; None if that is too small."""
        width, height = (
            side // 2 // self._multiple * self._multiple for side in (self.width, self.height)
        )
        return (width, height) if width and height else None

    def call(self, parameters: Parameters) -> dict[str, Any]:
        """The keyword arguments of `StepEngine.submit` for n RGB images of height x width, with
        `scheduler` and `pipeline` if they are not the model's. Resizing edits may take long."""
        pipeline = self.pipeline_for(parameters.sources)
        chosen = {"pipeline": pipeline} if pipeline is not self.pipeline else {}
        if parameters.scheduler is not None:
            chosen["scheduler"] = self.schedulers[parameters.scheduler]
        return {**chosen, **call_arguments(pipeline, self.call_arguments, parameters)}


def _kind(sources: Sources | None) -> str:
    return (
        TEXT_TO_IMAGE if sources is None else IMAGE_TO_IMAGE if sources.mask is None else INPAINTING
    )
