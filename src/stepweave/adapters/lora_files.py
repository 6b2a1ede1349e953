"""Reads the file of a LoRA with diffusers' and PEFT's own loaders, and checks it.

They change the modules that they load an adapter into. So they get modules without weights, of the
same configuration, from which the adapter's layers are taken.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import logging
import math
import re
import shutil
import tempfile
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LoraBaseMixin
from peft import inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from stepweave.adapters.lora_layers import ADAPTER, adapter_layer
from stepweave.compat.out_of_memory import ran_out
from stepweave.compat.row_adapters import AdapterLayer
from stepweave.errors import LoadError, OutOfMemoryError, shown
from stepweave.loading.checkpoint import read_header
from stepweave.loading.reading import listed
from stepweave.reasons import reason_of

MOST_RANK = 1024
_COMPONENT = re.compile(r"(unet|transformer|text_encoder)(_\d+)?")
# a tensor of PEFT's format, as diffusers converts others: the layer, and which of its two factors
_HALF = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
_CHANGES_THE_MODEL = ("pissa", "olora", "corda", "loftq", "lora_ga")

# that diffusers' loaders leave something out
_IGNORED = re.compile(r"(unexpected|missing|unsupported) keys|not compatible in", re.IGNORECASE)

# whose function is replaced while an adapter is loaded
_peft: Any = importlib.import_module("peft.tuners.tuners_utils")
_loading = threading.Lock()


@dataclass(frozen=True, eq=False)
class Lora:
    """An adapter in memory. `layers` are by the pipeline's own, `components` how many of each
    component; `bytes` and `ranks` (the least and the largest) are those of its weights."""

    name: str
    number: int
    layers: Mapping[nn.Module, AdapterLayer]
    modules: Collection[nn.Module]
    components: Mapping[str, int]
    ranks: tuple[int, int]
    bytes: int


def takes_loras(pipeline: Any) -> bool:
    """Whether diffusers can load LoRAs into this pipeline."""
    return isinstance(pipeline, LoraBaseMixin)


def check_takes_loras(pipeline: Any) -> None:
    """Raise LoadError for a pipeline whose layers adapters would have no effect on."""
    if not takes_loras(pipeline):
        raise LoadError(f"{type(pipeline).__name__} takes no LoRAs")
    for component in pipeline._lora_loadable_modules:
        module = getattr(pipeline, component, None)
        for part in module.modules() if isinstance(module, nn.Module) else ():
            if getattr(part, "_compiled_call_impl", None) or hasattr(part, "_orig_mod"):
                raise LoadError(f"{component} is compiled, so that it takes no LoRAs")
            if getattr(part, "fused_projections", False):
                raise LoadError(f"{component} has fused projections, so that it takes no LoRAs")


def read_lora(
    file: Path,
    name: str,
    number: int,
    pipeline: Any,
    *,
    device: torch.device,
    twins: Mapping[str, Sequence[nn.Module]] = {},
) -> Lora:
    """Read a LoRA for the modules of `pipeline`, which stay as they are, onto `device`. `twins` are
    modules with the same layers, by the component's name. Only safetensors are read.

    Raises LoadError, naming the file; its cause is an OSError if another try may succeed.
    OutOfMemoryError if it does not fit.
    """
    check_takes_loras(pipeline)
    bare = _bare(pipeline)
    try:
        with _copied(file) as copy:
            keys = _checked_keys(copy)
            _check_layers(copy, bare)
            _load(copy, bare)
            adapter = _taken(name, number, pipeline, bare, device, twins)
    except LoadError as error:
        named = error.message.startswith(file.name)
        message = error.message if named else f"{file.name}: {error.message}"
        raise LoadError(message) from error.__cause__
    except Exception as error:
        if ran_out(error):
            raise OutOfMemoryError(f"{file.name} does not fit into memory.") from error
        reason = reason_of(error)
        raise LoadError(f"{file.name} does not fit this model: {reason}") from error
    prefixes = {key.partition(".")[0] for key in keys} - adapter.components.keys()
    if unused := sorted(filter(_COMPONENT.fullmatch, prefixes)):
        raise LoadError(
            f"{file.name} has layers of {listed(unused)}, which are not adapted in a "
            f"{type(pipeline).__name__}"
        )
    return adapter


@contextlib.contextmanager
def _copied(file: Path) -> Iterator[Path]:
    """A copy of a file while it is read: it is mapped, and a process that touches what another has
    cut off of a mapped file is killed."""
    with tempfile.TemporaryDirectory(prefix="stepweave-") as folder:
        copy = Path(folder) / file.name
        try:
            shutil.copyfile(file, copy)
        except OSError as error:
            raise LoadError(f"{file.name}: {error.strerror or reason_of(error)}") from error
        yield copy


def _check_layers(file: Path, bare: Any) -> None:
    """Raise LoadError for layers that the model does not have, of which diffusers' loaders leave
    some out without a word, and for layers of which a part is missing. Text encoders' are checked
    when they are loaded."""
    with _loading, _messages():
        found = bare.lora_state_dict(
            str(file.parent), weight_name=file.name, use_safetensors=True, local_files_only=True
        )
    halves: dict[tuple[str, str], set[str]] = {}
    for key in found[0] if isinstance(found, tuple) else found:
        if (half := _HALF.fullmatch(key)) is not None:
            component, _, path = half[1].partition(".")
            halves.setdefault((component, path), set()).add(half[2])
    for (component, path), parts in halves.items():
        if not _COMPONENT.fullmatch(component):
            raise LoadError(f"the model has no layer {shown(f'{component}.{path}')}")
        module = getattr(bare, component, None)
        if module is None or component.startswith("text_encoder"):
            continue
        try:
            module.get_submodule(path)
        except AttributeError:
            raise LoadError(f"{component} has no layer {shown(path)}") from None
        if len(parts) < 2:
            (part,) = parts
            other = ({"A", "B"} - parts).pop()
            raise LoadError(f"{component}.{path} has lora_{part}, but no lora_{other}")


def _load(file: Path, bare: Any) -> None:
    """Load an adapter into a bare pipeline. Raises LoadError for one of which diffusers would leave
    something out."""
    with _loading, _on_this_thread_alone(), _messages() as messages:
        bare.load_lora_weights(
            str(file.parent), weight_name=file.name, adapter_name=ADAPTER,
            use_safetensors=True, local_files_only=True,
        )  # fmt: skip
    if messages:
        raise LoadError(f"{file.name} does not fit this model: {reason_of(messages[0])}")


@contextlib.contextmanager
def _on_this_thread_alone() -> Iterator[None]:
    """Have PEFT make its layers without weights on this thread alone. Its own function replaces a
    method of all modules, and those that other threads make meanwhile would have no weights."""
    own = _peft.init_empty_weights
    _peft.init_empty_weights = lambda: torch.device("meta")
    try:
        yield
    finally:
        _peft.init_empty_weights = own


def _checked_keys(file: Path) -> Collection[str]:
    """The names of a file's tensors. Raises LoadError for one that is damaged, has numbers that are
    not finite, or is for weights that training has changed."""
    shapes, _ = read_header(file)
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata() or {}
    told = json.loads(header.get(LORA_ADAPTER_METADATA_KEY) or "{}")
    for key, value in told.items():
        # for one of these, PEFT changes the model's own weights
        if key.endswith("init_lora_weights") and str(value).startswith(_CHANGES_THE_MODEL):
            raise LoadError(f"{file.name} is for weights that {shown(value)} has changed")
    for key, tensor in load_file(file).items():
        if not tensor.is_floating_point():
            if tensor.ndim > 1:
                raise LoadError(f"{file.name}: {key} is of {tensor.dtype}, not of real numbers")
            continue
        # whose sum may exceed the numbers of the type itself
        if not math.isfinite(float(tensor.double().sum())):
            raise LoadError(f"{file.name}: {key} has numbers that are not finite")
    return shapes.keys()


def _bare(pipeline: Any) -> Any:
    """The pipeline with modules without weights, and only those that LoRAs are loaded into."""
    bare = copy.copy(pipeline)
    for name, value in vars(pipeline).items():
        if isinstance(value, nn.Module):
            loadable = name in pipeline._lora_loadable_modules
            bare.__dict__[name] = _weightless(value) if loadable else None
    return bare


def _weightless(module: Any) -> Any:
    """A module of the same configuration, all of whose weights are zeros that take no memory."""
    with torch.device("meta"):
        make = getattr(type(module), "from_config", type(module))
        twin = make(module.config)
    for part in twin.modules():
        for key, value in part._parameters.items():
            if value is not None:
                zeros = torch.zeros((), dtype=module.dtype).expand(value.shape)
                part._parameters[key] = nn.Parameter(zeros, requires_grad=False)
        for key, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[key] = torch.zeros((), dtype=buffer.dtype).expand(buffer.shape)
    if not isinstance(twin, diffusers.ModelMixin):
        # that of transformers would initialise all weights
        twin.load_adapter = lambda **given: _inject(twin, **given)
    return twin


def _inject(
    module: nn.Module,
    *,
    adapter_name: str,
    adapter_state_dict: dict[str, torch.Tensor],
    peft_config: Any,
    low_cpu_mem_usage: bool = False,
) -> None:
    inject_adapter_in_model(
        peft_config, module, adapter_name=adapter_name, state_dict=adapter_state_dict,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )  # fmt: skip
    found = set_peft_model_state_dict(
        module, adapter_state_dict, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage
    )
    if unknown := getattr(found, "unexpected_keys", None):
        raise LoadError(f"it has {listed(sorted(unknown))}, which the model does not know")


@contextlib.contextmanager
def _messages() -> Iterator[list[Warning]]:
    """What diffusers' loaders log of keys that they ignore; they log nothing else meanwhile."""
    found: list[Warning] = []

    class Handler(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            text = record.getMessage()
            if _IGNORED.search(text):
                found.append(Warning(text))
            return False

    handler = Handler()
    loggers = [
        logging.getLogger(f"diffusers.{name}")
        for name in (
            "loaders.peft", "loaders.lora_base", "loaders.lora_pipeline", "utils.peft_utils",
            "loaders.lora_conversion_utils", "utils.state_dict_utils",
        )
    ]  # fmt: skip
    for logger in loggers:
        logger.addFilter(handler)
    try:
        yield found
    finally:
        for logger in loggers:
            logger.removeFilter(handler)


def _taken(
    name: str,
    number: int,
    pipeline: Any,
    bare: Any,
    device: torch.device,
    twins: Mapping[str, Sequence[nn.Module]],
) -> Lora:
    """The adapter that was loaded into the bare pipeline. Raises LoadError."""
    layers: dict[nn.Module, AdapterLayer] = {}
    modules: list[nn.Module] = []
    components: dict[str, int] = {}
    ranks: list[int] = []
    held: dict[int, int] = {}
    for component in pipeline._lora_loadable_modules:
        loaded, own = getattr(bare, component, None), getattr(pipeline, component, None)
        if loaded is None or own is None:
            continue
        _check_config(component, loaded)
        every = (own, *twins.get(component, ()))
        tuners = {
            path: part for path, part in loaded.named_modules() if isinstance(part, BaseTunerLayer)
        }
        for path, tuner in tuners.items():
            base = tuner.get_base_layer()
            targets = [_layer_of(one, component, path, base) for one in every]
            part = adapter_layer(tuner, targets[0], device)
            layers |= dict.fromkeys(targets, part)
            ranks += _ranks(tuner)
            for value in _weights(tuner):
                if not bool(value.isfinite().all()):
                    raise LoadError(f"{component}.{path} has numbers beyond {value.dtype}")
                held[id(value)] = value.numel() * value.element_size()
        if tuners:
            modules += every
            components[component] = len(tuners)
    if not layers:
        raise LoadError("it adapts no layer of this model")
    if max(ranks, default=1) > MOST_RANK:
        raise LoadError(f"its rank is {max(ranks)}; the limit is {MOST_RANK}")
    least, most = min(ranks, default=0), max(ranks, default=0)
    return Lora(name, number, layers, modules, components, (least, most), sum(held.values()))


def _check_config(component: str, loaded: Any) -> None:
    """Raise LoadError for an adapter that replaces weights of the model itself."""
    config = getattr(loaded, "peft_config", {}).get(ADAPTER)
    replaced = getattr(config, "modules_to_save", None)
    if replaced or getattr(config, "bias", "none") != "none":
        raise LoadError(f"it replaces weights of {component} itself, which all requests share")


def _layer_of(module: nn.Module, component: str, path: str, bare: nn.Module) -> nn.Module:
    """The layer of the pipeline's module that an adapter is for. Raises LoadError if its shape is
    another."""
    try:
        layer = module.get_submodule(path)
    except AttributeError:
        raise LoadError(f"{component} has no layer {path}") from None
    own = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    for size in ("in_features", "out_features", "in_channels", "out_channels", "kernel_size"):
        wanted, given = getattr(own, size, None), getattr(bare, size, None)
        if wanted != given:
            raise LoadError(f"{component}.{path}: its {size} is {given}; the model's is {wanted}")
    return layer


def _ranks(tuner: Any) -> list[int]:
    rank = getattr(tuner, "r", {}).get(ADAPTER)
    return [] if rank is None else [int(rank)]


def _weights(tuner: BaseTunerLayer) -> Iterator[torch.Tensor]:
    """The adapter's own tensors in PEFT's layer."""
    for name in (*tuner.adapter_layer_names, *tuner.other_param_names):
        group = getattr(tuner, name, None)
        if isinstance(group, nn.Module):
            yield from group.parameters()
            yield from group.buffers()
