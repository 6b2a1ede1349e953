"""Load any diffusers pipeline from a directory or the hub."""

from __future__ import annotations

import logging
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline

from stepweave.config import Settings
from stepweave.errors import LoadError
from stepweave.loading.preset import Preset, read_preset
from stepweave.loading.quantization import pipeline_quantization

logger = logging.getLogger(__name__)


def load_pipeline(settings: Settings, device: torch.device, dtype: torch.dtype) -> tuple[DiffusionPipeline, Preset]:
    """Load the pipeline that `settings.model` names onto `device`, its class chosen by its `model_index.json`.

    Where weights are offloaded it stays on the CPU.
    With it comes the preset in its directory, an empty one where there is none.

    Only safetensors weights are read and no code from the model's repository runs. A private or gated hub repository
    needs `HF_TOKEN` in the environment (read by huggingface_hub). Raises LoadError.
    """
    source: str = str(settings.model_directory() or settings.model)
    hub: dict[str, Any] = {} if settings.model_directory() else {"revision": settings.revision}
    preset = read_preset(settings.model_directory())
    # advice to install torchvision, which nothing here needs
    transformers.utils.logging.set_verbosity_error()
    # bars of a few lines' worth, garbled in a log
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    for handler in logging.getLogger("diffusers").handlers:
        handler.addFilter(_without_prompts)
    try:
        index = DiffusionPipeline.load_config(source, **hub)
        changes: dict[str, Any] = dict(_absent_components(index))
        if settings.quantization is not None:
            changes["quantization_config"] = pipeline_quantization(settings.quantization, index, dtype)
        pipeline = DiffusionPipeline.from_pretrained(
            source, **hub, **changes, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
        if settings.offload == "off":
            pipeline.to(device)
    except (OSError, ValueError, RuntimeError, ImportError, AttributeError, TypeError, KeyError) as error:
        # to the log whole; the probe's answer must not name paths of the server
        logger.exception("loading %s failed", settings.model)
        raise LoadError(f"the model {settings.model_name()!r} cannot be loaded: {type(error).__name__}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, preset


def _without_prompts(record: logging.LogRecord) -> bool:
    """Whether a record does not quote a prompt, as diffusers does of those that it cuts; answers warn of that."""
    return "input was truncated because" not in record.getMessage()


def _absent_components(index: dict[str, Any]) -> dict[str, None]:
    """Components that model_index.json has as [null, null]; `from_pretrained` demands that they be passed as None."""
    return {
        name: None
        for name, entry in index.items()
        if not name.startswith("_") and isinstance(entry, (list, tuple)) and list(entry) == [None, None]
    }
