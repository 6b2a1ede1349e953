"""Loads components beside the model: ControlNets, adapters for images, refiners, autoencoders."""

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
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from stepweave.adapters.autoencoders import fit_in
from stepweave.adapters.ip_adapters import adapted, is_ip_adapter, read_ip_adapter
from stepweave.adapters.refiners import check_refiner, load_refiner
from stepweave.config import Settings
from stepweave.config.components import IP_ADAPTER, REFINER, VAE, ComponentSource
from stepweave.config.preset import Preset, read_preset
from stepweave.errors import LoadError, shown
from stepweave.loading.beside import ENCODER, folder_of, is_pipeline, read_model
from stepweave.reasons import reason_of

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Added:
    """A component beside the model. `field` is that of requests which names it. `parts` are what
    replaces the pipeline's by name; of a refiner, the modules that are not the model's. `default`
    is whether an autoencoder is used by requests that name none."""

    name: str
    field: str
    model: Any
    description: str = ""
    parts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    default: bool = False

    def modules(self) -> dict[str, nn.Module]:
        """Its modules by name: its model has its own, parts of it have theirs behind that."""
        own = f"{self.field}.{self.name}"
        found = {own: self.model, **{f"{own}.{name}": part for name, part in self.parts.items()}}
        return {name: part for name, part in found.items() if isinstance(part, nn.Module)}


def load_beside(
    settings: Settings,
    preset: Preset,
    pipeline: Any,
    device: torch.device,
    dtype: torch.dtype,
    on_begin: Callable[[str], None] = lambda name: None,
) -> dict[str, Added]:
    """Load the components of the settings and of the model's preset, by name, onto `device`. An
    autoencoder that is the `default` replaces that of `pipeline`. `on_begin` is called with each
    one's name.

    Only safetensors are read. Raises LoadError, naming the component.
    """
    added: dict[str, Added] = {}
    for name, (source, base) in _places(settings, preset).items():
        began = time.monotonic()
        on_begin(name)
        try:
            one = _load(name, source, folder_of(source, base), settings, pipeline, dtype)
            other = next((other for other in added.values() if other.default), None)
            if one.default and other is not None:
                raise LoadError(f"{other.name!r} replaces the model's autoencoder already")
        except LoadError as error:
            raise LoadError(f"the component {name!r} cannot be loaded: {error.message}") from error
        for part in one.modules().values():
            part.to(device)
        added[name] = one
        logger.info(
            "component %s: %s of %s (%.1f s)",
            name, type(one.model).__name__, source.source, time.monotonic() - began,
        )  # fmt: skip
    default = next((one for one in added.values() if one.default), None)
    if default is not None:
        _replace_vae(pipeline, default, added)
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
            yield name, source, look_at_source(source, base)
        except LoadError as error:
            yield name, source, error


def look_at_source(source: ComponentSource, base: Path | None = None) -> str | None:
    """What a component is; None if it is to be downloaded. Raises LoadError."""
    if source.on_the_hub() is not None and not source.directory(base).is_dir():
        return None
    folder = folder_of(source, base)
    if is_pipeline(folder):
        _check_default(source, REFINER)
        return f"a refiner, {check_refiner(folder)['_class_name']}"
    if not (folder / CONFIG_NAME).exists() and (file := _adapter_file(folder, source)):
        _check_default(source, IP_ADAPTER)
        return f"an IP-Adapter, {file.name}"
    kind, field = _kind(folder)
    _check_default(source, field)
    return str(kind.__name__)


def _places(settings: Settings, preset: Preset) -> dict[str, tuple[ComponentSource, Path | None]]:
    """The components by name, each with the directory that its relative path begins at."""
    places = {name: (one, settings.model_directory()) for name, one in preset.components.items()}
    return places | {name: (one, None) for name, one in settings.components.items()}


def by_field(added: Mapping[str, Added]) -> dict[str, dict[str, Added]]:
    """Components by the fields of requests that name them."""
    found: dict[str, dict[str, Added]] = {}
    for name, one in added.items():
        found.setdefault(one.field, {})[name] = one
    return found


def _load(
    name: str,
    source: ComponentSource,
    folder: Path,
    settings: Settings,
    pipeline: Any,
    dtype: torch.dtype,
) -> Added:
    if is_pipeline(folder):
        _check_default(source, REFINER)
        if settings.offload != "off":  # of whose modules it may share some
            raise LoadError("refiners cannot be used with STEPWEAVE_OFFLOAD")
        refiner = load_refiner(folder, pipeline, dtype)
        parts = {
            part: module
            for part, module in refiner.components.items()
            if isinstance(module, nn.Module) and module is not getattr(pipeline, part, None)
        }
        return Added(name, REFINER, refiner, source.description, parts)
    file = None if (folder / CONFIG_NAME).exists() else _adapter_file(folder, source)
    if file is not None:
        _check_default(source, IP_ADAPTER)
        _check_plain(settings)
        return _load_ip_adapter(name, source, folder, file, pipeline, dtype)
    kind, field = _kind(folder)
    _check_default(source, field)
    model = read_model(name, kind, folder, dtype)
    if field == VAE:
        fit_in(pipeline, model)
    return Added(name, field, model, source.description, default=source.default)


def _check_default(source: ComponentSource, field: str) -> None:
    if source.default and field != VAE:
        raise LoadError(f"default is true, which only an autoencoder may be; this is for {field}")


def _replace_vae(pipeline: Any, new: Added, added: dict[str, Added]) -> None:
    """Replace the autoencoder of a pipeline, and of its refiners."""
    pipeline.register_modules(vae=new.model)
    for name, one in list(added.items()):
        if one.field == REFINER:
            one.model.register_modules(vae=new.model)
            parts = {part: module for part, module in one.parts.items() if part != VAE}
            added[name] = dataclasses.replace(one, parts=parts)


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
    place = root / source.image_encoder if source.image_encoder else folder / ENCODER
    encoder = pipeline.image_encoder
    if (place / CONFIG_NAME).is_file():
        encoder = read_model(place.name, CLIPVisionModelWithProjection, place, dtype)
    if encoder is None:
        raise LoadError(
            f"it has no image encoder ({ENCODER}/ beside {file.name}, or `image_encoder`), and "
            "neither has the model"
        )
    _check_width(unet, encoder)
    size = encoder.config.image_size
    extractor = pipeline.feature_extractor if encoder is pipeline.image_encoder else None
    parts = {
        "unet": unet,
        ENCODER: encoder,
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
