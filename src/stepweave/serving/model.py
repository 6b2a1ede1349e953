"""The served pipeline: its limits, defaults, schedulers and edits."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from stepweave.calls import RequestFields, described, fields_of
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
    nearest_size,
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
from stepweave.serving.arguments import OWN_TIMES, resolve_arguments, resolve_steps, work_limits
from stepweave.serving.call import (
    call_arguments,
    check_call,
    check_defaults,
    check_prompt,
    check_size,
    check_texts,
    default_arguments,
    default_of,
    default_strength,
    resolve_strength,
    scales_images,
)
from stepweave.serving.inputs import (
    ImageInputs,
    at_most,
    check_images,
    leading_image,
    leading_name,
    missing,
    takes_alpha,
)
from stepweave.serving.kinds import IMAGE_TO_IMAGE, INPAINTING, TEXT_TO_IMAGE
from stepweave.serving.names import names_of
from stepweave.serving.no_effect import warnings_of

logger = logging.getLogger(__name__)

DRAWN_SEED_BITS = 32  # of a seed that the server draws, short enough to copy

GUIDANCE = (0.0, 100.0)


class ServedModel:
    """One pipeline with its preset, and pipelines of the same modules for other requests.

    `image_to_image` and `inpaint` are pipelines for requests with an image, or with a mask, too, or
    None: the model's own if it takes them, else others of its family. `schedulers` are those that
    requests may name. `settings.preset` has precedence over `preset`. Raises LoadError if the
    pipeline does not make images, or does not support a value of a preset.
    """

    def __init__(self, pipeline: Any, preset: Preset, settings: Settings) -> None:
        self.pipeline = pipeline
        self.settings = settings
        self.preset = preset = settings.preset_over(preset)
        check_served(pipeline, preset.call)
        self.arguments = arguments_of(pipeline)
        self.names = names_of(settings, preset)
        self.id = self.names.told
        scheduler = getattr(pipeline, "scheduler", None)
        self.scheduler = None if scheduler is None else type(scheduler).__name__
        check_call(pipeline, preset)
        call = described(pipeline)
        takes_masks = call.mask is not None
        own_images = call.image in ("image", "images") or call.image in call.needs
        self.image_to_image = (
            pipeline
            if own_images and call.mask not in call.needs
            else edit_pipeline(pipeline, "image_to_image")
        )
        self.inpaint = pipeline if takes_masks else edit_pipeline(pipeline, "inpaint")
        self._multiple = size_multiple(pipeline)
        width, height = native_size(pipeline)
        if not {"width", "height"} & call.takes:
            # its size is that of its images, or of its networks, which the warm-up finds out
            width, height = nearest_size((width, height), self._multiple, None, settings.max_pixels)
        self.width, self.height = preset.width or width, preset.height or height
        native = self.width, self.height
        sizes = SizeLimits(
            self._multiple, max_side(pipeline), settings.max_pixels, self._multiple, native=native
        )
        check_size(pipeline, preset, native, (width, height), sizes)
        self.default_steps = preset.num_inference_steps or _default_steps(pipeline)
        if "num_inference_steps" not in call.takes:  # it has a number for each of its stages
            self.default_steps = min(self.default_steps, settings.max_steps)
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
        strength = default_strength(pipeline) if call.needs_images else None
        like = Course(self.default_steps, strength, self._tokens(self.width, self.height))
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
                settings.max_images if described(kind_pipeline).count is not None else 1,
                settings.max_prompt_characters,
            )
            for kind, kind_pipeline in self.pipelines().items()
        }
        self.inputs = ImageInputs(
            {kind: described(one).draws_for_images for kind, one in self.pipelines().items()}
        )
        self.fields = self._fields()

    def pipelines(self) -> dict[str, Any]:
        """The pipeline of each kind of request that the model supports, the first its main one."""
        needs = described(self.pipeline).needs_images
        kinds = {
            TEXT_TO_IMAGE: None if needs else self.pipeline,
            IMAGE_TO_IMAGE: self.image_to_image,
            INPAINTING: self.inpaint,
        }
        found = {kind: pipeline for kind, pipeline in kinds.items() if pipeline is not None}
        return dict(sorted(found.items(), key=lambda item: item[1] is not self.pipeline))

    def _fields(self) -> RequestFields:
        pipelines = self.pipelines().values()
        return fields_of(
            dict.fromkeys(map(described, pipelines)),
            self.preset.call,
            self.preset.limits,
            work_limits(self.pipeline, self.settings, self._limits[self.kind].sizes.longest),
            self.inputs.several_of(pipelines),
        )

    @property
    def pipeline_class(self) -> str:
        return type(self.pipeline).__name__

    @property
    def kind(self) -> str:
        """The kind of request that the model is made for."""
        return next(iter(self.pipelines()))

    @property
    def needs_images(self) -> tuple[str, ...]:
        """The images, by the requests' names, that requests of the main kind must have."""
        call = described(self.pipeline)
        named = {call.image: "image", call.mask: "mask"}
        return tuple(named.get(name, name) for name in call.needs_images)

    @property
    def limits(self) -> Limits:
        """The limits of requests of the model's main kind."""
        return self._limits[self.kind]

    @property
    def limits_of_edits(self) -> dict[str, Limits]:
        """The limits of each of `edits`."""
        return {name: self._limits[name] for name in self.edits}

    def limits_of(self, kind: str) -> Limits:
        """The limits of requests of a kind."""
        return self._limits[kind]

    def keep_to(self, kind: str, limits: Limits) -> None:
        """Set the limits of requests of a kind."""
        self._limits[kind] = limits

    def drop(self, kind: str) -> None:
        """Stop offering edits of a kind."""
        setattr(self, {IMAGE_TO_IMAGE: "image_to_image", INPAINTING: "inpaint"}[kind], None)
        self.fields = self._fields()

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
        kinds = self.pipelines()
        return tuple(kind for kind in (IMAGE_TO_IMAGE, INPAINTING) if kind in kinds)

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
        call, limits = described(pipeline), self._limits[_kind(sources)]
        if "prompt" in call.takes:
            check_prompt(request.prompt)
        if sources is not None:
            counts = {name: len(images) for name, images in sources.images.items()}
            self.inputs.check_counts(counts, [pipeline])
        if n > limits.images:
            raise InvalidRequestError(f"n is {n}; the limit is {limits.images}.", param="n")
        given = resolve_arguments(request.arguments(), pipeline, self.preset, n, limits.images)
        texts = {"prompt": request.prompt, "negative_prompt": request.negative_prompt, **given}
        check_texts(texts, limits.prompt_characters)
        seed = secrets.randbits(DRAWN_SEED_BITS) if request.seed is None else request.seed
        if seed + n - 1 > MAX_SEED:
            raise InvalidRequestError(
                f"seed is {seed} and n is {n}; the limit of seed + n - 1 is {MAX_SEED}.",
                param="seed",
            )
        leading = None if sources is None else leading_image(call, sources).size
        width, height = self._size(request.size, _kind(sources), leading)
        steps = resolve_steps(
            request.num_inference_steps,
            self.default_steps,
            self.settings.max_steps,
            pipeline,
            {**default_arguments(pipeline, self.preset.call), **given},
            given,
        )
        for name in OPTIONAL_ARGUMENTS:
            value = getattr(request, name)
            if value is not None and name not in call.takes:
                raise InvalidRequestError(
                    f"{name} is {shown(value)}, but {call.pipeline} has no {name}.", param=name
                )
        passed = {name: getattr(request, name) for name in PASSED}
        passed["prompt"] = (request.prompt or "") if "prompt" in call.takes else ""
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
            arguments=given,
            **passed,
        )
        if rehearse:
            self.check_steps(parameters)
        return parameters

    def size_of_edit(
        self, source: tuple[int, int], size: str | None, *, masked: bool
    ) -> tuple[int, int]:
        """Width and height of the image of an edit that has the size of the result, or of a
        reference: `source` itself, unless it is larger than results may be. `size` is that of the
        result; without it, it is the allowed size nearest to `source`. Raises InvalidRequestError
        if the size or the kind of edit is not supported."""
        kind = INPAINTING if masked else IMAGE_TO_IMAGE
        pipeline = self._pipeline_of_edits(masked=masked)
        if described(pipeline).scaled is None or scales_images(pipeline):
            return self.size_of_reference(source)
        return self.size_of_image(kind, self._size(size, kind, source))

    def size_of_reference(self, source: tuple[int, int]) -> tuple[int, int]:
        """Width and height of an image that the pipeline scales itself: its own, or, if it has more
        than `STEPWEAVE_MAX_PIXELS` pixels, as many."""
        return at_most(source, self.settings.max_pixels)

    def _size(self, size: str | None, kind: str, source: tuple[int, int] | None) -> tuple[int, int]:
        """Width and height of a result: `size`; else, of references, the model's own number of
        pixels in the proportions of the first; else the allowed size nearest to that of the image
        that it begins with."""
        limits = self._limits[kind]
        if size is not None and size != "auto":
            return limits.sizes.read(size)
        native = self.width, self.height
        if source is None:
            return native
        if described(self.pipelines()[kind]).scaled is None:
            return limits.sizes.like(source, native[0] * native[1])
        enlargement = self.inputs.enlargements.get(kind, 1)
        enlarged = source[0] * enlargement, source[1] * enlargement
        return limits.sizes.of_edit(enlarged, native[0] * native[1])

    def _pipeline_of_edits(self, *, masked: bool) -> Any:
        param, pipeline = ("mask", self.inpaint) if masked else ("image", self.image_to_image)
        if pipeline is not None:
            return pipeline
        if not masked and self.inpaint is self.pipeline:
            raise InvalidRequestError(
                f"mask is missing: {self.pipeline_class} repaints the part of an image that a mask "
                "shows. Send one, or an image that is transparent there.",
                param="mask",
                code="missing_field",
            )
        kind = "inpainting" if masked else "image-to-image"
        why = "mask is set, or image has transparency" if masked else "image is set"
        raise InvalidRequestError(
            f"{why}, but {self.pipeline_class} does not support {kind}.",
            param=param,
            code="unsupported",
        )

    def pipeline_for(self, sources: Sources | None) -> Any:
        """The pipeline for a request with such sources. Raises InvalidRequestError if the model
        does not support it, an image is missing, or mask and image differ in size."""
        if sources is None:
            if TEXT_TO_IMAGE in self.pipelines():
                return self.pipeline
            raise missing(described(self.pipeline), ())
        pipeline = self._pipeline_of_edits(masked=sources.mask is not None)
        call = described(pipeline)
        check_images(call, sources)
        if sources.mask is not None and call.scaled is not None:
            size, other = sources.mask.size, leading_image(call, sources).size
            if size != other:
                (width, height), (other_width, other_height) = size, other
                raise InvalidRequestError(
                    f"mask is {width}x{height} and image {other_width}x{other_height}; they must "
                    f"have the same size.",
                    param="mask",
                )
        return pipeline

    def note_several(self, pipeline: Any, name: str) -> None:
        """Note that a pipeline takes several images of that name."""
        self.inputs.note_several(pipeline, name)
        self.fields = self._fields()

    def check_counts(self, counts: Mapping[str, int]) -> None:
        """Raise InvalidRequestError for more images of one name than any pipeline takes."""
        self.inputs.check_counts(counts, list(self.pipelines().values()))

    def leading(self, given: Collection[str]) -> str:
        """Which of the images of a request decides about the size of its result."""
        return leading_name(given, self.pipelines().values())

    @property
    def takes_alpha(self) -> bool:
        """Whether the pipeline's autoencoder takes images with transparency."""
        return takes_alpha(self.pipeline)

    def size_of_image(self, kind: str, size: tuple[int, int]) -> tuple[int, int]:
        """The size of the image that a result of this size begins with."""
        return self.inputs.size_of_image(kind, size)

    def makes_only(self, size: tuple[int, int]) -> None:
        """Note that all results have this size, whatever is asked for."""
        self.width, self.height = size
        for kind, limits in self._limits.items():
            self._limits[kind] = replace(limits, sizes=replace(limits.sizes, only=size))

    def enlarges(self, kind: str, times: int) -> None:
        """Note that results of a kind of request have sides `times` as long as their image's."""
        self.inputs.enlargements[kind] = times
        limits = self._limits[kind]
        sizes = replace(limits.sizes, multiple=limits.sizes.multiple * times, native=None)
        self._limits[kind] = replace(limits, sizes=sizes)
        if kind == self.kind:
            self.width, self.height = self.width * times, self.height * times

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

    def _own_times(self, parameters: Parameters) -> bool:
        """Whether a request has timesteps of its own, which no rehearsal tells about."""
        return any(parameters.arguments.get(name) for name in OWN_TIMES)

    def _course(self, parameters: Parameters) -> Course:
        tokens = self._tokens(parameters.width, parameters.height)
        return Course(parameters.num_inference_steps, parameters.strength, tokens)

    def _rehearsals_for(self, parameters: Parameters) -> Rehearsals:
        return self._rehearsals[id(self.pipeline_for(parameters.sources))]

    def knows_steps(self, parameters: Parameters) -> bool:
        """Whether `check_steps` is immediate; otherwise it takes some 0.1 ms a step."""
        if self._own_times(parameters):
            return True
        course = self._course(parameters)
        return self._rehearsals_for(parameters).knows(parameters.scheduler, course)

    def runs(self, parameters: Parameters) -> bool:
        """Whether the scheduler runs with this number of steps, in a rehearsal."""
        if self._own_times(parameters) or not takes(
            self.pipeline_for(parameters.sources), "num_inference_steps"
        ):
            return True
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

    def warnings_of(self, request: ImageRequest, parameters: Parameters) -> list[str]:
        """Warnings about values of a request that have no effect."""
        pipeline = self.pipeline_for(parameters.sources)
        return list(warnings_of(pipeline, self.preset.call, parameters, request.prompt))

    def latent_positions(self, width: int, height: int) -> int:
        """Latent positions of an image of `width` x `height` pixels, before packing or patching."""
        return latent_positions(self.pipeline, width, height)

    def drop_edits(self, engine: StepEngine) -> None:
        """Stop offering edits that the engine cannot run; call it before serving."""
        for kind, pipeline in self.pipelines().items():
            if not engine.takes(pipeline):
                logger.warning(
                    "%s is not offered: STEPWEAVE_BATCHING=%s does not support it",
                    type(pipeline).__name__,
                    engine.mode,
                )
                self.drop(kind)

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
        kind = _kind(parameters.sources)
        arguments = call_arguments(
            pipeline,
            self.preset.call,
            parameters,
            enlargement=self.inputs.enlargements.get(kind, 1),
            copies=self.inputs.copies[kind],
        )
        return {**chosen, **arguments}


def _default_steps(pipeline: Any) -> int:
    """The pipeline's own number of steps: of its call, or of its configuration."""
    own = default_of(pipeline, "num_inference_steps")
    config = getattr(pipeline, "config", {})
    return int(own or config.get("default_denoising_steps") or 50)


def _kind(sources: Sources | None) -> str:
    return (
        TEXT_TO_IMAGE if sources is None else IMAGE_TO_IMAGE if sources.mask is None else INPAINTING
    )
