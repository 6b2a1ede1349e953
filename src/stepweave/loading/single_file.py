"""Reads the models in a single file (a checkpoint in the layout of the original code), with the
configurations of a directory. Nothing is asked of the hub."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.loaders import single_file_model, single_file_utils
from diffusers.loaders.single_file_utils import (
    DIFFUSERS_DEFAULT_PIPELINE_PATHS,
    SingleFileComponentError,
    create_diffusers_clip_model_from_ldm,
    create_diffusers_t5_model_from_checkpoint,
    is_clip_model_in_single_file,
    is_t5_in_single_file,
)
from safetensors.torch import load_file
from transformers import T5EncoderModel

from stepweave.config.settings import SAFETENSORS
from stepweave.errors import LoadError
from stepweave.loading.checkpoint import FAMILIES, Checkpoint
from stepweave.loading.clip_vocabulary import clip_tokenizer
from stepweave.loading.components import Component, read_index
from stepweave.loading.files import find_damage
from stepweave.loading.reading import check_tensors, listed
from stepweave.reasons import reason_of

logger = logging.getLogger(__name__)

SETTING = "STEPWEAVE_CONFIG_FROM"
CONFIGS = Path(__file__).parent / "configs"  # for FAMILIES, by diffusers' names of them
_HUB_ID = "pretrained_model_name_or_path"
_SAFETY = "safety_checker"
_DENOISERS = ("unet", "transformer")
_VAES = ("first_stage_model.", "vae.")
_ENCODERS = ("cond_stage_model.", "conditioner.", "text_encoders.")
_MODULES = (single_file_model, single_file_utils)  # those that call load_model_dict_into_meta


def config_folder(checkpoint: Checkpoint, config_from: str | None) -> Path:
    """The directory of a checkpoint's configurations: that of the setting, or a built-in one.
    Raises LoadError if there is neither."""
    if config_from is not None:
        return Path(config_from).expanduser()
    family = checkpoint.family
    if family in FAMILIES:
        return CONFIGS / str(family)
    if checkpoint.is_component:
        raise LoadError(
            f"{checkpoint.path.name} has the weights of one component, by diffusers' names; serve "
            f"the directory of its pipeline, or set {SETTING} to that"
        )
    what, example = "is of no family that diffusers knows", ""
    if family is not None:
        what = f"is of family {family!r}"
        hub_id = DIFFUSERS_DEFAULT_PIPELINE_PATHS.get(family, {}).get(_HUB_ID)
        example = "" if hub_id is None else f", such as {hub_id}"
    known = " and ".join(FAMILIES.values())
    raise LoadError(
        f"{checkpoint.path.name} {what}, and there are built-in configurations of {known} only; "
        f"set {SETTING} to the directory of a pipeline of this kind{example} (its files without "
        "weights are enough)"
    )


def index_of_configs(folder: Path) -> dict[str, Any]:
    """The `model_index.json` of a directory of configurations. Raises LoadError.

    Single files hold no safety checker: without weights in the directory, there is none.
    """
    index = read_index(folder)
    if _SAFETY in index and not any((folder / _SAFETY).glob(f"*{SAFETENSORS}")):
        index[_SAFETY] = [None, None]
    return index


def is_built_in(folder: Path) -> bool:
    return folder.parent == CONFIGS


def held_components(
    checkpoint: Checkpoint, components: Sequence[Component], folder: Path
) -> list[Component]:
    """The components that are made from the file, and tokenizers from the built-in vocabulary."""
    return [
        component
        for component in components
        if _is_held(component, checkpoint) or (component.is_tokenizer and is_built_in(folder))
    ]


def _is_held(component: Component, checkpoint: Checkpoint) -> bool:
    kind, names = component.kind, checkpoint.shapes
    if component.is_a(ModelMixin):
        if _kind_of(component) == "vae":
            return checkpoint.has(*_VAES)
        # others, such as ControlNets, are not in a model's file
        return component.name in _DENOISERS and hasattr(kind, "from_single_file")
    if component.weights is None:
        return False
    if component.is_a(T5EncoderModel):
        return bool(is_t5_in_single_file(names))
    return bool(is_clip_model_in_single_file(kind, names))


def sizes_in(checkpoint: Checkpoint, held: Sequence[Component]) -> dict[str, int]:
    """About how many bytes of a file each component has, for the progress."""
    models = [component for component in held if component.weights is not None]
    kinds = [_kind_of(component) for component in models]
    sizes = {"vae": 0, "encoder": 0, "denoiser": 0}
    for name, size in checkpoint.sizes.items():
        of = "vae" if name.startswith(_VAES) else "denoiser"
        sizes["encoder" if name.startswith(_ENCODERS) else of] += size
    return {
        f"{component.name}/": sizes[kind] // kinds.count(kind)
        for component, kind in zip(models, kinds, strict=True)
    }


def _kind_of(component: Component) -> str:
    if not component.is_a(ModelMixin):
        return "encoder"
    return "vae" if "Autoencoder" in component.kind.__name__ else "denoiser"


def read_components(
    checkpoint: Checkpoint,
    components: Sequence[Component],
    folder: Path,
    dtype: torch.dtype,
    on_begin: Callable[[str], None],
) -> tuple[dict[str, Any], dict[str, int]]:
    """Make components from the file, in `dtype` on the CPU; `on_begin` is called with the name of
    each before. Returns them, and the number of tensors read, by name. Raises LoadError, naming the
    component, if the file lacks any of its tensors."""
    read, counts = {}, {}
    tensors = load_file(checkpoint.path)  # mapped into memory, not copied
    for component in components:
        name = component.name
        if component.is_tokenizer:
            read[name] = clip_tokenizer(folder / name)
            continue
        on_begin(name)
        place = f"{name} in {checkpoint.path.name}"
        try:
            with _checked(place):
                # a copy: conversions take entries out
                read[name] = _read(component, dict(tensors), folder, dtype)
        except SingleFileComponentError:
            raise LoadError(f"{checkpoint.path.name} has no weights of {name}") from None
        except (LoadError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # from conversions, which expect certain tensors
            reason = find_damage(folder, name) or (
                f"{place} cannot be read as {component.kind.__name__} with {name}/config.json: "
                f"{type(error).__name__}: {reason_of(error, folder)}"
            )
            raise LoadError(reason) from error
        counts[name] = len(read[name].state_dict())
    return read, counts


def _read(component: Component, tensors: dict[str, Any], folder: Path, dtype: torch.dtype) -> Any:
    where: dict[str, Any] = {
        "config": str(folder),
        "subfolder": component.name,
        "torch_dtype": dtype,
        "local_files_only": True,
    }
    if component.is_a(ModelMixin):
        return component.kind.from_single_file(tensors, **where)
    if component.is_a(T5EncoderModel):
        return create_diffusers_t5_model_from_checkpoint(component.kind, tensors, **where)
    return create_diffusers_clip_model_from_ldm(component.kind, tensors, **where)


@contextlib.contextmanager
def _checked(place: str) -> Iterator[None]:
    """Within the block, raise LoadError if diffusers makes a model on this thread from tensors that
    are not all of it: it does not check that."""
    thread = threading.get_ident()
    original = single_file_utils.load_model_dict_into_meta

    def load(model: Any, tensors: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread:
            wanted = model.state_dict()
            both = wanted.keys() & tensors.keys()
            info = {
                "missing_keys": wanted.keys() - tensors.keys(),
                "unexpected_keys": tensors.keys() - wanted.keys(),
                "mismatched_keys": [
                    (key, tensors[key].shape, wanted[key].shape)
                    for key in both
                    if tensors[key].shape != wanted[key].shape
                ],
            }
            check_tensors(place, type(model).__name__, len(wanted), info)
        return original(model, tensors, *args, **kwargs)

    for module in _MODULES:
        module.load_model_dict_into_meta = load
    try:
        yield
    finally:
        for module in _MODULES:
            module.load_model_dict_into_meta = original


def set_prediction(pipeline: Any, checkpoint: Checkpoint) -> None:
    """Have the scheduler take predictions of velocity if the file says so: by empty tensors of the
    names `v_pred`, and `ztsnr` for a noise schedule that ends without signal (a convention of
    trainers and of ComfyUI)."""
    if "v_pred" not in checkpoint.shapes:
        return
    changes: dict[str, Any] = {"prediction_type": "v_prediction"}
    if "ztsnr" in checkpoint.shapes:
        # the first step must be the last of training, whose signal is zero
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = pipeline.scheduler
    if unknown := [name for name in changes if name not in scheduler.config]:
        raise LoadError(
            f"{checkpoint.path.name} was trained to predict velocity (its tensors v_pred, ztsnr), "
            f"but {type(scheduler).__name__} has no {listed(unknown)}"
        )
    pipeline.scheduler = type(scheduler).from_config(scheduler.config, **changes)
    told = ", ".join(f"{name}={value}" for name, value in changes.items())
    logger.info("%s: %s, as %s says", type(scheduler).__name__, told, checkpoint.path.name)
