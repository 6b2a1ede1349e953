"""The arguments of a request that only its pipeline has: whether it takes them, whether one is
missing, and how much work they mean."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

from stepweave.adapters.beside import Added
from stepweave.adapters.control_pipelines import modes_of
from stepweave.calls import (
    Argument,
    ArgumentField,
    Bounds,
    RequestFields,
    WorkLimits,
    described,
)
from stepweave.config import Settings
from stepweave.config.components import GUIDES, IP_ADAPTER, REFINER, VAE
from stepweave.config.preset import Preset
from stepweave.errors import InvalidRequestError
from stepweave.parameters import COMPONENTS, OWN_TIMES
from stepweave.planning.workload import multiplies_work
from stepweave.serving.kinds import (
    IP_ADAPTER_IMAGE,
    IP_ADAPTER_MASK,
    IP_ADAPTER_SCALE,
    MOST_TOGETHER,
    REFINER_START,
    Chosen,
)

MOST_SCALE = 10.0  # of an IP-Adapter
_SCALE = Argument(
    IP_ADAPTER_SCALE, "number", float, 1.0, description="How much the IP-Adapter counts."
)
_IP_ADAPTER_IMAGES = (
    Argument(IP_ADAPTER_IMAGE, "image", description="What the result is like."),
    # an image, since it may have another size than the result's
    Argument(IP_ADAPTER_MASK, "image", description="White where `ip_adapter_image` counts."),
)
# of components, by field: what they are for
_WHAT = {
    IP_ADAPTER: "Which IP-Adapter makes it like `ip_adapter_image`",
    REFINER: "Which refiner takes over at `refiner_start`, the share of the steps before it",
    VAE: "Which autoencoder decodes it, and encodes its images",
}
TRAIN_TIMESTEPS = 1000  # of schedulers that do not say how many they have


def work_limits(
    pipeline: Any, settings: Settings, side: int, guides: Iterable[Any] = ()
) -> WorkLimits:
    """The limits of a server and its model that bound arguments; `side` is the longest side of an
    image, `guides` are the ControlNets of all its pipelines."""
    scheduler = getattr(getattr(pipeline, "scheduler", None), "config", {})
    denoiser = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)
    config = getattr(denoiser, "config", None)
    codes = getattr(config, "prior_vq_quantizer_codebook_size", None)
    classes = (getattr(config, name, None) for name in ("num_embeds_ada_norm", "num_class_embeds"))
    return WorkLimits(
        steps=settings.max_steps,
        images=settings.max_images,
        side=side,
        pixels=settings.max_pixels,
        characters=settings.max_prompt_characters,
        train_timesteps=scheduler.get("num_train_timesteps") or TRAIN_TIMESTEPS,
        modes=modes_of(guides),
        classes=next((number for number in classes if isinstance(number, int)), None),
        tables={"prior_token_ids": codes} if isinstance(codes, int) else {},
    )


def with_components(
    fields: RequestFields, components: Mapping[str, Mapping[str, Added]]
) -> RequestFields:
    """The fields of a model, and one for each kind of `components`, by the names of which requests
    choose them."""
    arguments = dict(fields.arguments)
    for field, known in components.items():
        one: Any = Literal[tuple(known)]
        guides = field in GUIDES
        what = _WHAT.get(field) or f"Which {GUIDES[field]} guides the image, by `control_image`"
        told = "; ".join(
            f"`{name}` is {type(added.model).__name__}"
            + (f", {added.description.removesuffix('.')}" if added.description else "")
            for name, added in known.items()
        )
        argument = Argument(
            field,
            "string",
            one | list[one] if guides else one,
            description=f"{what}: {told}.",
        )
        bounds = Bounds(0, 0, min(len(known), MOST_TOGETHER))
        arguments[field] = ArgumentField(argument, bounds)
    if IP_ADAPTER not in components:
        return replace(fields, arguments=arguments)
    arguments[IP_ADAPTER_SCALE] = ArgumentField(_SCALE, Bounds(0, MOST_SCALE))
    images = {**fields.images, **{one.name: one for one in _IP_ADAPTER_IMAGES}}
    return replace(fields, arguments=arguments, images=images)


def resolve_arguments(
    given: Mapping[str, Any], pipeline: Any, preset: Preset, n: int, images: int
) -> dict[str, Any]:
    """Check a request's arguments for its pipeline, whose limit is so many `images`.

    Raises InvalidRequestError for one that is missing, and for more work than `n` images may be.
    """
    call = described(pipeline)
    work = float(n)
    for name, value in given.items():
        if multiplies_work(name) and isinstance(value, int):
            usual = preset.call.get(name) or call.arguments[name].default or 1
            work *= max(1.0, value / usual)
    if n > 1 and work > images:
        raise InvalidRequestError(
            f"n is {n}; with the other values, which multiply the work of an image, it is as much "
            f"as that of {math.ceil(work)} images; the limit is {images}.",
            param="n",
        )
    start = given.get(REFINER_START)
    if start is not None and not 0 < start < 1:
        raise InvalidRequestError(
            f"{REFINER_START} is {start:g}; it must be more than 0 and less than 1.",
            param=REFINER_START,
        )
    for name in call.needs:
        if name in call.arguments and name not in given and preset.call.get(name) is None:
            raise InvalidRequestError(
                f"{name} is missing: {call.pipeline} needs it.", code="missing_field", param=name
            )
    return dict(given)


def scales_of(
    components: Chosen, given: Mapping[str, Any], pipeline: Any, preset: Preset
) -> tuple[tuple[str, Any], ...]:
    """How much each of a request's components counts where the request does not say, as its files
    tell it."""
    known = described(pipeline).arguments
    found = []
    for field, _ in components:
        name = COMPONENTS[field]
        if name is None or name in given:
            continue
        own = _SCALE.default if name == IP_ADAPTER_SCALE else None
        value = preset.call.get(name, known[name].default if name in known else own)
        if value is not None:
            found.append((name, value))
    return tuple(found)


def resolve_steps(
    asked: int | None,
    default: int,
    most: int,
    pipeline: Any,
    arguments: Mapping[str, Any],
    given: Mapping[str, Any],
) -> int:
    """The number of steps: as many as a request's own timesteps or sigmas, if it has any; of a
    pipeline with a number for each of its stages, their sum.

    `given` are the request's arguments, `arguments` those with a preset's. Raises
    InvalidRequestError if it is more than `most`, or contradicts an argument.
    """
    call = described(pipeline)
    if "num_inference_steps" not in call.takes:
        if asked is not None:
            names = ", ".join(call.steps) or "none"
            raise InvalidRequestError(
                f"num_inference_steps is {asked}, but {call.pipeline} has no such argument; its "
                f"numbers of steps are: {names}.",
                param="num_inference_steps",
            )
        stages = (arguments.get(name) or call.arguments[name].default for name in call.steps)
        return max(1, sum(stage or 1 for stage in stages))
    own = next((name for name in OWN_TIMES if given.get(name)), None)
    if own is not None:
        steps = len(given[own])
        if steps > most:
            raise InvalidRequestError(
                f"{own} has {steps} elements; the limit is {most}.", param=own
            )
        if asked not in (None, steps):
            raise InvalidRequestError(
                f"num_inference_steps is {asked}, and {own} has {steps} elements; leave one of "
                "them out, or let them agree.",
                param="num_inference_steps",
            )
        return steps
    steps = asked or default
    if steps > most:
        raise InvalidRequestError(
            f"num_inference_steps is {steps}; the limit is {most}.", param="num_inference_steps"
        )
    return steps
