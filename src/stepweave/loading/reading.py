"""Watches what `from_pretrained` reads, and refuses models with missing tensors."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from torch import nn
from transformers import PreTrainedModel

from stepweave.errors import LoadError
from stepweave.loading.components import Component

NAMED = 3  # keys that a message names; others are counted
_MODELS = (PreTrainedModel, ModelMixin)


class Reading:
    """Watches the components of one model while it is loaded on the current thread.

    DiffusionPipeline does not check for tensors that are missing in files, and transformers fills
    them with random numbers. Within `watched`, they raise LoadError.
    """

    def __init__(
        self,
        folder: Path,
        components: Iterable[Component],
        on_begin: Callable[[str], None] = lambda name: None,
    ) -> None:
        """`on_begin` is called with the name of each component with weights, before it is read."""
        self._folder = folder
        self._on_begin = on_begin
        self._names = {
            component.kind: component.name for component in components if component.kind is not None
        }  # of those in no folder of their own
        self._kinds = {
            component.kind for component in components if isinstance(component.kind, type)
        }
        self._thread = threading.get_ident()
        self._failed: list[tuple[BaseException, str]] = []
        self.tensors: dict[str, int] = {}  # read, by component

    def failed(self, error: BaseException | None) -> str | None:
        """The component whose loading raised an exception, or None."""
        while error is not None:
            for other, name in self._failed:
                if other is error:
                    return name
            error = error.__cause__ or error.__context__
        return None

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Within the block, watch every `from_pretrained` on this thread."""
        with contextlib.ExitStack() as stack:
            for kind in _MODELS:
                stack.enter_context(self._replaced(kind, self._read))
            for kind in self._kinds.difference(_MODELS):
                if callable(getattr(kind, "from_pretrained", None)):
                    stack.enter_context(self._replaced(kind, self._attribute))
            yield

    @contextlib.contextmanager
    def _replaced(self, kind: Any, watch: Any) -> Iterator[None]:
        own = vars(kind).get("from_pretrained")
        original = inspect.getattr_static(kind, "from_pretrained")

        def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
            load = original.__get__(None, cls)
            # diffusers passes the folder by position
            if threading.get_ident() != self._thread or not args:
                return load(*args, **kwargs)
            return watch(cls, load, *args, **kwargs)

        kind.from_pretrained = classmethod(from_pretrained)
        try:
            yield
        finally:
            if own is None:
                del kind.from_pretrained
            else:
                kind.from_pretrained = own

    def _name(self, kind: Any, path: Any) -> str:
        place = Path(path)
        return self._names.get(kind, place.name) if place == self._folder else place.name

    def _attribute(self, kind: Any, load: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(path, *args, **kwargs)
        except Exception as error:
            self._failed.append((error, self._name(kind, path)))
            raise

    def _read(self, kind: Any, load: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("output_loading_info"):
            return load(path, *args, **kwargs)
        name = self._name(kind, path)
        self._on_begin(name)
        # otherwise transformers would refuse wrong shapes without naming the tensors
        if issubclass(kind, PreTrainedModel):
            kwargs.setdefault("ignore_mismatched_sizes", True)
        model, info = self._attribute(kind, load, path, *args, output_loading_info=True, **kwargs)
        count = len(model.state_dict())
        check_tensors(f"{name}/", kind.__name__, count, info)
        self.tensors[name] = self.tensors.get(name, 0) + count
        return model


def check_tensors(place: str, kind: str, count: int, info: dict[str, Any]) -> None:
    """Raise LoadError for tensors that are missing in a model's files, or have another shape.

    `place` is named in messages, `count` the number of tensors of the class `kind`, and `info` as
    `from_pretrained` returns it.
    """
    missing, unknown = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        instead = f"; they have {listed(unknown)}, which it does not know" if unknown else ""
        raise LoadError(
            f"{place}: its weights lack {len(missing)} of the {count} tensors of {kind}: "
            f"{listed(missing)}{instead}"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        keys = [
            f"{key} is {tuple(found)}, not {tuple(wanted)}" for key, found, wanted in mismatched
        ]
        raise LoadError(f"{place}: its weights are not those of its config.json: {listed(keys)}")


def check_placed(components: dict[str, Any]) -> None:
    """Raise LoadError for a component with tensors that were not read (meta tensors)."""
    for name, model in components.items():
        if isinstance(model, nn.Module):
            tensors = [*model.named_parameters(), *model.named_buffers()]
            if absent := [key for key, tensor in tensors if tensor.is_meta]:
                raise LoadError(f"{name}/: no weights were read for {listed(absent)}")


def listed(keys: Sequence[str]) -> str:
    rest = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return ", ".join(keys[:NAMED]) + rest
