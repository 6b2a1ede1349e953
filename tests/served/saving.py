"""Saves an entry's pipeline to a directory as a server finds one: with a preset of what requests
cannot say."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import diffusers

from stepweave.config.preset import FILE_NAME
from tests.pipelines.registry import Entry
from tests.support.ip_adapters import save_ip_adapter

MEMBERS = ("width", "height", "num_inference_steps", "guidance_scale")  # of a preset
# constants of calls that belong to a tiny model, not to a request: with the pipelines' defaults it
# would draw 1024 x 1024 pixels, encode thousands of tokens, or look for packages that are not here
FIXED = {
    "_auto_resize",
    "attn_res",
    "clean_caption",
    "complex_human_instruction",
    "enable_prompt_rewrite",
    "intermediate_timesteps",
    "max_area",
    "max_sequence_length",
    "processing_resolution",
    "system_prompt",
    "target_size",
    "text_encoder_out_layers",
    "thresholds",
    "upsampling_height",
    "upsampling_width",
    "use_resolution_binning",
    "view_batch_size",
}
IP_ADAPTER = "faces"  # the folder of a component beside the model, and its name
INDEX, MODULAR_INDEX = "model_index.json", "modular_model_index.json"


def fixed(entry: Entry) -> dict[str, Any]:
    """The arguments that the preset has in `call`."""
    return {
        name: value
        for name, value in entry.call.items()
        if name in FIXED and not inspect.isfunction(value)
    }


def preset(entry: Entry) -> dict[str, Any]:
    arguments = entry.arguments(0)
    members = {name: arguments[name] for name in MEMBERS if arguments.get(name) is not None}
    return {**members, "call": fixed(entry)}


def save(entry: Entry, folder: Path) -> None:
    """Build the pipeline of an entry and save it."""
    pipeline = entry.build()
    made = preset(entry)
    if (weights := getattr(pipeline, "ip_adapter", None)) is not None:
        save_ip_adapter(weights, pipeline.image_encoder, folder / IP_ADAPTER)
        pipeline.unload_ip_adapter()
        made["components"] = {IP_ADAPTER: IP_ADAPTER}
    if isinstance(pipeline, diffusers.ModularPipeline):
        # a string, and what it will be in the next version of diffusers
        pipeline.save_pretrained(str(folder), overwrite_modular_index=True)
    else:
        pipeline.save_pretrained(folder)
        _mend_index(pipeline, folder / INDEX)
    (folder / FILE_NAME).write_text(json.dumps(made))


def _mend_index(pipeline: Any, path: Path) -> None:
    """Correct what diffusers 0.42.1 saves for classes of its deprecated packages: it would look for
    them where they are not."""
    index = json.loads(path.read_text())
    for name, value in index.items():
        part = getattr(pipeline, name, None)
        names = isinstance(value, list) and all(isinstance(item, str) for item in value)
        if not names or part is None or _is_found(*value):
            continue
        kind = type(part)
        exported = getattr(diffusers, kind.__name__, None) is kind
        index[name] = ["diffusers" if exported else kind.__module__, kind.__name__]
    path.write_text(json.dumps(index))


def _is_found(library: str, kind: str) -> bool:
    module = getattr(diffusers.pipelines, library, None) or importlib.import_module(library)
    return getattr(module, kind, None) is not None
