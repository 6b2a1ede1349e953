"""The kinds of requests that a model may serve."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from stepweave.calls import CONTROL_IMAGE
from stepweave.config.components import WITH_IMAGE
from stepweave.parameters import Sources

TEXT_TO_IMAGE, IMAGE_TO_IMAGE, INPAINTING = "text_to_image", "image_to_image", "inpainting"

IP_ADAPTER_IMAGE, IP_ADAPTER_MASK = "ip_adapter_image", "ip_adapter_mask"
IP_ADAPTER_SCALE = "ip_adapter_scale"
REFINER_START = "refiner_start"
OF_COMPONENTS = frozenset((CONTROL_IMAGE, IP_ADAPTER_IMAGE, IP_ADAPTER_MASK))  # images
MOST_TOGETHER = 4  # components of one request

# by the request's field, such as `controlnet`: the names of its components
Chosen = tuple[tuple[str, tuple[str, ...]], ...]


class Kind(NamedTuple):
    """A kind of request: its task, and the components beside the model that it names."""

    task: str
    components: Chosen = ()

    @property
    def shown_images(self) -> bool:
        """Whether a component needs an image of its own, such as one that guides a ControlNet."""
        return any(field in WITH_IMAGE for field, _ in self.components)

    def __str__(self) -> str:
        named = (name for _, names in self.components for name in names)
        return " with ".join((self.task, " and ".join(named))) if self.components else self.task


def kind_of(sources: Sources | None, components: Chosen = ()) -> Kind:
    """The kind of a request with these images and components."""
    kind = Kind(TEXT_TO_IMAGE, components)
    if sources is None:
        return kind
    if sources.mask is not None:
        return Kind(INPAINTING, components)
    begins = not kind.shown_images or bool(sources.images.keys() - OF_COMPONENTS)
    return Kind(IMAGE_TO_IMAGE, components) if begins else kind


def with_(kind: Kind) -> str:
    """What requests of a kind have, for messages: `with an image`."""
    images = {IMAGE_TO_IMAGE: "an image", INPAINTING: "a mask"}.get(kind.task)
    had = [*([images] if images else []), *(field for field, _ in kind.components)]
    return f"with {' and '.join(had)}" if had else "without an image"


def chosen(arguments: Mapping[str, object], fields: Collection[str]) -> Chosen:
    """The components that a request names, of these fields."""
    found = []
    for field in sorted(fields):
        value = arguments.get(field)
        if value is not None:
            names = (value,) if isinstance(value, str) else value
            assert isinstance(names, (list, tuple))
            found.append((field, tuple(names)))
    return tuple(found)
