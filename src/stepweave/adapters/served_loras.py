"""The LoRAs of a server, as its settings say."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn

from stepweave.adapters.beside import Added
from stepweave.adapters.lora_directory import why_no_directory
from stepweave.adapters.lora_files import takes_loras
from stepweave.adapters.loras import Loras
from stepweave.config import Settings
from stepweave.config.components import REFINER
from stepweave.config.loras import HubLora, LoraPlaces
from stepweave.errors import LoadError
from stepweave.loading.hub import explained

logger = logging.getLogger(__name__)

OWN = "loras"  # the directory in a model's


def loras_of(
    settings: Settings,
    pipeline: Any,
    added: Mapping[str, Added],
    device: torch.device,
    *,
    own: bool = True,
) -> Loras | None:
    """The LoRAs that requests may name; None if there is no place for them, or the pipeline takes
    none. Those of the hub are downloaded. Unless set, they are those of the model's directory, if
    the pipeline is its `own`.

    Raises LoadError for settings with which none can be used.
    """
    places = settings.loras or LoraPlaces()
    directory = places.directory
    if settings.loras is None:
        folder = settings.model_directory()
        if folder is None or not own or not (folder / OWN).is_dir():
            return None
        if why := _why_none(settings, pipeline):
            logger.info("the model's LoRAs are not offered: %s", why)
            return None
        directory = folder / OWN
    else:
        wrong = _why_none(settings, pipeline)
        if wrong is None and directory is not None:
            wrong = why_no_directory(directory)
        if wrong is not None:
            raise LoadError(f"STEPWEAVE_LORAS: {wrong}")
    return Loras(
        pipeline,
        directory,
        files={name: _downloaded(name, one) for name, one in places.hub.items()},
        max_bytes=settings.lora_bytes,
        device=device,
        twins=_twins(added),
        looks=False,
    )


def _why_none(settings: Settings, pipeline: Any) -> str | None:
    """Why no LoRA can be used, or None."""
    if not takes_loras(pipeline):
        return f"{type(pipeline).__name__} takes no LoRAs"
    for setting, on in (
        ("OFFLOAD", settings.offload != "off"),
        ("QUANTIZATION", settings.quantization is not None),
        ("COMPILE", settings.compile),
    ):
        if on:
            return f"they cannot be used with STEPWEAVE_{setting}"
    return None


def _twins(added: Mapping[str, Added]) -> dict[str, list[nn.Module]]:
    """Modules of components with the same layers as the model's, by its name for these."""
    found: dict[str, list[nn.Module]] = {}
    # a refiner's modules are those of another model
    for one in (one for one in added.values() if one.field != REFINER):
        for name, part in one.parts.items():
            if name in ("unet", "transformer") and isinstance(part, nn.Module):
                found.setdefault(name, []).append(part)
    return found


def _downloaded(name: str, one: HubLora) -> Path:
    """The file of a LoRA of the hub. Raises LoadError."""
    with explained(one.repository, one.commit):
        folder = snapshot_download(
            one.repository,
            revision=one.commit,
            allow_patterns=[one.file or "*.safetensors"],
            ignore_patterns=None if one.file else ["*/*"],  # a whole model's
        )
    files = [Path(folder) / one.file] if one.file else sorted(Path(folder).glob("*.safetensors"))
    if len(files) != 1 or not files[0].is_file():
        names = ", ".join(file.name for file in files) or "none"
        raise LoadError(
            f"STEPWEAVE_LORAS: {name}: {one.repository} must have one .safetensors file, or say "
            f"which after the commit, as :FILE.safetensors; it has {names}"
        )
    return files[0]
