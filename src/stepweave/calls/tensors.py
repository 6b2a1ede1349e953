"""Tensors in requests: which arguments are tensors, and what a file may hold that is sent as one.

A file is one of safetensors (https://huggingface.co/docs/safetensors), which holds numbers and runs
nothing, with exactly one tensor.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, deserialize

from stepweave.calls.bounds import Bounds
from stepweave.errors import InvalidRequestError

if TYPE_CHECKING:
    import torch

MOST_ELEMENTS = 2**24  # of a tensor: 32 layers of 128 tokens of 4,096 numbers
MOST_DIMENSIONS = 6
MOST_HEADER = 64 * 1024  # bytes
MOST_VALUE = 65_504.0  # what float16 can hold

_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_WHOLE = {"I64": "int64", "I32": "int32"}
# a flag is a byte, which need not be 0 or 1
_OF_MASKS = {"BOOL": "uint8", "U8": "uint8", **_WHOLE, **_FLOATS}

_DATA_URL = re.compile(r"^data:[a-z]+/[a-z0-9.+-]+;base64,", re.IGNORECASE)

# what is offered, by name; other tensors belong to adapters, to inner steps, or index memory
_OFFERED = re.compile(
    r"^(?:negative_)?(?:pooled_)?prompt_embeds(?:_(?!cu_)\w+)?$"
    r"|^(?:negative_)?pooled_prompt_embeds$"
    r"|^(?:negative_)?prompt_attention_mask(?:_\d)?$|^(?:negative_)?attention_mask$"
    r"|^(?:negative_)?encoder_hidden_states$|^controlnet_pooled_projections$"
    r"|^(?:negative_)?image_embed(?:s|dings)$|^latents$|^image_latents$|^hint$|^depth_map$"
    r"|^prior_token_ids$"
)
_MASKS = re.compile(r"_mask(?:_\d)?$")  # of tokens
_IDS = re.compile(r"_ids$")
# one of them is enough instead of a prompt
_FOR_PROMPT = re.compile(r"^prompt_embeds(?!.*(?:mask|pooled))|^encoder_hidden_states$")
_OF_TOKENS = re.compile(r"embeds|hidden_states")


class SentTensor:
    """A tensor of a request, on the CPU and in the type in which it was sent; it is never changed.
    As text it is its type, shape and the SHA-256 of its file. `listed` is whether the pipeline
    takes a list, with one tensor for each prompt."""

    def __init__(self, tensor: torch.Tensor, digest: str, *, listed: bool) -> None:
        self.tensor, self.digest, self.listed = tensor, digest, listed
        self.shape = tuple(tensor.shape)

    def __repr__(self) -> str:
        return f"{str(self.tensor.dtype).removeprefix('torch.')} {list(self.shape)}"

    def __str__(self) -> str:
        return f"{self!r} sha256:{self.digest}"

    def passed(self, device: Any, dtype: torch.dtype) -> Any:
        """A copy as the pipeline takes it; `dtype` is for numbers that are not whole."""
        kind = dtype if self.tensor.is_floating_point() else self.tensor.dtype
        copy = self.tensor.to(device, kind, copy=True)
        return [copy] if self.listed else copy


def is_offered(name: str) -> bool:
    """Whether requests may send an argument of that name as a tensor, if it is one."""
    return _OFFERED.search(name) is not None


def stands_for_prompt(name: str) -> bool:
    """Whether a request with the tensor of that name needs no prompt."""
    return _FOR_PROMPT.search(name) is not None


def has_tokens(name: str) -> bool:
    """Whether the last dimension but one of the tensor of that name is a number of tokens."""
    return _OF_TOKENS.search(name) is not None


def bounds_of_tensor(name: str, offered: Any, tables: Mapping[str, int]) -> Bounds | None:
    """The bounds of a tensor's numbers, by the preset's `offered`, or else by its name: ids are
    below the length of their table, if `tables` has it; None if it does not, since an id beyond it
    would break a GPU for all requests."""
    if offered is not None:
        return Bounds(offered[0], offered[1])
    if _IDS.search(name):
        return Bounds(0, tables[name] - 1) if name in tables else None
    if _MASKS.search(name):
        return Bounds(0, 1)
    return Bounds(-MOST_VALUE, MOST_VALUE)


def read_tensor(name: str, text: Any, bounds: Bounds, *, listed: bool = False) -> SentTensor:
    """The tensor of a file in base64, or in a data URL. Raises InvalidRequestError for what is no
    such file, has another number of tensors, or a type, a shape or numbers that are not allowed."""
    try:
        content = base64.b64decode(_DATA_URL.sub("", text, 1), validate=True)
    except (TypeError, ValueError):  # no text, or no base64
        raise _wrong(name, "send a file of safetensors, in base64 or as a data URL") from None
    if int.from_bytes(content[:8], "little") > MOST_HEADER:  # of any number of tensors
        limit = f"with a header of at most {MOST_HEADER} bytes"
        raise _wrong(name, f"its content is no file of safetensors {limit}")
    try:
        found = deserialize(content)  # type: ignore[no-untyped-call]
    except SafetensorError:
        raise _wrong(name, "its content is no file of safetensors") from None
    if len(found) != 1:
        raise _wrong(name, f"the file has {len(found)} tensors; send one with exactly 1")
    [(_, member)] = found
    dtype, shape = str(member["dtype"]), [int(side) for side in member["shape"]]
    ids, masks = _IDS.search(name), _MASKS.search(name)
    allowed = _WHOLE if ids else _OF_MASKS if masks else _FLOATS
    if dtype not in allowed:
        raise _wrong(name, f"its type is {dtype}; it must be {', '.join(allowed)}")
    if not 1 <= len(shape) <= MOST_DIMENSIONS or not 1 <= math.prod(shape) <= MOST_ELEMENTS:
        limit = f"1 to {MOST_DIMENSIONS} dimensions and 1 to {MOST_ELEMENTS} elements"
        raise _wrong(name, f"its shape is {shape}; the limit is {limit}")
    import torch  # takes seconds, and the server answers before it is there

    kind = getattr(torch, allowed[dtype])
    tensor = torch.frombuffer(member["data"], dtype=kind).reshape(shape)
    if not torch.isfinite(tensor).all():
        raise _wrong(name, "it has values that are NaN or infinite")
    least, most = (float(value) for value in tensor.aminmax())
    if least < bounds.least or most > bounds.most:
        limit = f"they must be from {bounds.least:g} to {bounds.most:g}"
        raise _wrong(name, f"its numbers are from {least:g} to {most:g}; {limit}")
    tensor = tensor.bool() if dtype == "BOOL" else tensor
    return SentTensor(tensor, hashlib.sha256(content).hexdigest(), listed=listed)


def _wrong(name: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name}: {problem}.", param=name)
