"""One argument of a pipeline's call, read from its annotation, its default and its docstring."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import operator
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from PIL import Image

from stepweave.calls.tensors import is_offered

ArgumentType = Literal["integer", "number", "boolean", "string", "array", "image", "mask", "tensor"]

_SCALARS: dict[Any, ArgumentType] = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
}
_LISTS = (list, collections.abc.Sequence)
_UNIONS = (Union, types.UnionType)

_IMAGE = re.compile(r"(?:^|_)images?$|^image_")
_MASK = re.compile(r"(?:^|_)mask(?:_image)?$")
# tensors; masks of tokens; what belongs to adapters, callbacks, modules and inner steps
_NEVER = re.compile(
    r"^_|(?:^|_)(?:latents?|embeds|embeddings?|hidden_states|kwargs|callback|generator|device|video"
    r"|frames|waveforms|seqlens|thw)(?:_|$)|attention_mask|embeds_mask|ip_adapter|^resized_"
)
# what the server sets itself, or what would change the kind of result
_OURS = frozenset(
    ("generator", "seed", "output_type", "return_dict", "callback_steps", "debug")
    + ("output_latent", "output_uncertainty")
)
# texts that a pipeline opens or fetches
_PLACES = re.compile(
    r"(?:^|_)(?:fonts?|paths?|files?|urls?|dir|folder|repo|weights?|lora)(?:_|$)|^output"
)
_OF_PLACES = re.compile(r"\b(?:paths?|urls?|files?|directory)\b", re.IGNORECASE)
_ONE_TEXT = re.compile(r"^(?:negative_)?prompt(?:_\d+)?$")  # a list of them would be a batch


@dataclass(frozen=True)
class Argument:
    """An argument that requests may send.

    `value` is the Python type of a value (int, float, bool, str, Literal, lists and tuples of
    them, unions); None for an image or a mask, of which `several` may be given if the annotation
    allows a list, and for a tensor, of which there is a list if `several`.
    """

    name: str
    type: ArgumentType
    value: Any = None
    default: Any = None
    required: bool = False
    several: bool = False
    description: str = ""

    @property
    def is_file(self) -> bool:
        """Whether it is sent as an image file."""
        return self.type in ("image", "mask")

    def passed(self, value: Any) -> Any:
        """A value as the pipeline takes it: lists become tuples where its call says so."""
        return tuple(value) if isinstance(value, list) and _is_tuple(self.value) else value


def read_argument(
    call: Callable[..., Any], parameter: inspect.Parameter, description: str
) -> Argument | None:
    """The argument of a parameter of `call`; None if it is not one for requests, such as a
    callback, a module, a dictionary, or a tensor of inner steps."""
    name = parameter.name
    if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
        return None
    required = parameter.default is parameter.empty
    default = None if required else parameter.default
    annotation = _annotation(call, parameter)
    listed = _tensors(annotation)
    if is_offered(name) and listed is not None:
        return Argument(name, "tensor", None, None, required, listed, description)
    if name in _OURS or _NEVER.search(name):
        return None
    if _MASK.search(name) or _IMAGE.search(name):
        unknown = annotation in (None, Any)  # then the name has to do
        if unknown or _mentions(annotation, Image.Image) or _only_tensors(annotation, description):
            kind: ArgumentType = "mask" if _MASK.search(name) else "image"
            several = (
                unknown
                or _only_tensors(annotation, description)
                or any(
                    get_origin(part) in _LISTS and _mentions(part, Image.Image)
                    for part in parts_of(annotation)
                )
            )
            if re.search("tensor|numpy", description):  # not of what a request has
                description = ""
            return Argument(name, kind, None, None, required, several, description)
    value = _value_type(annotation)
    if value is None and type(default) in _SCALARS:
        value = type(default)
    if value is None and isinstance(default, (list, tuple)):
        kinds = {type(element) for element in default}
        value = list[kinds.pop()] if kinds in ({int}, {float}) else None  # type: ignore[misc]
    if value is None:
        return None
    if has_scalar(value, str) and (
        any(pattern.search(name) for pattern in (_PLACES, _IMAGE, _MASK))
        or _OF_PLACES.search(description)
    ):
        return None  # no text of a request is a file's name, or a URL
    if _ONE_TEXT.search(name):
        value = str
    return Argument(name, _type_of(value), value, default, required, False, description)


def descriptions_of(call: Callable[..., Any]) -> Mapping[str, str]:
    """The first sentence about each argument in a docstring in the style of diffusers."""
    found = re.findall(
        r"^ *(\w+) \([^\n]*\):?\n((?: +\S[^\n]*\n?)+?)(?=^ *\w+ \([^\n]*\):?\n|^\S|\Z|^ *\n)",
        inspect.getdoc(call) or "",
        re.MULTILINE,
    )
    return {name: _first_sentence(text) for name, text in found}


def _first_sentence(text: str) -> str:
    words = " ".join(text.split())
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", words)  # links
    return re.split(r"(?<=[.!?]) ", words, maxsplit=1)[0]


def _annotation(call: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """The parameter's annotation, evaluated; None if it has none, or one that cannot be."""
    if parameter.annotation is parameter.empty:
        return None
    holder = types.SimpleNamespace(__annotations__={"it": parameter.annotation})
    try:
        hints = typing.get_type_hints(holder, getattr(call, "__globals__", {}))
    except Exception:  # of a name that its module imports only for type checkers
        return None
    return hints["it"]


