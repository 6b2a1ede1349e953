"""Methods of a view's image processors, and attributes of its parts that are replaced for a
while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from stepweave.compat.cpu_offload import pipelines_in

POSTPROCESS = ("postprocess", "postprocess_video")  # what makes images
Method = tuple[Any, str, Callable[..., Any]]  # of what, its name, and what to call


def methods_of_processors(
    view: Any, names: Sequence[str], kinds: tuple[type, ...] = (object,)
) -> Iterator[Method]:
    """The methods of these names that the image processors in a view have, those of some kinds
    only."""
    for one in pipelines_in(view):
        for processor in list(vars(one).values()):
            if isinstance(processor, kinds) and not isinstance(
                processor, (nn.Module, DiffusionPipeline)
            ):
                for name in names:
                    if callable(method := getattr(processor, name, None)):
                        yield processor, name, method


def replaced(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute, and what takes it back: a method of its own, which is bound to it, would be
    a reference cycle."""
    before = owner.__dict__.get(name)
    owner.__dict__[name] = value

    def put_back() -> None:
        if owner.__dict__.get(name) is value:
            del owner.__dict__[name]
            if before is not None:
                owner.__dict__[name] = before

    return put_back
