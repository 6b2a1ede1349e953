"""Checks that the numbers that images are made of are finite: pipelines turn NaN into black pixels
without an error."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Self

import numpy as np
import torch

from stepweave.compat.cpu_offload import pipelines_in
from stepweave.compat.nested import flat
from stepweave.errors import NonFiniteError
from stepweave.views.attributes import POSTPROCESS, Method, methods_of_processors, replaced


class FiniteImages:
    """Checks, within a block, the tensors and arrays that a view makes images of, on the thread
    that makes them.

    If a pipeline uses code of its own for that, the `last` result of its models is checked.
    Tensors and arrays that the caller has asked for are not checked: NaN is visible there.
    """

    def __init__(self, view: Any, last: Callable[[], Any] = lambda: None) -> None:
        self._finite = True
        self._last = last
        self._checked: Any = None  # the last result of a model, if images were made of it
        self._stack = contextlib.ExitStack()
        for owner, name, method in _makers(view):
            self._stack.callback(replaced(owner, name, self._checking(method)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self._checked = None

    def checked(self, output: Any) -> Any:
        """Return the call's output. Raises NonFiniteError if its images were made of numbers that
        are not finite."""
        first = output[0] if isinstance(output, tuple) and output else output
        images = getattr(output, "images", first)
        if next(_numbers(images), None) is not None:
            return output
        for image in images if isinstance(images, (list, tuple)) else ():
            if getattr(image, "mode", None) == "F":
                self._check(np.array(image))
        last = self._last()
        if last is not self._checked:
            self._check(last)
        if not self._finite:
            raise NonFiniteError
        return output

    def _checking(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._check([args, kwargs])
            self._checked = self._last()
            # no warning of numpy's: `checked` raises an error
            with contextlib.nullcontext() if self._finite else np.errstate(invalid="ignore"):
                return method(*args, **kwargs)

        return run

    def _check(self, value: Any) -> None:
        for numbers in _numbers(value):
            self._finite = self._finite and bool(numbers.isfinite().all())


def _makers(view: Any) -> Iterator[Method]:
    """The methods of a view that make images of numbers."""
    for pipeline in pipelines_in(view):
        if callable(method := getattr(pipeline, "numpy_to_pil", None)):
            yield pipeline, "numpy_to_pil", method
    yield from methods_of_processors(view, POSTPROCESS)


def _numbers(value: Any) -> Iterator[torch.Tensor]:
    """The floating-point and complex tensors and arrays in a value."""
    for item in flat(value):
        if isinstance(item, np.ndarray) and item.dtype.kind in "fc":
            item = torch.from_numpy(np.ascontiguousarray(item))
        if isinstance(item, torch.Tensor) and (item.is_floating_point() or item.is_complex()):
            yield item
