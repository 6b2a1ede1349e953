"""The images of requests: what is missing or too many, which one decides about the size of the
result, and how they are passed to the pipeline."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from stepweave.adapters.control_pipelines import guides_of
from stepweave.calls import CONTROL_IMAGE, CallDescription, described
from stepweave.config.components import GUIDES, IP_ADAPTER
from stepweave.errors import InvalidRequestError
from stepweave.parameters import Sources
from stepweave.serving.kinds import (
    IP_ADAPTER_IMAGE,
    IP_ADAPTER_MASK,
    OF_COMPONENTS,
    Chosen,
    Kind,
)

Size = tuple[int, int]


@dataclass
class ImageInputs:
    """What the warm-up has found out about the images of a model's pipelines.

    By kind of request: `copies`, whether the image is passed once for each result, and
    `enlargements`, how many times as long as those of its image the sides of a result are.
    """

    copies: dict[Kind, bool]
    enlargements: dict[Kind, int] = field(default_factory=dict)
    _several: dict[str, frozenset[str]] = field(default_factory=dict)  # by class

    def note_several(self, pipeline: Any, name: str) -> None:
        """Note that a pipeline takes several images of that name."""
        kind = type(pipeline).__name__
        self._several[kind] = self._several.get(kind, frozenset()) | {name}

    def takes_several(self, pipeline: Any, given: str) -> bool:
        """Whether a pipeline takes several images that a request calls so."""
        call = described(pipeline)
        name = call.name_of(given)
        if name is not None and name == call.control and len(guides_of(pipeline)) > 1:
            return True
        return name in self._several.get(type(pipeline).__name__, ())

    def several_of(self, pipelines: Iterable[Any]) -> frozenset[str]:
        """The images, by the requests' names, of which one of the pipelines takes several."""
        return frozenset(
            name
            for pipeline in pipelines
            for name in ("image", CONTROL_IMAGE, *described(pipeline).images)
            if self.takes_several(pipeline, name)
        )

    def check_counts(
        self, counts: Mapping[str, int], pipelines: Collection[Any], guides: int = 1
    ) -> None:
        """Raise InvalidRequestError for more images of one name than any of the pipelines takes; of
        those for ControlNets, there may be `guides`."""
        for given, count in counts.items():
            if given == CONTROL_IMAGE and count <= guides:
                continue
            if count > 1 and not any(self.takes_several(one, given) for one in pipelines):
                kind = type(next(iter(pipelines))).__name__
                raise InvalidRequestError(
                    f"{given} is given {count} times; {kind} takes one.", param=given
                )

    def size_of_image(self, kind: Kind, size: Size) -> Size:
        """The size of the image that a result of this size begins with."""
        enlargement = self.enlargements.get(kind, 1)
        return size[0] // enlargement, size[1] // enlargement


def check_guides(pipeline: Any, counts: Mapping[str, int]) -> None:
    """Raise InvalidRequestError unless there is an image for each of several ControlNets."""
    call, guides = described(pipeline), len(guides_of(pipeline))
    for given, count in counts.items():
        if guides > 1 and call.name_of(given) == call.control and count != guides:
            times = "once" if count == 1 else f"{count} times"
            raise InvalidRequestError(
                f"{given} is given {times}; {guides} are needed, in the order of the "
                f"{type(guides_of(pipeline)[0]).__name__}s that they guide.",
                param=given,
            )


def check_images(call: CallDescription, sources: Sources, components: Chosen = ()) -> None:
    """Raise InvalidRequestError for images that a pipeline does not take, or that are missing."""
    named: dict[str, str] = {}
    adapts = IP_ADAPTER in dict(components)
    if adapts and IP_ADAPTER_IMAGE not in sources.images:
        raise _lacks_ip_adapter_image()
    for given in sources.images:
        if adapts and given in (IP_ADAPTER_IMAGE, IP_ADAPTER_MASK):
            continue
        name = call.name_of(given)
        if name is None:
            raise InvalidRequestError(
                f"{given} is set, but {call.pipeline} has no {given}; its images are "
                f"{', '.join(call.images)}.",
                param=given,
            )
        if name in named:
            raise InvalidRequestError(
                f"{named[name]} and {given} are both set; they mean the same.", param=given
            )
        named[name] = given
    if any(name not in named for name in call.needs_images):
        raise missing(call, named, components)


