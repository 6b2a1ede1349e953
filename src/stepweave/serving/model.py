"""The served pipeline: its limits, defaults, schedulers and edits."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from stepweave.adapters.beside import Added
from stepweave.adapters.control_pipelines import guides_of
from stepweave.adapters.embeddings import Embedding
from stepweave.adapters.loras import Loras
from stepweave.calls import RequestFields, described, fields_of, stands_for_prompt
from stepweave.config import Settings
from stepweave.config.components import IP_ADAPTER
from stepweave.config.preset import Preset
from stepweave.engine import StepEngine
from stepweave.errors import InvalidRequestError, shown
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
    LORA_TEXT,
    MAX_SEED,
    OPTIONAL_ARGUMENTS,
    OWN_TIMES,
    PASSED,
    ImageRequest,
    Parameters,
    Sources,
)
from stepweave.planning.workload import arguments_of, takes
from stepweave.serving.arguments import (
    resolve_arguments,
    resolve_steps,
    scales_of,
    with_components,
    work_limits,
)
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
    ip_adapter_arguments,
    resolve_strength,
    scales_images,
)
from stepweave.serving.inputs import (
    ImageInputs,
    at_most,
    check_guides,
    check_images,
    check_named,
    hint_names,
    is_repainted,
    leading_image,
    leading_name,
    missing,
    takes_alpha,
)
from stepweave.serving.kinds import (
    IMAGE_TO_IMAGE,
    INPAINTING,
    IP_ADAPTER_SCALE,
    TEXT_TO_IMAGE,
    Chosen,
    Kind,
    chosen,
    kind_of,
    with_,
)
from stepweave.serving.names import names_of
from stepweave.serving.no_effect import spelling_warnings, warnings_of
from stepweave.serving.pipelines import Pipelines
from stepweave.serving.tensors import check_tensors, size_of_tensors

logger = logging.getLogger(__name__)

DRAWN_SEED_BITS = 32  # of a seed that the server draws, short enough to copy

GUIDANCE = (0.0, 100.0)
FULL = 4  # references of a request that may have as many pixels as a result


class ServedModel:
    """One pipeline with its preset, and pipelines of the same modules for other requests.

    `added` are components beside the model, by name. `schedulers` are those that requests may name.
    `settings.preset` has precedence over `preset`. Raises LoadError if the pipeline does not make
    images, or does not support a value of a preset or a component.
    """

    def __init__(
        self,
        pipeline: Any,
        preset: Preset,
        settings: Settings,
        added: Mapping[str, Added] = MappingProxyType({}),
        embeddings: Sequence[Embedding] = (),
        loras: Loras | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.embeddings = embeddings
        self.loras = loras
        self.settings = settings
        self.preset = preset = settings.preset_over(preset)
        check_served(pipeline, preset.call)
        self.arguments = arguments_of(pipeline)
        self.names = names_of(settings, preset)
        self.id = self.names.told
        scheduler = getattr(pipeline, "scheduler", None)
        self.scheduler = None if scheduler is None else type(scheduler).__name__
        call = described(pipeline)
        self.pipelines = Pipelines(pipeline, added)
        check_call(pipeline, preset, self.pipelines.by_kind().values() if added else ())
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
        self._rehearsals = {
            task: rehearsals
            if edits is pipeline
            else rehearsals.of_edits(edits, replace(like, strength=default_strength(edits)))
            for task, edits in self.pipelines.tasks().items()
        }
        self._limits = {
            kind: Limits(
                sizes,
                GUIDANCE,
                settings.max_images if described(kind_pipeline).count is not None else 1,
                settings.max_prompt_characters,
            )
            for kind, kind_pipeline in self.pipelines.by_kind().items()
        }
        self.inputs = ImageInputs(
            {
                kind: described(one).draws_for_images
                for kind, one in self.pipelines.by_kind().items()
            }
        )
        self.fields = self._fields()

    def _fields(self) -> RequestFields:
        pipelines = self.pipelines.by_kind().values()
        fields = fields_of(
            dict.fromkeys(map(described, pipelines)),
            self.preset.call,
            self.preset.limits,
            work_limits(
                self.pipeline,
                self.settings,
                self.limits.sizes.longest,
                [guide for pipeline in pipelines for guide in guides_of(pipeline)],
            ),
            self.inputs.several_of(pipelines),
        )
        fields = replace(fields, loras=self.loras is not None)
        return with_components(fields, self.pipelines.components())

    @property
    def pipeline_class(self) -> str:
        return type(self.pipeline).__name__

    @property
    def kind(self) -> Kind:
        """The kind of request that the model is made for."""
        return next(iter(self.pipelines.by_kind()))

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
        return {task: self._limits[Kind(task)] for task in self.edits}

    def limits_of(self, kind: Kind) -> Limits:
        """The limits of requests of a kind."""
        return self._limits[self.pipelines.single(kind)]

    def keep_to(self, kind: Kind, limits: Limits) -> None:
        """Set the limits of requests of a kind."""
        self._limits[kind] = limits

    def drop(self, kind: Kind) -> None:
        """Stop offering requests of a kind, which is not the main one."""
        self.pipelines.drop(kind)
        self.fields = self._fields()

    def drop_scheduler(self, name: str) -> None:
        """Stop offering a scheduler, for edits too."""
        logger.warning("scheduler %s is not offered: %s fails with it", name, self.pipeline_class)
        for rehearsals in self._rehearsals.values():  # `schedulers` belongs to the first
            rehearsals.schedulers.pop(name, None)

    def refuse_steps(self, name: str | None, steps: int) -> None:
        """Refuse a number of steps of text-to-image with a scheduler (None: the pipeline's)."""
        self._rehearsals[self.kind.task].refuse(name, steps)

    @property
    def edits(self) -> tuple[str, ...]:
        """The supported edits: `image_to_image`, `inpainting`."""
        tasks = self.pipelines.tasks()
        return tuple(task for task in (IMAGE_TO_IMAGE, INPAINTING) if task in tasks)

    def resolve(
        self,
        request: ImageRequest,
        *,
        n: int = 1,
        strength: float | None = None,
        sources: Sources | None = None,
        model: str | None = None,
        rehearse: bool = True,
    ) -> Parameters:
        """Fill in the defaults and check every value. Raises InvalidRequestError with value and
        limit.

        With `sources` it is an edit, whose default size is the allowed one nearest to its source's.
        Without `rehearse`, the caller must call `check_steps`.
        """
        lora = self._lora(request, model)
        asked = request.arguments()
        components = chosen(asked, self.pipelines.components())
        kind, pipeline = kind_of(sources, components), self.pipeline_for(sources, components)
        call, limits = described(pipeline), self.limits_of(kind)
        if "prompt" in call.takes and not any(map(stands_for_prompt, asked)):
            check_prompt(request.prompt)
        if sources is not None:
            counts = {name: len(images) for name, images in sources.images.items()}
            self.inputs.check_counts(counts, [pipeline])
            check_guides(pipeline, counts)
        if n > limits.images:
            raise InvalidRequestError(f"n is {n}; the limit is {limits.images}.", param="n")
        own = {name: value for name, value in asked.items() if name not in dict(components)}
        self._check_names(own, kind, pipeline)
        given = resolve_arguments(own, pipeline, self.preset, n, limits.images)
        texts = {"prompt": request.prompt, "negative_prompt": request.negative_prompt, **given}
        check_texts(texts, limits.prompt_characters)
        seed = secrets.randbits(DRAWN_SEED_BITS) if request.seed is None else request.seed
        if seed + n - 1 > MAX_SEED:
            raise InvalidRequestError(
                f"seed is {seed} and n is {n}; the limit of seed + n - 1 is {MAX_SEED}.",
                param="seed",
            )
        leading = None if sources is None else leading_image(call, sources)
        size = size_of_tensors(given, pipeline, request.size, self.settings.max_pixels)
        if size is None:
            size = self._size(request.size, kind, None if leading is None else leading.size)
        width, height = size
        check_tensors(given, pipeline, self.preset.call, n, size)
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
            scheduler=self._resolve_scheduler(request.scheduler, kind),
            strength=resolve_strength(strength, steps, pipeline, sources),
            sources=sources,
            arguments=given,
            components=components,
            scales=scales_of(components, given, pipeline, self.preset),
            lora=lora,
            **passed,
        )
        if rehearse:
            self.check_steps(parameters)
        return parameters

    def named(self, model: str, param: str | None = None) -> str | None:
        """The LoRA that a request means by a name of a model; see `ModelNames.check`."""
        if model in self.names.listed:  # the usual case, which needs no look at a directory
            return None
        return self.names.check(model, param, () if self.loras is None else self.loras.names())

    def may_name_lora(self, request: ImageRequest, model: str | None) -> bool:
        """Whether a request names a LoRA, or perhaps, as its model."""
        return bool(request.lora) or (model is not None and model not in self.names.listed)

    def doubts(self, model: str | None) -> list[str]:
        """Warnings about a name of a model that requests may use, and perhaps did not mean."""
        if model is None or self.loras is None or model in self.names.listed:
            return []
        return self.names.doubts(model, self.loras.names())

    def _lora(self, request: ImageRequest, model: str | None) -> tuple[tuple[str, float], ...]:
        """The LoRAs of a request, also that which its model is called by. Raises NotFoundError, and
        InvalidRequestError."""
        meant = None if model is None else self.named(model, "model")
        given = [] if meant is None else [(meant, 1.0)]
        given += [(one.name, one.scale) for one in request.lora or ()]
        if given and self.loras is None:
            raise InvalidRequestError(
                f"lora is set, but {self.pipeline_class} has none here; STEPWEAVE_LORAS sets them.",
                param="lora", code="unsupported",
            )  # fmt: skip
        if given and self.loras is not None:
            given = [(self._named_lora(name), scale) for name, scale in given]
            self.loras.check(given)
        return tuple(given)

    def _named_lora(self, name: str) -> str:
        if ":" not in name:  # the usual case, which needs no look at a directory
            return name
        known = () if self.loras is None else self.loras.names()
        found = self.names.lora(name, known)
        if found is None:
            raise InvalidRequestError(f"lora is {shown(name)}: {LORA_TEXT}.", param="lora")
        return found

    def _check_names(self, given: Collection[str], kind: Kind, pipeline: Any) -> None:
        """Raise InvalidRequestError for an argument that only another kind of request has."""
        for name in given:
            if name in described(pipeline).arguments:
                continue
            if name == IP_ADAPTER_SCALE and IP_ADAPTER in dict(kind.components):
                continue
            others = [
                with_(other)
                for other, one in self.pipelines.by_kind().items()
                if name in described(one).arguments
            ]
            told = f"; requests {' or '.join(dict.fromkeys(others))} have it" if others else ""
            raise InvalidRequestError(
                f"{name} is set, but {described(pipeline).pipeline}, for requests {with_(kind)}, "
                f"has no {name}{told}.",
                param=name,
            )

    def size_of_edit(
        self, source: tuple[int, int], size: str | None, *, masked: bool, count: int = 1
    ) -> tuple[int, int]:
        """Width and height of the image of an edit that has the size of the result, or of a
        reference: `source` itself, unless it is larger than results may be. `size` is that of the
        result; without it, it is the allowed size nearest to `source`. Raises InvalidRequestError
        if the size or the kind of edit is not supported."""
        kind = Kind(INPAINTING if masked else IMAGE_TO_IMAGE)
        pipeline = self._pipeline_of_edits(kind)
        if described(pipeline).scaled is None or scales_images(pipeline):
            return self.size_of_reference(source, count)
        return self.size_of_image(kind, self._size(size, kind, source))

    def size_of_reference(self, source: tuple[int, int], count: int = 1) -> tuple[int, int]:
        """Width and height of an image that the pipeline scales itself: its own, or, if it has more
        than `STEPWEAVE_MAX_PIXELS` pixels, as many. All of `count` such images may have FULL times
        as many together."""
        return at_most(source, self.settings.max_pixels * FULL // max(FULL, count))

    def _size(
        self, size: str | None, kind: Kind, source: tuple[int, int] | None
    ) -> tuple[int, int]:
        """Width and height of a result: `size`; else, of references, the model's own number of
        pixels in the proportions of the first; else the allowed size nearest to that of the image
        that it begins with."""
        limits = self.limits_of(kind)
        if size is not None and size != "auto":
            return limits.sizes.read(size)
        native = self.width, self.height
        if source is None:
            return native
        if described(self.pipelines.of(kind)).scaled is None:
            return limits.sizes.like(source, native[0] * native[1])
        enlargement = self.inputs.enlargements.get(kind, 1)
        enlarged = source[0] * enlargement, source[1] * enlargement
        return limits.sizes.of_edit(enlarged, native[0] * native[1])

    def _pipeline_of_edits(self, kind: Kind) -> Any:
        pipeline = self.pipelines.of(kind)
        if pipeline is not None:
            return pipeline
        masked = kind.task == INPAINTING
        if not masked and self.pipelines.of(Kind(INPAINTING)) is self.pipeline:
            raise InvalidRequestError(
                f"mask is missing: {self.pipeline_class} repaints the part of an image that a mask "
                "shows. Send one, or an image that is transparent there.",
                param="mask",
                code="missing_field",
            )
        task = "inpainting" if masked else "image-to-image"
        why = "mask is set, or image has transparency" if masked else "image is set"
        raise InvalidRequestError(
            f"{why}, but {self.pipeline_class} does not support {task}.",
            param="mask" if masked else "image",
            code="unsupported",
        )

    def pipeline_for(self, sources: Sources | None, components: Chosen = ()) -> Any:
        """The pipeline for a request with such sources and components. Raises InvalidRequestError
        if the model does not support it, an image is missing, or mask and image differ in size."""
        kind = kind_of(sources, components)
        if kind.task == TEXT_TO_IMAGE:
            pipeline = self.pipelines.of(kind)
            if pipeline is None:
                raise missing(described(self.pipeline), ())
        else:
            pipeline = self._pipeline_of_edits(kind)
        call = described(pipeline)
        known = self.pipelines.components()
        if known and sources is not None:
            check_named(call, sources, components, known)
        if sources is None:
            if kind.shown_images:
                raise missing(call, (), components)
            return pipeline
        check_images(call, sources, components)
        if sources.mask is not None and call.scaled is not None:
            leading = leading_image(call, sources)
            assert leading is not None  # a mask has an image
            size, other = sources.mask.size, leading.size
            if size != other:
                (width, height), (other_width, other_height) = size, other
                raise InvalidRequestError(
                    f"mask is {width}x{height} and image {other_width}x{other_height}; they must "
                    f"have the same size.",
                    param="mask",
                )
        return pipeline

    def check_shown(self, request: ImageRequest) -> None:
        """Raise InvalidRequestError if a request without images names a component that needs
        one."""
        components = chosen(request.arguments(), self.pipelines.components())
        if Kind(TEXT_TO_IMAGE, components).shown_images:
            self.pipeline_for(None, components)

    def note_several(self, pipeline: Any, name: str) -> None:
        """Note that a pipeline takes several images of that name."""
        self.inputs.note_several(pipeline, name)
        self.fields = self._fields()

    def check_counts(self, counts: Mapping[str, int]) -> None:
        """Raise InvalidRequestError for more images of one name than any pipeline takes."""
        kinds = self.pipelines.by_kind()
        self.inputs.check_counts(counts, list(kinds.values()), self.pipelines.most_together)

    def leading(self, given: Collection[str]) -> str:
        """Which of the images of a request decides about the size of its result."""
        return leading_name(given, self.pipelines.by_kind().values())

    def hints(self, given: Collection[str]) -> frozenset[str]:
        """Which of the images of a request guide a component, or the pipeline itself."""
        return hint_names(given, self.pipelines.of(Kind(IMAGE_TO_IMAGE)))

    def is_repainted(self, name: str) -> bool:
        """Whether the transparency of an image of this name may say what is repainted."""
        return is_repainted(name, self.pipelines.by_kind().values())

    @property
    def takes_alpha(self) -> bool:
        """Whether the pipeline's autoencoder takes images with transparency."""
        return takes_alpha(self.pipeline)

    def size_of_image(self, kind: Kind, size: tuple[int, int]) -> tuple[int, int]:
        """The size of the image that a result of this size begins with."""
        return self.inputs.size_of_image(kind, size)

    def makes_only(self, size: tuple[int, int]) -> None:
        """Note that all results have this size, whatever is asked for."""
        self.width, self.height = size
        for kind, limits in self._limits.items():
            self._limits[kind] = replace(limits, sizes=replace(limits.sizes, only=size))

    def enlarges(self, kind: Kind, times: int) -> None:
        """Note that results of a kind of request have sides `times` as long as their image's."""
        self.inputs.enlargements[kind] = times
        limits = self._limits[kind]
        sizes = replace(limits.sizes, multiple=limits.sizes.multiple * times, native=None)
        self._limits[kind] = replace(limits, sizes=sizes)
        if kind == self.kind:
            self.width, self.height = self.width * times, self.height * times

    def _resolve_scheduler(self, name: str | None, kind: Kind) -> str | None:
        """The scheduler's name; None if it is the pipeline's own. Raises InvalidRequestError."""
        if name is None:
            return None
        allowed = self._rehearsals[kind.task].schedulers
        if name not in allowed:
            choice = ", ".join(allowed) or "only its own"
            raise InvalidRequestError(
                f"scheduler is {shown(name)}; {type(self.pipelines.of(kind)).__name__} supports "
                f"{choice}.",
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
        return self._rehearsals[kind_of(parameters.sources, parameters.components).task]

    def knows_steps(self, parameters: Parameters) -> bool:
        """Whether `check_steps` is immediate; otherwise it takes some 0.1 ms a step."""
        if self._own_times(parameters):
            return True
        course = self._course(parameters)
        return self._rehearsals_for(parameters).knows(parameters.scheduler, course)

    def runs(self, parameters: Parameters) -> bool:
        """Whether the scheduler runs with this number of steps, in a rehearsal."""
        if self._own_times(parameters) or not takes(
            self._pipeline_of(parameters), "num_inference_steps"
        ):
            return True
        return self._rehearsals_for(parameters).runs(parameters.scheduler, self._course(parameters))

    @property
    def schedulers_of_edits(self) -> dict[str, list[str]]:
        """What requests for each of `edits` may name, where it is not the same."""
        found = {task: sorted(self._rehearsals[task].schedulers) for task in self.edits}
        return {task: names for task, names in found.items() if names != sorted(self.schedulers)}

    @property
    def scheduler_steps(self) -> dict[str, dict[str, list[int]]]:
        """Tried numbers of steps, `works` and `fails`, of schedulers that fail with some."""
        rehearsals = self._rehearsals[self.kind.task]
        tried = {name: rehearsals.tried(name) for name in self.schedulers}
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
        """Warnings about values of a request that have no effect, or not all of it."""
        pipeline = self._pipeline_of(parameters)
        return [
            *warnings_of(pipeline, self.preset.call, parameters, request.prompt),
            *spelling_warnings(self.embeddings, parameters),
        ]

    def latent_positions(self, width: int, height: int) -> int:
        """Latent positions of an image of `width` x `height` pixels, before packing or patching."""
        return latent_positions(self.pipeline, width, height)

    def drop_edits(self, engine: StepEngine) -> None:
        """Stop offering edits that the engine cannot run; call it before serving."""
        for kind, pipeline in self.pipelines.by_kind().items():
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
        pipeline = self._pipeline_of(parameters)
        kind = self.pipelines.single(kind_of(parameters.sources, parameters.components))
        options = {"pipeline": pipeline} if pipeline is not self.pipeline else {}
        if parameters.scheduler is not None:
            options["scheduler"] = self.schedulers[parameters.scheduler]
        arguments = call_arguments(
            pipeline,
            self.preset.call,
            parameters,
            enlargement=self.inputs.enlargements.get(kind, 1),
            copies=self.inputs.copies[kind],
        )
        if IP_ADAPTER in dict(parameters.components):
            arguments |= ip_adapter_arguments(pipeline, parameters)
        return {**options, **arguments}

    def _pipeline_of(self, parameters: Parameters) -> Any:
        return self.pipeline_for(parameters.sources, parameters.components)


def _default_steps(pipeline: Any) -> int:
    """The pipeline's own number of steps: of its call, or of its configuration."""
    own = default_of(pipeline, "num_inference_steps")
    config = getattr(pipeline, "config", {})
    return int(own or config.get("default_denoising_steps") or 50)
