"""Moves the work of a view's image processors to image threads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from diffusers.image_processor import InpaintProcessor, VaeImageProcessor
from PIL import Image

from stepweave.compat.values import comes_with_a_library
from stepweave.views.attributes import POSTPROCESS, Method, methods_of_processors, replaced

# Calls a function, on an image thread if possible. Its second argument: whether the function's code
# is known, that is a library's.
OnThread = Callable[[Callable[[], Any], bool], Any]


@contextlib.contextmanager
def images_on_threads(view: Any, on_thread: OnThread | None) -> Iterator[None]:
    """Within the block, the view's image processors do their work by `on_thread`, if given."""
    with contextlib.ExitStack() as stack:
        if on_thread is None:
            yield
            return
        for owner, name, method in _image_methods(view):
            known = comes_with_a_library(type(owner))
            stack.callback(replaced(owner, name, _moved(method, known, on_thread)))
        yield


def _moved(method: Callable[..., Any], known: bool, on_thread: OnThread) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return on_thread(partial(method, *args, **kwargs), known)

    return run


def _image_methods(view: Any) -> Iterator[Method]:
    """The methods of a view's image processors that read and make images."""
    kinds = (VaeImageProcessor, InpaintProcessor)  # others may be shared with other views
    for owner, name, method in methods_of_processors(
        view, ("preprocess", "preprocess_video"), kinds
    ):
        yield owner, name, _each_once(method)
    yield from methods_of_processors(view, POSTPROCESS)


def _each_once(method: Callable[..., Any]) -> Callable[..., Any]:
    """A `preprocess` that reads a repeated image only once."""
    if getattr(method, "__func__", None) is not VaeImageProcessor.preprocess:
        return method

    def run(image: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        count = len(image) if isinstance(image, list) else 1
        first = image[0] if count > 1 else None
        alike = isinstance(first, Image.Image) and all(item is first for item in image)
        read: torch.Tensor = method(image[:1] if alike else image, *args, **kwargs)
        return read.repeat(count, *[1] * (read.ndim - 1)) if alike else read

    return run
