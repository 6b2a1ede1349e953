"""Loads any diffusers pipeline from a directory, a single file or the hub."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline

from stepweave.config import Settings
from stepweave.config.preset import Preset, read_preset
from stepweave.errors import LoadError
from stepweave.loading.builtin import recognise
from stepweave.loading.checkpoint import Checkpoint, read_checkpoint
from stepweave.loading.components import (
    SAFELY,
    Component,
    absent_components,
    components_of,
    pipeline_class,
    read_index,
)
from stepweave.loading.files import check_vocabularies, files_of, find_damage
from stepweave.loading.hub import fetch, fetch_parts
from stepweave.loading.kinds import check_served
from stepweave.loading.modular import ModularIndex
from stepweave.loading.modular_reading import read_modular
from stepweave.loading.places import in_place
from stepweave.loading.progress import Components, OnProgress
from stepweave.loading.quantization import pipeline_quantization
from stepweave.loading.reading import Reading, check_placed
from stepweave.loading.single_file import (
    config_folder,
    held_components,
    index_of_configs,
    read_components,
    set_prediction,
    sizes_in,
)
from stepweave.loading.tokenizers import check_tokenizers
from stepweave.loading.variants import choose_variant, files_read
from stepweave.reasons import reason_of

logger = logging.getLogger(__name__)

_ADVICE = re.compile(r" If you want to instead overwrite .*")  # to use random weights


def load_pipeline(
    settings: Settings,
    device: torch.device,
    dtype: torch.dtype,
    on_progress: OnProgress = lambda stage, done, message: None,
) -> tuple[Any, Preset]:
    """Load the pipeline `settings.model` onto `device`, or with offload, onto the CPU. Returns it
    with the preset of its `stepweave.json` and of its built-in preset.

    `on_progress` is called while a model of the hub is downloaded, and while one is read.

    Only safetensors weights are read, and no code from the model's files is run. A private or gated
    repository needs `HF_TOKEN` in the environment (read by huggingface_hub). Raises LoadError,
    naming component and file, if any tensor of a model or vocabulary of a tokenizer is missing;
    and, before weights are read, for a pipeline that does not make images from prompts.
    """
    preset = read_preset(settings.model_directory())
    given = settings.preset_over(preset).call
    # progress bars are unreadable in logs
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    for handler in logging.getLogger("diffusers").handlers:
        handler.addFilter(_without_prompts)
    try:
        place = _find(settings, given, on_progress)
        if (recognised := recognise(place.folder, settings.model_name())) is not None:
            logger.info(
                "built-in preset %s: %s (see %s); STEPWEAVE_PRESET and stepweave.json override it",
                recognised.built_in.name, recognised.signs, recognised.built_in.card,
            )  # fmt: skip
            preset = preset.over(recognised.preset)
        with in_place(place.folder, place.index) as folder:
            whole = replace(place, folder=folder)
            pipeline = _read(settings, whole, device, dtype, on_progress)
    except LoadError as error:
        raise LoadError(
            f"the model {settings.model_name()!r} cannot be loaded: {error.message}"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, preset


@dataclass(frozen=True)
class _Place:
    """Where a model is: a directory with its variant, and for a single file, what is read of it."""

    folder: Path
    index: dict[str, Any]
    variant: str | None
    checkpoint: Checkpoint | None = None
    held: Sequence[Component] = ()


def _find(settings: Settings, given: Collection[str], on_progress: OnProgress) -> _Place:
    """Find and check the files of a model. Raises LoadError."""
    folder, file, checkpoint = settings.model_directory(), settings.model_file(), None
    if folder is None and file is None:
        on_progress("downloading", 0.0, settings.model)
        folder, variant = fetch(
            settings.model, settings.revision, settings.variant, given, on_progress
        )
        return _Place(folder, read_index(folder), variant)
    if file is not None:
        checkpoint = read_checkpoint(file)
        folder = config_folder(checkpoint, settings.config_from)
    assert folder is not None
    if checkpoint is None:
        index = read_index(folder)
        check_served(pipeline_class(index), given)
        return _Place(folder, index, fetch_parts(folder, index, settings.variant, on_progress))
    index = index_of_configs(folder)
    check_served(pipeline_class(index), given)
    held = held_components(checkpoint, components_of(index), folder)
    names = [part.name for part in held]
    variant = choose_variant(index, files_of(folder), settings.variant, names)
    return _Place(folder, index, variant, checkpoint, held)


def _read(
    settings: Settings,
    place: _Place,
    device: torch.device,
    dtype: torch.dtype,
    on_progress: OnProgress,
) -> Any:
    """Read the pipeline of a directory or file. Raises LoadError unless all of it was read."""
    folder, index, checkpoint = place.folder, place.index, place.checkpoint
    modular, sizes = isinstance(index, ModularIndex), files_of(folder)
    if modular and settings.offload != "off":
        raise LoadError(
            f"STEPWEAVE_OFFLOAD={settings.offload!r}: diffusers cannot offload "
            f"{index['_class_name']}, a modular pipeline, so; unset it"
        )
    held = {component.name for component in place.held}
    components = [part for part in components_of(index) if part.name not in held]
    check_vocabularies(components, sizes)
    changes: dict[str, Any] = {} if modular else dict(absent_components(index))
    if settings.quantization is not None:
        changes["quantization_config"] = pipeline_quantization(settings.quantization, index, dtype)
    read = files_read(sizes, [component.name for component in components], place.variant)
    if checkpoint is not None:
        read |= sizes_in(checkpoint, place.held)
    progress = Components(read, partial(on_progress, "loading"))
    reading = Reading(folder, components, progress.begin)
    try:
        if checkpoint is not None:
            made, reading.tensors = read_components(
                checkpoint, place.held, folder, dtype, progress.begin
            )
            changes |= made
        with reading.watched():
            if isinstance(index, ModularIndex):
                pipeline = read_modular(folder, index, components, place.variant, dtype, **changes)
            else:
                pipeline = DiffusionPipeline.from_pretrained(
                    str(folder), variant=place.variant, **changes, dtype=dtype, **SAFELY
                )
        check_placed(pipeline.components)
        if checkpoint is not None:
            set_prediction(pipeline, checkpoint)
        began = time.monotonic()
        tokenizers = check_tokenizers(pipeline.components)
        seconds = time.monotonic() - began
        if settings.offload == "off":
            pipeline.to(device)
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(_explained(error, folder, reading.failed(error), device)) from error
    logger.info(
        "self-check: read all %d tensors of %s from files; %s distinguish prompts (%.2f s)",
        sum(reading.tensors.values()),
        ", ".join(reading.tensors),
        ", ".join(tokenizers) or "no tokenizers",
        seconds,
    )
    return pipeline


def _explained(error: Exception, folder: Path, component: str | None, device: torch.device) -> str:
    """Why loading failed: a file that cannot be read if there is one, else the error."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return (
            f"it does not fit into the memory of {device}; see STEPWEAVE_DTYPE, "
            f"STEPWEAVE_QUANTIZATION and STEPWEAVE_OFFLOAD"
        )
    if damage := find_damage(folder, component):
        return damage
    logger.error("loading failed", exc_info=error)  # with its traceback: no file is damaged
    reason = _ADVICE.sub("", reason_of(error, folder))
    return f"{component}/: {reason}" if component else reason


def _without_prompts(record: logging.LogRecord) -> bool:
    """Drop diffusers' messages that quote truncated prompts, of which answers have warnings, and
    those of blocks that raise, whose errors their jobs have."""
    message = record.getMessage()
    return "input was truncated because" not in message and "Error in block: " not in message
