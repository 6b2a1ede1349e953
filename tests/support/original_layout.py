"""Single files: the models of a Stable Diffusion pipeline under the names of the original code.

diffusers converts only in the other direction; these are its rules, turned round.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def save_as_one_file(pipeline: Any, path: Path, **more: torch.Tensor) -> Path:
    """Write the models of a Stable Diffusion 1.5 or XL pipeline as one file, and `more` tensors."""
    save_file({**original(pipeline), **more}, path, metadata={"format": "pt"})
    return path


def original(pipeline: Any) -> Tensors:
    """The models' tensors by their original names."""
    tensors = {
        **{f"model.diffusion_model.{name}": one for name, one in unet(pipeline.unet)},
        **{f"first_stage_model.{name}": one for name, one in vae(pipeline.vae)},
    }
    second = getattr(pipeline, "text_encoder_2", None)
    first = "cond_stage_model" if second is None else "conditioner.embedders.0"
    for name, tensor in clip(pipeline.text_encoder).items():
        tensors[f"{first}.transformer.text_model.{name}"] = tensor
    if second is not None:
        for name, tensor in open_clip(second):
            tensors[f"conditioner.embedders.1.model.{name}"] = tensor
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def renamed(name: str, names: dict[str, str]) -> str:
    return next((name.replace(old, new) for old, new in names.items() if old in name), name)


def unet(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    layers = model.config.layers_per_block + 1
    known = dict(DIFFUSERS_TO_LDM_MAPPING["unet"]["layers"])
    if model.config.addition_embed_type is not None:
        known |= DIFFUSERS_TO_LDM_MAPPING["unet"]["addition_embed_type"]
    state = model.state_dict()
    for name, tensor in state.items():
        if name in known:
            yield known[name], tensor
            continue
        if middle := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
            kind, number, rest = middle.groups()
            place = 1 if kind == "attentions" else 2 * int(number)
            rest = renamed(rest, RESNET) if kind == "resnets" else rest
            yield f"middle_block.{place}.{rest}", tensor
            continue
        found = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", name)
        assert found is not None, name
        side, block, kind, number, rest = found.groups()
        if kind == "downsamplers":
            yield f"input_blocks.{(int(block) + 1) * layers}.0.{rest.replace('conv', 'op')}", tensor
        elif kind == "upsamplers":
            attends = any(key.startswith(f"up_blocks.{block}.attentions") for key in state)
            last = int(block) * layers + layers - 1
            yield f"output_blocks.{last}.{1 + attends}.{rest}", tensor
        else:
            place = int(block) * layers + int(number) + (1 if side == "down" else 0)
            sides = {"down": "input_blocks", "up": "output_blocks"}
            inside = "0" if kind == "resnets" else "1"
            rest = renamed(rest, RESNET) if kind == "resnets" else rest
            yield f"{sides[side]}.{place}.{inside}.{rest}", tensor


def vae(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    blocks = len(model.config.block_out_channels)
    known = DIFFUSERS_TO_LDM_MAPPING["vae"]
    for name, tensor in model.state_dict().items():
        if name in known:
            yield known[name], tensor
            continue
        side, _, rest = name.partition(".")
        rest = rest.replace("conv_shortcut", "nin_shortcut")
        if "attentions" in rest:
            rest = renamed(rest.removeprefix("mid_block.attentions.0."), VAE_ATTENTION)
            # a convolution of one pixel
            weights = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
            yield f"{side}.mid.attn_1.{rest}", weights
        elif middle := re.fullmatch(r"mid_block\.resnets\.(\d)\.(.*)", rest):
            yield f"{side}.mid.block_{int(middle[1]) + 1}.{middle[2]}", tensor
        else:
            found = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", rest)
            assert found is not None, name
            way, block, kind, number, rest = found.groups()
            place = int(block) if way == "down" else blocks - 1 - int(block)
            inside = f"block.{number}" if kind == "resnets" else f"{way}sample"
            yield f"{side}.{way}.{place}.{inside}.{rest}", tensor


def clip(model: Any) -> Tensors:
    return {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}


def open_clip(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    state = clip(model)
    yield "positional_embedding", state.pop("embeddings.position_embedding.weight")
    yield "token_embedding.weight", state.pop("embeddings.token_embedding.weight")
    yield "text_projection", state.pop("text_projection.weight").T
    for name, tensor in state.items():
        if name.startswith("final_layer_norm."):
            yield name.replace("final_layer_norm", "ln_final"), tensor
            continue
        place = name.replace("encoder.layers.", "transformer.resblocks.")
        if ".q_proj." in place:
            parts = [state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            kind = place.rpartition(".")[2]
            yield (
                place.replace(f"self_attn.q_proj.{kind}", f"attn.in_proj_{kind}"),
                torch.cat(parts),
            )
        elif not re.search(r"\.[kv]_proj\.", place):
            yield renamed(place, OPEN_CLIP), tensor