def parts_of(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; of another type, itself."""
    return get_args(annotation) if get_origin(annotation) in _UNIONS else (annotation,)


def _mentions(annotation: Any, kind: type) -> bool:
    """Whether a type occurs in an annotation, however deep."""
    return annotation is kind or any(_mentions(part, kind) for part in get_args(annotation))


def _tensors(annotation: Any) -> bool | None:
    """Whether an annotation has lists of tensors only; None if it is not of tensors. Images may be
    among them."""
    parts = [part for part in parts_of(annotation) if part not in (type(None), Image.Image)]
    lists = [part for part in parts if get_origin(part) in _LISTS]
    inner = [get_args(part)[0] if part in lists else part for part in parts]
    names = {getattr(part, "__name__", "") for part in inner}
    if not names or not names <= {"Tensor", "FloatTensor", "LongTensor", "BoolTensor"}:
        return None
    return len(lists) == len(parts)


def _only_tensors(annotation: Any, description: str) -> bool:
    """Whether an argument named as an image is annotated as a tensor alone, and documented to take
    images, too."""
    names = {getattr(part, "__name__", "") for part in parts_of(annotation)} - {"NoneType"}
    return bool(names) and all("Tensor" in name for name in names) and "Image" in description


def _value_type(annotation: Any) -> Any:
    """The part of an annotation that JSON has values for; None if there is none."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation in _SCALARS or origin is Literal:
        return annotation
    if origin in _UNIONS:
        parts = tuple(part for one in args if (part := _value_type(one)) is not None)
        return functools.reduce(operator.or_, parts) if parts else None
    if origin in _LISTS and args:
        inner = _value_type(args[0])
        return None if inner is None else list[inner]  # type: ignore[valid-type]
    if origin is tuple and args:
        inner = [_value_type(one) for one in args if one is not Ellipsis]
        if None in inner:
            return None
        # `tuple[int]` is written where any number of them is meant
        many = len(args) == 1 or args[-1] is Ellipsis
        return tuple[inner[0], ...] if many else tuple[tuple(inner)]  # type: ignore[misc,valid-type]
    return None


def takes_lists(value: Any) -> bool:
    """Whether a type of values has lists or tuples."""
    return any(get_origin(part) in (list, tuple) for part in parts_of(value))


def has_scalar(value: Any, scalar: type) -> bool:
    """Whether a scalar type occurs in a type of values, however deep."""
    return _mentions(value, scalar)


def _is_tuple(value: Any) -> bool:
    return any(get_origin(part) is tuple for part in parts_of(value))


def _type_of(value: Any) -> ArgumentType:
    parts = parts_of(value)
    scalars = [part for part in parts if part in _SCALARS]
    if scalars:
        return "number" if float in scalars else _SCALARS[scalars[0]]
    return "string" if get_origin(parts[0]) is Literal else "array"
