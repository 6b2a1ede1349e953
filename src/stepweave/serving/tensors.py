"""The tensors of requests: whether their shapes suit the request, which size of the result they
mean, and how the pipeline gets them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from stepweave.calls import SentTensor, described, has_tokens
from stepweave.calls.bounds import MOST_TOKENS
from stepweave.errors import InvalidRequestError
from stepweave.loading.sizes import latent_positions
from stepweave.loading.trials import Size
from stepweave.planning.workload import arguments_of

PACKED = 4  # latent positions that many pipelines pack into one
MAPS = 4  # dimensions of what has rows and columns
LATENT_SIDE = 8  # pixels per latent pixel, along one axis, of pipelines that do not say
# pixels per latent pixel of Stable Cascade's and Wuerstchen's last stage, whose latents have
# `latent_dim_scale` times the embeddings' rows and columns
LAST_STAGE = 4
LENGTH = "max_sequence_length"
AUTOENCODERS = ("vae", "vqvae", "vqgan", "movq")


def check_tensors(
    given: Mapping[str, Any], pipeline: Any, defaults: Mapping[str, Any], n: int, size: Size
) -> None:
    """Raise InvalidRequestError, with the tensor's shape, for one that is not for one prompt and
    `n` results of this size (width, height), or that means more work than those may be. What else
    is wrong with a shape, the pipeline finds out. `defaults` are a preset's arguments."""
    for name, tensor in _sent(given).items():
        shape, rows = tensor.shape, n if name == "latents" else 1
        axis = 1 if name.endswith("_llama3") else 0  # the first is of layers
        if not tensor.listed and shape[axis : axis + 1] != (rows,):
            why = f"for {rows} images" if rows > 1 else "for one prompt"
            raise _refused(name, tensor, f"its dimension {axis} must be {rows}, {why}")
        of_tokens = has_tokens(name) and len(shape) > 1
        tokens = 0 if not of_tokens else shape[-1] if "_mask" in name else shape[-2]
        if tokens > (most := _most_tokens(pipeline, defaults)):
            raise _refused(name, tensor, f"it is of {tokens} tokens; the limit is {most}")
        if name == "latents":
            _check_latents(tensor, pipeline, size)
        elif (covered := _covered(name, tensor, pipeline)) and math.prod(covered) > math.prod(size):
            problem = f"it is larger than a result of {size[0]}x{size[1]} pixels"
            raise _refused(name, tensor, problem)


def size_of_tensors(
    given: Mapping[str, Any], pipeline: Any, asked: str | None, most: int
) -> Size | None:
    """Width and height of the result of a pipeline whose call has no such arguments, since they
    follow from a tensor; None if they do not. Raises InvalidRequestError if it has more than `most`
    pixels, or is another one than a request has `asked` for."""
    if {"width", "height"} & described(pipeline).takes:
        return None
    for name, tensor in _sent(given).items():
        if (covered := _covered(name, tensor, pipeline)) is None:
            continue
        told = "{}x{}".format(*covered)
        if math.prod(covered) > most:
            problem = f"it is of an image of {told} pixels; the limit is {most} pixels"
            raise _refused(name, tensor, problem)
        if asked not in (None, "auto", told):
            problem = f"size is {asked}, but {name} is of an image of {told}; leave size out."
            raise InvalidRequestError(problem, param="size")
        return covered
    return None


def passed_tensors(arguments: Mapping[str, Any], pipeline: Any) -> dict[str, Any]:
    """The arguments with copies of the tensors, on the pipeline's device and in its type."""
    device, dtype = getattr(pipeline, "_execution_device", "cpu"), dtype_of(pipeline)
    sent = {name: tensor.passed(device, dtype) for name, tensor in _sent(arguments).items()}
    return {**arguments, **sent}


def dtype_of(pipeline: Any) -> torch.dtype:
    """The pipeline's data type; float32 for pipelines that are not diffusers'."""
    dtype = getattr(pipeline, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32


def _sent(given: Mapping[str, Any]) -> dict[str, SentTensor]:
    return {name: value for name, value in given.items() if isinstance(value, SentTensor)}


def _check_latents(tensor: SentTensor, pipeline: Any, size: Size) -> None:
    positions = latent_positions(pipeline, *size)
    allowed = [positions, positions // PACKED]
    if all(getattr(pipeline, name, None) is None for name in AUTOENCODERS):
        allowed.append(math.prod(size))  # it works on pixels
    shape = tensor.shape
    found = shape[1] if len(shape) == MAPS - 1 else math.prod(shape[2:]) if len(shape) > 2 else 0
    if found not in allowed:
        problem = (
            f"for a result of {size[0]}x{size[1]} it must be [n, channels, rows, columns] or "
            f"[n, positions, channels] of {' or '.join(map(str, allowed))} positions"
        )
        raise _refused("latents", tensor, problem)


def _most_tokens(pipeline: Any, defaults: Mapping[str, Any]) -> int:
    """Of a prompt."""
    values = (defaults.get(LENGTH), getattr(arguments_of(pipeline).get(LENGTH), "default", None))
    return max([MOST_TOKENS, *(value for value in values if type(value) is int)])


def _covered(name: str, tensor: SentTensor, pipeline: Any) -> Size | None:
    """Width and height in pixels of what a tensor is about; None if it has no rows and columns."""
    if len(tensor.shape) < MAPS or has_tokens(name) or name == "latents":
        return None
    height, width = tensor.shape[-2:]
    if name == "image_embeddings":
        scale = getattr(pipeline, "config", {}).get("latent_dim_scale") or 1
        return int(width * scale) * LAST_STAGE, int(height * scale) * LAST_STAGE
    scale = getattr(pipeline, "vae_scale_factor", LATENT_SIDE) if name == "image_latents" else 1
    return width * scale, height * scale


def _refused(name: str, tensor: SentTensor, problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name} is {tensor!r}; {problem}.", param=name)
