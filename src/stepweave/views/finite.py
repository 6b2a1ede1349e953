"""Whether the numbers that images are made of are finite: of NaN a pipeline makes black pixels, and
raises nothing."""

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
    """Looks, within a block, at what a view makes images of, on the thread that makes them.

    Where a pipeline makes its images in a way of its own, the `last` result of its models tells.
    Tensors and arrays that the caller has asked for are given as they are: there NaN can be seen.
    """

    def __init__(self, view: Any, last: Callable[[], Any] = lambda: None) -> None:
        self._finite = True
        self._last = last
        self._seen: Any = None  # the last result of a model, of which images were made
        self._left = contextlib.ExitStack()
        for owner, name, method in _makers(view):
            self._left.callback(replaced(owner, name, self._looking(method)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._left.close()
        self._seen = None

    def checked(self, output: Any) -> Any:
        """What the call returned. Raises NonFiniteError where that hides numbers that are not
        finite."""
        made = getattr(
            output, "images", output[0] if isinstance(output, tuple) and output else output
        )
        if next(_numbers(made), None) is not None:
            return output
        for image in made if isinstance(made, (list, tuple)) else ():
            if getattr(image, "mode", None) == "F":
                self._look(np.array(image))
        last = self._last()
        if last is not self._seen:
            self._look(last)
        if not self._finite:
            raise NonFiniteError
        return output

    def _looking(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._look([args, kwargs])
            self._seen = self._last()
            # an error says so later
            with contextlib.nullcontext() if self._finite else np.errstate(invalid="ignore"):
                return method(*args, **kwargs)

        return run

    def _look(self, value: Any) -> None:
        for numbers in _numbers(value):
            self._finite = self._finite and bool(numbers.isfinite().all())


def _makers(view: Any) -> Iterator[Method]:
    """The methods of a view by which images are made of numbers."""
    for one in pipelines_in(view):
        if callable(method := getattr(one, "numpy_to_pil", None)):
            yield one, "numpy_to_pil", method
    yield from methods_of_processors(view, POSTPROCESS)


def _numbers(value: Any) -> Iterator[torch.Tensor]:
    """The tensors and arrays of floating-point numbers in a value; images are none."""
    for item in flat(value):
        if isinstance(item, np.ndarray) and item.dtype.kind in "fc":
            item = torch.from_numpy(np.ascontiguousarray(item))
        if isinstance(item, torch.Tensor) and (item.is_floating_point() or item.is_complex()):
            yield item