def missing(
    call: CallDescription, given: Collection[str], components: Chosen = ()
) -> InvalidRequestError:
    """The error of a request without images that the pipeline needs; `given` are those that it has,
    by the pipeline's names."""
    if not call.needs_images and IP_ADAPTER in dict(components):
        return _lacks_ip_adapter_image()
    guided = any(field in GUIDES for field, _ in components)
    names = {call.control: CONTROL_IMAGE} if guided else {}
    absent = [names.get(name, name) for name in call.needs_images if name not in given]
    needs = [names.get(name, name) for name in call.needs_images]
    verb = "is" if len(absent) == 1 else "are"
    return InvalidRequestError(
        f"{' and '.join(absent)} {verb} missing: {call.pipeline} makes images from "
        f"{', '.join(needs)}. Send them to /v1/images/edits as files, or as data URLs.",
        code="missing_field",
        param="image" if absent[0] == call.image and not guided else absent[0],
    )


def _lacks_ip_adapter_image() -> InvalidRequestError:
    return InvalidRequestError(
        f"{IP_ADAPTER_IMAGE} is missing: {IP_ADAPTER} makes images like it. Send it to "
        "/v1/images/edits as a file, or as a data URL.",
        code="missing_field",
        param=IP_ADAPTER_IMAGE,
    )


def check_named(
    call: CallDescription,
    sources: Sources,
    components: Chosen,
    known: Mapping[str, Collection[str]],
) -> None:
    """Raise InvalidRequestError for an image of a component if the request names none; `known` are
    those that there are."""
    takes = call.name_of(CONTROL_IMAGE) is not None  # without a component, too
    named = {one for one, _ in components}
    for image, fields in (
        (CONTROL_IMAGE, [] if takes else [one for one in known if one in GUIDES]),
        (IP_ADAPTER_IMAGE, [one for one in known if one == IP_ADAPTER]),
        (IP_ADAPTER_MASK, [one for one in known if one == IP_ADAPTER]),
    ):
        if image in sources.images and fields and not named & set(fields):
            choices = " or ".join(f"{one} to {', '.join(known[one])}" for one in fields)
            raise InvalidRequestError(
                f"{image} is set, but not what it is for; set {choices}.",
                code="missing_field",
                param=fields[0],
            )


def leading_name(given: Collection[str], pipelines: Iterable[Any]) -> str:
    """Which of the images of a request, by its names, decides about the size of the result."""
    for pipeline in pipelines:
        call = described(pipeline)
        for name in given:
            if call.scaled is not None and call.name_of(name) == call.scaled:
                return name
    return "image" if "image" in given else next(iter(given))


def hint_names(given: Collection[str], edits: Any) -> frozenset[str]:
    """Which of the images of a request, by its names, guide a component; also what a pipeline for
    edits that is itself guided calls `image`."""
    found = {CONTROL_IMAGE, IP_ADAPTER_MASK}
    if edits is not None and CONTROL_IMAGE not in given:
        call = described(edits)
        if call.control is not None and call.control == call.image:
            found.add("image")
    return frozenset(found.intersection(given))


def is_repainted(name: str, pipelines: Iterable[Any]) -> bool:
    """Whether an image that requests call so is one that an edit begins with, in which case its
    transparency may say what is repainted."""
    return name == "image" or (
        name not in OF_COMPONENTS
        and any(
            call.scaled is not None and call.name_of(name) == call.scaled
            for call in map(described, pipelines)
        )
    )


def leading_image(call: CallDescription, sources: Sources) -> Image.Image | None:
    """The image that decides about the size of a result; None if that of an IP-Adapter is the only
    one."""
    if not sources.images.keys() - {IP_ADAPTER_IMAGE, IP_ADAPTER_MASK}:
        return None
    named = {call.name_of(given): images[0] for given, images in sources.images.items()}
    return named.get(call.scaled, sources.image)


def at_most(size: Size, pixels: int) -> Size:
    """A size, or the one with its proportions that has so many pixels."""
    scale = math.sqrt(pixels / math.prod(size))
    if scale >= 1:
        return size
    width, height = (max(1, int(side * scale)) for side in size)
    return min(width, pixels // height), min(height, pixels // width)


def takes_alpha(pipeline: Any) -> bool:
    """Whether the pipeline's autoencoder takes images with transparency."""
    config = getattr(getattr(pipeline, "vae", None), "config", {})
    return 4 in (config.get("in_channels"), config.get("input_channels"))
