"""The fields that a model adds to every request: the arguments and images of all its pipelines."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from stepweave.calls.argument import Argument, has_scalar
from stepweave.calls.bounds import MOST_ELEMENTS, Bounds, WorkLimits, bounds_of
from stepweave.calls.description import CONTROL_IMAGE, CallDescription
from stepweave.calls.tensors import bounds_of_tensor, stands_for_prompt


@dataclass(frozen=True)
class ArgumentField:
    """An argument, and the bounds of its numbers or the length of its texts."""

    argument: Argument
    bounds: Bounds


@dataclass(frozen=True, eq=False)
class RequestFields:
    """What requests to one model may have beside the fields that all models have.

    `images` are names of files, `image` and `mask` included; `same` are their names that mean one
    of these, and `several` those that a request may have several times. `prompt` is whether the
    model takes one; `needs` are the arguments that every request must have; `loras` is whether
    requests may name some.
    """

    arguments: Mapping[str, ArgumentField] = field(default_factory=dict)
    images: Mapping[str, Argument] = field(default_factory=dict)
    same: Mapping[str, str] = field(default_factory=lambda: {"images": "image"})
    several: Collection[str] = ()
    prompt: bool = True
    needs: tuple[str, ...] = ()
    loras: bool = False

    @property
    def files(self) -> dict[str, Argument]:
        """The images without names that mean others."""
        return {name: one for name, one in self.images.items() if name not in self.same}

    @property
    def needs_image(self) -> bool:
        """Whether every edit has an `image`, since no other image can do without it."""
        return not self.files.keys() - {"image", "mask"}

    @property
    def tensors(self) -> dict[str, Argument]:
        """The arguments that are tensors."""
        known = {name: one.argument for name, one in self.arguments.items()}
        return {name: one for name, one in known.items() if one.type == "tensor"}

    @property
    def for_prompt(self) -> tuple[str, ...]:
        """The arguments with which a request needs no prompt."""
        return tuple(filter(stands_for_prompt, self.tensors))


NONE = RequestFields()  # of a model that is not known yet


def fields_of(
    descriptions: Iterable[CallDescription],
    defaults: Mapping[str, Any],
    offered: Mapping[str, Any],
    limits: WorkLimits,
    several: Collection[str] = (),
) -> RequestFields:
    """The fields of a model whose pipelines have these calls, its main one first.

    `defaults` are a preset's arguments of every call, which need not be sent; `offered` are a
    preset's own bounds by name, `False` for an argument that requests must not set; `several` are
    images, by the requests' names, that a pipeline is known to take several of.
    """
    first, *others = descriptions
    arguments: dict[str, ArgumentField] = {}
    images: dict[str, Argument] = {}
    same = {"images": "image"}
    for description in (first, *others):
        for name, argument in description.arguments.items():
            if offered.get(name) is False or name in arguments:
                continue
            bounds = _bounds(argument, defaults.get(name), offered.get(name), limits)
            if bounds is not None:
                arguments[name] = ArgumentField(argument, bounds)
        for name, known in (("image", description.image), ("mask", description.mask)):
            if known == CONTROL_IMAGE and description is not first:
                continue  # of a component: `image` is what an edit begins with
            if known is not None and offered.get(known) is not False:
                images.setdefault(name, description.images[known])
                if known != name:
                    same[known] = name
        if description.control is not None and offered.get(description.control) is not False:
            images.setdefault(CONTROL_IMAGE, description.images[description.control])
        for name, argument in description.images.items():
            if offered.get(name) is not False:
                images.setdefault(name, argument)
    needs = tuple(
        name for name in first.needs if name in first.arguments and defaults.get(name) is None
    )
    return RequestFields(arguments, images, same, several, "prompt" in first.takes, needs)


def _bounds(argument: Argument, default: Any, offered: Any, limits: WorkLimits) -> Bounds | None:
    if argument.type == "tensor":
        return bounds_of_tensor(argument.name, offered, limits.tables)
    if has_scalar(argument.value, str):
        return Bounds(0, 0, limits.images, limits.characters)  # each text of a list costs as much
    if not has_scalar(argument.value, int) and not has_scalar(argument.value, float):
        return Bounds(0, 1)  # a flag or a choice
    known = bounds_of(
        argument.name,
        [argument.default, default],  # the larger of the two counts
        integer=not has_scalar(argument.value, float),
        limits=limits,
    )
    if offered is None:
        return known
    length = MOST_ELEMENTS if known is None else known.length
    return Bounds(offered[0], offered[1], length)
