"""Methods of a view's image processors; temporary replacement of attributes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from stepweave.compat.cpu_offload import pipelines_in

POSTPROCESS = ("postprocess", "postprocess_video")  # methods that make images of tensors
Method = tuple[Any, str, Callable[..., Any]]  # its object, its name, and what to call instead


def methods_of_processors(
    view: Any, names: Sequence[str], kinds: tuple[type, ...] = (object,)
) -> Iterator[Method]:
    """The methods of these `names` of a view's image processors, which are of these `kinds`."""
    for pipeline in pipelines_in(view):
        for processor in list(vars(pipeline).values()):
            if isinstance(processor, kinds) and not isinstance(
                processor, (nn.Module, DiffusionPipeline)
            ):
                for name in names:
                    if callable(method := getattr(processor, name, None)):
                        yield processor, name, method


def replaced(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute; returns a function that restores it. A bound method of the owner, left
    there, would be a reference cycle."""
    before = owner.__dict__.get(name)
    owner.__dict__[name] = value

    def put_back() -> None:
        if owner.__dict__.get(name) is value:
            del owner.__dict__[name]
            if before is not None:
                owner.__dict__[name] = before

    return put_back
