"""Loads components beside the model: ControlNets, T2I-Adapters, another autoencoder."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import snapshot_download

from stepweave.config import Settings
from stepweave.config.components import ComponentSource
from stepweave.config.preset import Preset
from stepweave.errors import LoadError, shown
from stepweave.loading.components import Component
from stepweave.loading.files import find_damage
from stepweave.loading.reading import Reading, check_placed
from stepweave.reasons import reason_of

logger = logging.getLogger(__name__)

# by the field of requests that names them, what they are called
GUIDES = {"controlnet": "ControlNet", "t2i_adapter": "T2I-Adapter"}
VAE = "vae"
_FILES = (CONFIG_NAME, "*.safetensors", "*.safetensors.index.json")
_VARIANT = re.compile(r"diffusion_pytorch_model\.(\w+?)(?:-\d+-of-\d+)?\.safetensors")


@dataclass(frozen=True, eq=False)
class Added:
    """A component beside the model. `field` is that of requests which names it, or `vae` for one
    that replaces the model's own."""

    name: str
    field: str
    model: Any
    description: str = ""


def load_beside(
    settings: Settings,
    preset: Preset,
    pipeline: Any,
    device: torch.device,
    dtype: torch.dtype,
    on_begin: Callable[[str], None] = lambda name: None,
) -> dict[str, Added]:
    """Load the components of the settings and of the model's preset, by name, onto `device`. An
    autoencoder replaces that of `pipeline`. `on_begin` is called with each one's name.

    Only safetensors are read. Raises LoadError, naming the component.
    """
    places = {name: (one, settings.model_directory()) for name, one in preset.components.items()}
    places |= {name: (one, None) for name, one in settings.components.items()}
    added: dict[str, Added] = {}
    for name, (source, base) in places.items():
        began = time.monotonic()
        on_begin(name)
        try:
            one = _load(name, source, base, dtype)
            if one.field == VAE:
                _replace_vae(pipeline, one, added)
        except LoadError as error:
            raise LoadError(f"the component {name!r} cannot be loaded: {error.message}") from error
        one.model.to(device)
        added[name] = one
        logger.info(
            "component %s: %s of %s (%.1f s)",
            name, type(one.model).__name__, source.source, time.monotonic() - began,
        )  # fmt: skip
    return added


def by_field(added: Mapping[str, Added]) -> dict[str, dict[str, Added]]:
    """Those that requests may name, by their fields."""
    found: dict[str, dict[str, Added]] = {}
    for name, one in added.items():
        if one.field in GUIDES:
            found.setdefault(one.field, {})[name] = one
    return found


def _load(name: str, source: ComponentSource, base: Path | None, dtype: torch.dtype) -> Added:
    folder = _folder(source, base)
    kind, field = _kind(folder)
    reading = Reading(folder, [Component(name, kind)])
    try:
        with reading.watched():
            model = kind.from_pretrained(
                str(folder), variant=_variant(folder), torch_dtype=dtype, use_safetensors=True
            )
        check_placed({name: model})
    except LoadError:
        raise
    except Exception as error:
        damage = find_damage(folder.parent, folder.name)
        raise LoadError(damage or reason_of(error, folder)) from error
    return Added(name, field, model.eval(), source.description)


def _folder(source: ComponentSource, base: Path | None) -> Path:
    """The component's directory, once it is there."""
    on_the_hub = source.on_the_hub()
    folder = source.directory(base)
    if not folder.is_dir():
        if on_the_hub is None:
            raise LoadError(
                f"{shown(source.source)} is neither an existing directory nor a repository of the "
                "hub at a commit (OWNER/NAME@COMMIT, 40 hex digits)"
            )
        repository, commit = on_the_hub
        part = f"{source.subfolder}/" if source.subfolder else ""
        try:
            folder = Path(
                snapshot_download(
                    repository, revision=commit, allow_patterns=[part + file for file in _FILES]
                )
            )
        except Exception as error:
            raise LoadError(
                f"{repository} at {commit} cannot be downloaded from the hub: {reason_of(error)}"
            ) from error
    return folder / source.subfolder if source.subfolder else folder


def _kind(folder: Path) -> tuple[Any, str]:
    """The component's class, and its field."""
    try:
        config = json.loads((folder / CONFIG_NAME).read_bytes())
    except FileNotFoundError:
        raise LoadError(
            f"{CONFIG_NAME} is missing: it is not the directory of a model of diffusers"
        ) from None
    except (OSError, ValueError) as error:
        raise LoadError(f"{CONFIG_NAME} cannot be read: {reason_of(error, folder)}") from None
    name = config.get("_class_name") if isinstance(config, dict) else None
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, ModelMixin)):
        raise LoadError(
            f"{CONFIG_NAME}: _class_name is {shown(name)}, which is no model of diffusers "
            f"{diffusers.__version__}"
        )
    assert isinstance(name, str)
    if "ControlNet" in name:
        return kind, "controlnet"
    if name == "T2IAdapter":
        return kind, "t2i_adapter"
    if name.startswith(("Autoencoder", "AsymmetricAutoencoder")):
        return kind, VAE
    raise LoadError(
        f"it is a {name}; a component may be a ControlNet, a T2I-Adapter, or an autoencoder"
    )


def _variant(folder: Path) -> str | None:
    """The only variant of the weights, if there are none without one."""
    names = [file.name for file in folder.glob("*.safetensors*")]
    if any(name.startswith(SAFETENSORS_WEIGHTS_NAME) for name in names):
        return None
    variants = {found[1] for name in names if (found := _VARIANT.fullmatch(name))}
    return variants.pop() if len(variants) == 1 else None


def _replace_vae(pipeline: Any, new: Added, added: Mapping[str, Added]) -> None:
    """Replace the pipeline's autoencoder. Raises LoadError if it has another kind of latents."""
    other = next((one.name for one in added.values() if one.field == VAE), None)
    if other is not None:
        raise LoadError(f"{other!r} replaces the model's autoencoder already")
    own = getattr(pipeline, VAE, None)
    if own is None:
        raise LoadError(f"{type(pipeline).__name__} has no autoencoder that it could replace")
    if type(own) is not type(new.model):
        kind, wanted = type(new.model).__name__, type(own).__name__
        raise LoadError(f"it is an {kind}, and the model's autoencoder an {wanted}")
    for name in ("latent_channels", "in_channels", "out_channels"):
        value, wanted = new.model.config.get(name), own.config.get(name)
        if value != wanted:
            raise LoadError(f"its {name} is {value}; that of the model's autoencoder is {wanted}")
    levels = [len(one.config.get("block_out_channels", ())) for one in (new.model, own)]
    if levels[0] != levels[1]:
        raise LoadError(f"it has {levels[0]} levels; the model's autoencoder has {levels[1]}")
    pipeline.register_modules(vae=new.model)
