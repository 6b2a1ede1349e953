"""Reads the components of a model from its index, and checks that their classes exist here."""

from __future__ import annotations

import importlib
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import transformers
from diffusers import DiffusionPipeline, ModelMixin, ModularPipeline
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import (
    FeatureExtractionMixin,
    ImageProcessingMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import (
    CONFIG_NAME,
    FEATURE_EXTRACTOR_NAME,
    IMAGE_PROCESSOR_NAME,
    SAFE_WEIGHTS_NAME,
)

from stepweave.errors import LoadError, shown
from stepweave.loading.modular import (
    MODULAR_INDEX,
    ModularIndex,
    blocks_of,
    check_no_code,
    modular_class,
)
from stepweave.reasons import reason_of

INDEX = "model_index.json"
# diffusers reads only safetensors then, and runs no code from the model's files
SAFELY: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False}
_LIBRARIES = ("diffusers", "transformers")
_LACKING = (
    f"which diffusers {diffusers.__version__} does not have; correct it, or install a diffusers "
    "that has it"
)
_CONFIGS: tuple[tuple[Any, str], ...] = (
    (PreTrainedModel, CONFIG_NAME),
    (ImageProcessingMixin, IMAGE_PROCESSOR_NAME),
    (FeatureExtractionMixin, FEATURE_EXTRACTOR_NAME),
)  # others have theirs as an attribute


@dataclass(frozen=True)
class Component:
    """A part of a pipeline. `kind` is its class; None if only `from_pretrained` knows it."""

    name: str
    kind: Any

    @property
    def weights(self) -> str | None:
        """The file name of its weights, without a variant; None if it has no weights."""
        if self.is_a(ModelMixin):
            return str(SAFETENSORS_WEIGHTS_NAME)
        return str(SAFE_WEIGHTS_NAME) if self.is_a(PreTrainedModel) else None

    @property
    def config(self) -> str | None:
        """The file name of its configuration; None if unknown."""
        files = [file for kind, file in _CONFIGS if self.is_a(kind)]
        name = files[0] if files else getattr(self.kind, "config_name", None)
        return name if isinstance(name, str) else None

    @property
    def is_tokenizer(self) -> bool:
        return self.is_a(PreTrainedTokenizerBase)

    def is_a(self, kind: Any) -> bool:
        return isinstance(self.kind, type) and issubclass(self.kind, kind)


def read_index(folder: Path) -> dict[str, Any]:
    """The `model_index.json` of a model's directory; without one, its `modular_model_index.json` in
    the same form. Raises LoadError."""
    name = INDEX
    if not (folder / INDEX).is_file() and (folder / MODULAR_INDEX).is_file():
        name = MODULAR_INDEX
        check_no_code(folder)
    try:
        index = json.loads((folder / name).read_bytes())
    except FileNotFoundError:
        raise LoadError(
            f"{INDEX} is missing: the model's directory is not that of a diffusers pipeline; "
            f"`save_pretrained` writes one"
        ) from None
    except (OSError, ValueError) as error:
        problem = "not JSON, " if isinstance(error, ValueError) else ""
        raise LoadError(f"{name}: {problem}{reason_of(error)}") from None
    if not isinstance(index, dict):
        raise LoadError(f"{name} is {shown(index)}; it must be a JSON object")
    return ModularIndex(index) if name == MODULAR_INDEX else index


def has_index(folder: Path) -> bool:
    """Whether a directory is that of a pipeline."""
    return any((folder / name).is_file() for name in (INDEX, MODULAR_INDEX))


def pipeline_class(index: dict[str, Any]) -> Any:
    """The pipeline's class; of a modular one, that of its call. Raises LoadError if diffusers does
    not have it, or it needs packages that are not installed."""
    name, file = index.get("_class_name"), _file(index)
    if isinstance(name, (list, tuple)):
        raise LoadError(
            f"{file}: _class_name is {shown(name)}, code from the model's files, which is not run"
        )
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if kind is None:
        raise LoadError(f"{file}: _class_name is {shown(name)}, {_LACKING}")
    _check_installed(kind, "_class_name", file)
    modular = isinstance(index, ModularIndex)
    base = ModularPipeline if modular else DiffusionPipeline
    if not (isinstance(kind, type) and issubclass(kind, base)):
        what = "modular pipeline" if modular else "pipeline"
        raise LoadError(f"{file}: _class_name is {shown(name)}, which is not a {what}")
    return modular_class(kind, index) if isinstance(index, ModularIndex) else kind


def components_of(index: dict[str, Any]) -> list[Component]:
    """The components that are read from files. Raises LoadError for a class that does not exist or
    cannot be used here."""
    pipeline, file = pipeline_class(index), _file(index)
    if isinstance(index, ModularIndex):
        blocks = blocks_of(pipeline, index)
        names = {part.name for part in blocks.expected_components}
    else:
        # as diffusers does: parameters with defaults are options, even if they are models
        parameters = list(inspect.signature(pipeline.__init__).parameters.values())[1:]
        needed = {
            parameter.name
            for parameter in parameters
            if parameter.default is parameter.empty
            and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        }
        names = needed.union(pipeline._optional_components)
        if absent := sorted(needed.difference(index, pipeline._optional_components)):
            raise LoadError(f"{file} lacks {', '.join(absent)}, which {pipeline.__name__} needs")
    return [
        Component(name, _component_class(name, entry[0], entry[1], file))
        for name, entry in index.items()
        if name in names and isinstance(entry, (list, tuple))
        if len(entry) == 2 and all(isinstance(item, str) for item in entry)
    ]


def _file(index: dict[str, Any]) -> str:
    return MODULAR_INDEX if isinstance(index, ModularIndex) else INDEX


def absent_components(index: dict[str, Any]) -> dict[str, None]:
    """Components that are [null, null] in model_index.json: `from_pretrained` requires None for
    them."""
    return {
        name: None
        for name, entry in index.items()
        if not name.startswith("_") and entry in ([None, None], (None, None))
    }


def _component_class(name: str, library: str, kind: str, file: str) -> Any:
    module = getattr(diffusers.pipelines, library, None)
    if module is None:
        module = importlib.import_module(library) if library in _LIBRARIES else None
    component = getattr(module, kind, None)
    # from_pretrained knows former names of transformers' classes; by name, since transformers may
    # replace its module while it is imported
    if component is None and module is not None and module.__name__ != transformers.__name__:
        raise LoadError(f"{file}: {name} is {shown([library, kind])}, {_LACKING}")
    _check_installed(component, name, file)
    return component


def _check_installed(kind: Any, name: str, file: str) -> None:
    """Raise LoadError for diffusers' dummy of a class whose package is missing."""
    if type(kind).__name__ != "DummyObject":
        return
    packages = [item for item in kind._backends if item not in ("torch", "transformers")]
    raise LoadError(
        f"{file}: {name} is {kind.__name__}, which needs packages that are not installed: "
        f"{', '.join(packages)}"
    )
