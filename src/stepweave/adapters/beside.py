"""Loads components beside the model: ControlNets, adapters for images, another autoencoder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.loaders import IPAdapterMixin
from diffusers.utils import CONFIG_NAME
from huggingface_hub import snapshot_download
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from stepweave.adapters.ip_adapters import adapted, is_ip_adapter, read_ip_adapter
from stepweave.config import Settings
from stepweave.config.components import IP_ADAPTER, VAE, ComponentSource
from stepweave.config.preset import Preset, read_preset
from stepweave.errors import LoadError, shown
from stepweave.loading.components import Component
from stepweave.loading.files import find_damage
from stepweave.loading.hub import explained
from stepweave.loading.reading import Reading, check_placed
from stepweave.loading.variants import only_variant
from stepweave.reasons import reason_of

logger = logging.getLogger(__name__)

_FILES = (CONFIG_NAME, "*.safetensors", "*.safetensors.index.json", "preprocessor_config.json")
_ENCODER = "image_encoder"


@dataclasses.dataclass(frozen=True, eq=False)
class Added:
    """A component beside the model. `field` is that of requests which names it, or `vae` for one
    that replaces the model's own. `parts` are what replaces the pipeline's by name."""

    name: str
    field: str
    model: Any
    description: str = ""
    parts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


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
    added: dict[str, Added] = {}
    for name, (source, base) in _places(settings, preset).items():
        began = time.monotonic()
        on_begin(name)
        try:
            folder = _folder(source, base)
            file = None if (folder / CONFIG_NAME).exists() else _adapter_file(folder, source)
            if file is None:
                one = _load(name, source, folder, dtype)
            else:
                _check_plain(settings)
                one = _load_ip_adapter(name, source, folder, file, pipeline, dtype)
            if one.field == VAE:
                _replace_vae(pipeline, one, added)
        except LoadError as error:
            raise LoadError(f"the component {name!r} cannot be loaded: {error.message}") from error
        for part in (one.model, *one.parts.values()):
            if isinstance(part, nn.Module):
                part.to(device)
        added[name] = one
        logger.info(
            "component %s: %s of %s (%.1f s)",
            name, type(one.model).__name__, source.source, time.monotonic() - began,
        )  # fmt: skip
    return added


def look_at(settings: Settings) -> Iterator[tuple[str, ComponentSource, str | LoadError | None]]:
    """The components of the settings and of the model's preset, and what each is, without reading
    its weights: None if it is to be downloaded, or what is wrong with it. A preset that cannot be
    read has none."""
    preset = Preset()
    with contextlib.suppress(LoadError):
        preset = read_preset(settings.model_directory())
    preset = settings.preset_over(preset)
    for name, (source, base) in _places(settings, preset).items():
        try:
            yield name, source, _look_at(source, base)
        except LoadError as error:
            yield name, source, error


def _look_at(source: ComponentSource, base: Path | None) -> str | None:
    if source.on_the_hub() is not None and not source.directory(base).is_dir():
        return None
    folder = _folder(source, base)
    if not (folder / CONFIG_NAME).exists() and (file := _adapter_file(folder, source)):
        return f"an IP-Adapter, {file.name}"
    return str(_kind(folder)[0].__name__)


def _places(settings: Settings, preset: Preset) -> dict[str, tuple[ComponentSource, Path | None]]:
    """The components by name, each with the directory that its relative path begins at."""
    places = {name: (one, settings.model_directory()) for name, one in preset.components.items()}
    return places | {name: (one, None) for name, one in settings.components.items()}


def by_field(added: Mapping[str, Added]) -> dict[str, dict[str, Added]]:
    """Those that requests may name, by their fields."""
    found: dict[str, dict[str, Added]] = {}
    for name, one in added.items():
        if one.field != VAE:
            found.setdefault(one.field, {})[name] = one
    return found


def _load(name: str, source: ComponentSource, folder: Path, dtype: torch.dtype) -> Added:
    kind, field_ = _kind(folder)
    return Added(name, field_, _read(name, kind, folder, dtype), source.description)


def _read(name: str, kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """The model of a class in a directory. Raises LoadError."""
    component = Component(name, kind)
    reading = Reading(folder, [component])
    files = [f"{name}/{file.name}" for file in folder.glob("*.safetensors")]
    try:
        with reading.watched():
            options = {"torch_dtype": dtype} if issubclass(kind, ModelMixin) else {"dtype": dtype}
            model = kind.from_pretrained(
                str(folder), variant=only_variant(component, files), use_safetensors=True, **options
            )
        check_placed({name: model})
    except LoadError:
        raise
    except Exception as error:
        damage = find_damage(folder.parent, folder.name)
        raise LoadError(damage or reason_of(error, folder)) from error
    return model.eval()


def _adapter_file(folder: Path, source: ComponentSource) -> Path | None:
    """The file of an IP-Adapter in a directory; None if there is none. Raises LoadError for one
    that is missing, and for several without a choice."""
    if source.weights is not None:
        if not (folder / source.weights).is_file():
            raise LoadError(f"{source.weights} is missing")
        return folder / source.weights
    files = [file for file in sorted(folder.glob("*.safetensors")) if is_ip_adapter(file)]
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise LoadError(f"it has several IP-Adapters ({names}); choose one with `weights`")
    return files[0] if files else None


def _check_plain(settings: Settings) -> None:
    """Raise LoadError for what an IP-Adapter's UNet, which shares the model's weights, cannot be
    used with."""
    for setting, on in (
        ("offload", settings.offload != "off"),
        ("quantization", settings.quantization is not None),
        ("compile", settings.compile),
    ):
        if on:
            raise LoadError(f"IP-Adapters cannot be used with STEPWEAVE_{setting.upper()}")


def _load_ip_adapter(
    name: str, source: ComponentSource, folder: Path, file: Path, pipeline: Any, dtype: torch.dtype
) -> Added:
    """A UNet with the adapter, and an image encoder: that of the adapter, or the model's."""
    if not isinstance(pipeline, IPAdapterMixin) or not hasattr(pipeline, "image_encoder"):
        raise LoadError(f"{type(pipeline).__name__} takes no IP-Adapters")
    unet = adapted(pipeline.unet, read_ip_adapter(file))
    # of the source, of which `folder` may be a subfolder
    root = folder.parents[source.subfolder.count("/")] if source.subfolder else folder
    place = root / source.image_encoder if source.image_encoder else folder / _ENCODER
    encoder = pipeline.image_encoder
    if (place / CONFIG_NAME).is_file():
        encoder = _read(place.name, CLIPVisionModelWithProjection, place, dtype)
    if encoder is None:
        raise LoadError(
            f"it has no image encoder ({_ENCODER}/ beside {file.name}, or `image_encoder`), and "
            "neither has the model"
        )
    _check_width(unet, encoder)
    size = encoder.config.image_size
    extractor = pipeline.feature_extractor if encoder is pipeline.image_encoder else None
    parts = {
        "unet": unet,
        _ENCODER: encoder,
        # as diffusers makes it
        "feature_extractor": extractor or CLIPImageProcessor(size=size, crop_size=size),
    }
    return Added(name, IP_ADAPTER, unet, source.description, parts)


