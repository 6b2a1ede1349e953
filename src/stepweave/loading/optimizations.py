"""Turns on optimizations of diffusers and torch; if one cannot be enabled, the server does not
start."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

from stepweave.compat.locks import is_autoencoder
from stepweave.config import Settings
from stepweave.errors import LoadError, shown
from stepweave.loading.quantization import check_quantised

_DENOISER = re.compile(r"(transformer|unet)(_\d+)?")
_COMPILERS = {"cpu": ("CXX", "g++", "clang++"), "cuda": ("CC", "gcc", "clang")}


def check_optimizations(settings: Settings, device: torch.device) -> None:
    """Raise LoadError for settings that cannot work, before minutes of loading."""
    if settings.offload != "off" and device.type == "cpu":
        raise LoadError(
            f"STEPWEAVE_OFFLOAD={settings.offload!r} moves weights to a GPU, but the device is the "
            f"CPU"
        )
    if settings.offload == "sequential":
        for name, reason in (
            ("compile", "torch.compile cannot trace layers whose weights are moved"),
            ("quantization", "accelerate moves plain tensors only"),
        ):
            if getattr(settings, name):
                raise LoadError(
                    f"STEPWEAVE_OFFLOAD='sequential' excludes STEPWEAVE_{name.upper()}: {reason}"
                )
    backend, known = settings.attention_backend, [name.value for name in AttentionBackendName]
    if backend is not None and backend not in known:
        raise LoadError(
            f"STEPWEAVE_ATTENTION_BACKEND={shown(backend)} is not one of {', '.join(known)}"
        )
    if settings.compile and device.type in _COMPILERS:
        variable, *programs = _COMPILERS[device.type]
        if not any(map(shutil.which, filter(None, (os.environ.get(variable), *programs)))):
            names = " or ".join(programs)
            raise LoadError(
                f"STEPWEAVE_COMPILE needs a compiler, {names}, which is not installed; a container "
                f"image has one if it is built with WITH_COMPILER=1"
            )


def apply_optimizations(pipeline: Any, settings: Settings, device: torch.device) -> None:
    """Turn on the settings' optimizations for a loaded pipeline without an engine. Raises
    LoadError. With offload the pipeline may be on the CPU, otherwise it is on `device`. Compiling
    is last, since it uses the modules as they are."""
    if settings.quantization is not None:
        check_quantised(settings.quantization, pipeline)
    for name, apply in (
        ("channels_last", channels_last),
        ("vae_slicing", lambda pipeline: _autoencoders(pipeline, "enable_slicing")),
        ("vae_tiling", lambda pipeline: _autoencoders(pipeline, "enable_tiling")),
    ):
        if getattr(settings, name):
            with _named(name):
                apply(pipeline)
    if settings.attention_backend is not None:
        with _named("attention_backend", settings.attention_backend):
            set_attention_backend(pipeline, settings.attention_backend, device)
    if settings.offload != "off":
        with _named("offload", settings.offload):
            # before the hooks are made: it empties the GPU
            if settings.offload == "model":
                pipeline.enable_model_cpu_offload(device=device)
            else:
                pipeline.enable_sequential_cpu_offload(device=device)
    if settings.compile:
        with _named("compile"):
            for denoiser in denoisers(pipeline):
                compile_blocks(denoiser)


@contextlib.contextmanager
def _named(setting: str, value: Any = True) -> Iterator[None]:
    """Turn errors of diffusers or torch into LoadError with the setting's name."""
    try:
        yield
    except LoadError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise LoadError(
            f"STEPWEAVE_{setting.upper()}={shown(value)} could not be enabled: {reason}"
        ) from error


def denoisers(pipeline: Any) -> list[Any]:
    """The pipeline's transformers or UNets by name; if it has none, all its models but
    autoencoders."""
    models = {
        name: model for name, model in pipeline.components.items() if isinstance(model, ModelMixin)
    }
    named = [model for name, model in models.items() if _DENOISER.fullmatch(name)]
    return named or [model for model in models.values() if not is_autoencoder(model)]


def channels_last(pipeline: Any) -> None:
    """Give 2D convolutions the memory format that cuDNN and oneDNN prefer, except in models that
    also have 3D ones."""
    applied = False
    for model in pipeline.components.values():
        if isinstance(model, ModelMixin):
            ranks = {parameter.ndim for parameter in model.parameters()}
            if 4 in ranks and 5 not in ranks:
                model.to(memory_format=torch.channels_last)
                applied = True
    if not applied:
        raise LoadError(
            f"STEPWEAVE_CHANNELS_LAST=True: {type(pipeline).__name__} has no 2D convolutions"
        )


def _autoencoders(pipeline: Any, method: str) -> None:
    autoencoders = [model for model in pipeline.components.values() if is_autoencoder(model)]
    if not autoencoders:
        raise ValueError(f"{type(pipeline).__name__} has no autoencoder")
    for autoencoder in autoencoders:
        if not hasattr(autoencoder, method):
            raise ValueError(f"{type(autoencoder).__name__} has no {method}")
        getattr(autoencoder, method)()


def set_attention_backend(pipeline: Any, backend: str, device: torch.device) -> None:
    """Set the denoisers' attention backend, and try it.

    Raises ValueError for models whose attention processors call torch directly, such as UNets and
    Stable Diffusion 3: diffusers would silently ignore the setting.
    """
    models = denoisers(pipeline)
    if not models:
        raise ValueError(f"{type(pipeline).__name__} has no denoiser")
    for model in models:
        processors = [getattr(part, "processor", None) for part in model.modules()]
        if not any(hasattr(processor, "_attention_backend") for processor in processors):
            raise ValueError(
                f"the attention of {type(model).__name__} does not go through diffusers' dispatcher"
            )
    for model in models:
        model.set_attention_backend(backend)
        dtype = getattr(model, "dtype", torch.float32)
        size = getattr(getattr(model, "config", None), "attention_head_dim", None)
        size = size if isinstance(size, int) else 64
        # batch, tokens, heads, size
        query = torch.zeros(1, 8, 2, size, device=device, dtype=dtype)
        with torch.no_grad():
            dispatch_attention_fn(query, query, query, backend=AttentionBackendName(backend))


def compile_blocks(model: Any) -> None:
    """Compile a model's repeated blocks, for any number of rows, at its first call."""
    if not getattr(model, "_repeated_blocks", None):
        raise ValueError(f"{type(model).__name__} declares no repeated blocks")
    model.compile_repeated_blocks(dynamic=True)
