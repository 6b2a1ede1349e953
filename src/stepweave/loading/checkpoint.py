"""Tells what a safetensors file is, from the names and shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES, infer_diffusers_model_type
from safetensors import SafetensorError, safe_open

from stepweave.errors import LoadError
from stepweave.reasons import reason_of

# names of tensors of files that are not checkpoints, and what these are
_OTHERS = (
    (r"\blora_(up|down|A|B|unet|te\d?)\b|[._]lora\b|\blo(kr|ha)_|\bhada_w1|lora_unet_", "a LoRA"),
    (r"(^|\.)control(net)?_\w+\.", "a ControlNet"),
    (r"motion_modules\.", "a motion adapter"),
    (r"ip_adapter\.|image_proj\.", "an IP-Adapter"),
    (r"(emb_params|clip_l|clip_g|string_to_param\..*)$", "a textual inversion"),
)
_SCALED = re.compile(r"(^|\.)(scaled_fp8|scale_weight|weight_scale|scale_input)$|\.quant_state\b")
_ALONE = re.compile(r"(down_blocks|up_blocks|single_transformer_blocks|transformer_blocks)\.\d")
_WHOLE = re.compile(
    r"model\.diffusion_model\.|first_stage_model\.|cond_stage_model\.|conditioner\."
)
_VAE = re.compile(r"((encoder|decoder)\.(conv|norm|down|up|mid)|(post_)?quant_conv\.)")
V1, XL = "v1", "xl_base"  # diffusers' names of families with built-in configurations
FAMILIES = {V1: "Stable Diffusion 1.5", XL: "Stable Diffusion XL"}
_V1_CONTEXT = 768  # Stable Diffusion 2 has 1024, and is another family


@dataclass(frozen=True)
class Checkpoint:
    """The names and shapes of a file's tensors; `sizes` are in bytes."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    sizes: Mapping[str, int]

    @property
    def family(self) -> str | None:
        """diffusers' name of the family, such as `xl_base`; None if diffusers knows none."""
        meta = {
            name: torch.empty(shape, device="meta") for name, shape in self.shapes.items()
        }  # its values are of no interest
        try:
            family = str(infer_diffusers_model_type(meta))
        except Exception:  # shapes or values of nothing that it knows
            return None
        # diffusers says v1 of everything that it does not know
        key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
        is_v1 = CHECKPOINT_KEY_NAMES[V1] in meta and self.shapes.get(key, (0,))[-1] == _V1_CONTEXT
        return None if family == V1 and not is_v1 else family

    @property
    def is_component(self) -> bool:
        """Whether its tensors have diffusers' names, as in the directory of a pipeline."""
        return any(map(_ALONE.match, self.shapes))

    @property
    def numbers(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    def has(self, *prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in self.shapes)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the header of a file. Raises LoadError, saying what it is, unless it may be a checkpoint
    of a model."""
    checkpoint = Checkpoint(path, *read_header(path))
    names = checkpoint.shapes.keys()
    if any(map(_SCALED.search, names)):
        raise LoadError(
            f"{path.name} has quantised weights with scales of their own (fp8 or nf4), which "
            "diffusers does not read from a single file; use the file in float16 or bfloat16"
        )
    if (what := _other(names)) is not None:
        raise LoadError(f"{path.name} {what}")
    return checkpoint


def read_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """The shapes and the sizes in bytes of a safetensors file's tensors, by name. Raises LoadError
    for a file that cannot be read."""
    shapes, sizes = {}, {}
    try:
        size = path.stat().st_size
        if not size:
            raise LoadError(f"{path.name}: the file is empty (0 bytes)")
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():
                tensor = tensors.get_slice(name)
                shapes[name] = tuple(tensor.get_shape())
                bits = int((re.findall(r"\d+", tensor.get_dtype()) or [8])[0])
                sizes[name] = torch.Size(shapes[name]).numel() * bits // 8
    except SafetensorError as error:
        raise LoadError(
            f"{path.name}: damaged or cut off at {size} bytes ({reason_of(error)}); download it "
            "again"
        ) from None
    except OSError as error:
        raise LoadError(f"{path.name}: {error.strerror or reason_of(error)}") from None
    if not shapes:
        raise LoadError(f"{path.name} has no tensors")
    return shapes, sizes


def _other(names: Iterable[str]) -> str | None:
    """Says what a file with these tensors is, if not a checkpoint."""
    names = list(names)
    if any(map(_WHOLE.match, names)):  # a whole model may have other things inside
        return None
    kinds = (what for pattern, what in _OTHERS if any(re.search(pattern, name) for name in names))
    what = next(kinds, None)
    if what is None and len(names) == 1:
        what = "a textual inversion"
    if what is None and all(map(_VAE.match, names)):
        what = "a VAE"
    return None if what is None else f"is {what}, not a checkpoint of a model"