def _check_width(unet: Any, encoder: Any) -> None:
    """Raise LoadError if the adapter is for embeddings of another image encoder."""
    [layer] = unet.encoder_hid_proj.image_projection_layers
    wanted = getattr(getattr(layer, "image_embeds", None), "in_features", None)
    width = encoder.config.projection_dim
    if wanted is not None and wanted != width:
        raise LoadError(
            f"it is for image embeddings of {wanted} numbers; those of its image encoder have "
            f"{width}: set `image_encoder`"
        )


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
        files = [part + file for file in _FILES]
        if source.weights is not None:
            encoder = source.image_encoder or f"{part}{_ENCODER}"
            files = [part + source.weights, *(f"{encoder}/{file}" for file in _FILES)]
        with explained(repository, commit):
            folder = Path(snapshot_download(repository, revision=commit, allow_patterns=files))
    return folder / source.subfolder if source.subfolder else folder


def _kind(folder: Path) -> tuple[Any, str]:
    """The component's class, and its field."""
    try:
        config = json.loads((folder / CONFIG_NAME).read_bytes())
    except FileNotFoundError:
        raise LoadError(
            f"{CONFIG_NAME} is missing, and there is no IP-Adapter: it is not the directory of a "
            "component"
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
        f"it is a {name}; a component may be a ControlNet, a T2I-Adapter, an IP-Adapter, or an "
        "autoencoder"
    )


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
