"""Bodies of requests with the arguments and images of the model that is served: subclasses of the
schemas that all models have."""

from __future__ import annotations

import functools
import operator
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    WithJsonSchema,
    create_model,
)
from pydantic_core import PydanticCustomError, from_json

from stepweave.api.schemas import Edit, Files
from stepweave.calls import (
    Argument,
    ArgumentField,
    Bounds,
    RequestFields,
    SentTensor,
    has_scalar,
    parts_of,
    read_tensor,
    takes_lists,
)
from stepweave.parameters import ImageRequest

RequestT = TypeVar("RequestT", bound=ImageRequest)

_UNIONS = (Union, UnionType)
TENSOR = {
    "type": "string",
    "contentEncoding": "base64",
    "contentMediaType": "application/octet-stream",
}
OF_TENSOR = "A file of safetensors with one tensor, in base64 or as a data URL."


def with_fields(
    schema: type[RequestT], fields: RequestFields, *, files: bool = True
) -> type[RequestT]:
    """The schema with a model's arguments, and with `files`, its images as members."""
    return _with_fields(schema, fields, files)  # type: ignore[return-value]


@functools.lru_cache(maxsize=64)
def _with_fields(
    schema: type[ImageRequest], fields: RequestFields, files: bool
) -> type[ImageRequest]:
    arguments = {
        name: _member(argument, required=name in fields.needs)
        for name, argument in fields.arguments.items()
        if name not in schema.model_fields
    }
    images = {
        name: _image(argument)
        for name, argument in (fields.images.items() if files else ())
        if name not in schema.model_fields
    }
    prompt: dict[str, Any] = {}
    if images and "strength" not in schema.model_fields:
        prompt["strength"] = (float | None, Edit.model_fields["strength"])
    if not fields.prompt:
        description = "This model takes none: it has no effect."
        prompt["prompt"] = (str | None, Field(None, description=description))
    elif fields.for_prompt:
        told = f"Description of the image; or send {' or '.join(fields.for_prompt)}."
        prompt["prompt"] = (str | None, Field(None, min_length=1, description=told))
    made = create_model(schema.__name__, __base__=schema, **prompt, **arguments, **images)
    made.__doc__ = schema.__doc__
    made.ARGUMENTS = tuple(arguments)
    made.IMAGES = (*schema.IMAGES, *images)
    return made


def _image(argument: Argument) -> Any:
    text = argument.description or "An image."
    return (Files | None, Field(None, description=f"{text} As data URLs."))


def _member(field: ArgumentField, *, required: bool) -> Any:
    argument, bounds = field.argument, field.bounds
    if argument.type == "tensor":
        description = f"{argument.description} {OF_TENSOR}".strip()
        kind = _tensor(argument, bounds)
        # first None: what is read as a tensor is one, or ends the request
        if required:
            return (kind, Field(description=description))
        return (None | kind, Field(None, description=description))
    kind = bounded(argument.value, bounds)
    if takes_lists(argument.value):
        kind = Annotated[kind, BeforeValidator(functools.partial(_of_text, argument.value))]
    if required:
        return (kind, Field(description=argument.description))
    default = argument.default
    told = "" if default is None or len(str(default)) > 60 else f" The pipeline's own: {default}."
    return (kind | None, Field(None, description=f"{argument.description}{told}".strip()))


def _tensor(argument: Argument, bounds: Bounds) -> Any:
    """The type of a tensor, as pydantic reads it from a text; in JSON that may be the only element
    of a list, if the pipeline takes one."""

    def read(value: Any) -> SentTensor:
        if argument.several and isinstance(value, list) and len(value) == 1:
            [value] = value
        return read_tensor(argument.name, value, bounds, listed=argument.several)

    one_or_list = {"anyOf": [TENSOR, {"type": "array", "items": TENSOR, "maxItems": 1}]}
    schema = WithJsonSchema(one_or_list if argument.several else TENSOR)
    return Annotated[Any, PlainValidator(read), PlainSerializer(str), schema]


def bounded(value: Any, bounds: Bounds) -> Any:
    """The type of an argument's value as pydantic checks it, with bounds of its numbers, lists and
    texts."""
    if value in (int, float):
        least, most = (value(side) for side in (bounds.least, bounds.most))
        return Annotated[value, Field(ge=least, le=most)]
    if value is str:
        return Annotated[str, Field(max_length=bounds.characters)]
    origin, args = get_origin(value), get_args(value)
    if origin in _UNIONS:
        return functools.reduce(operator.or_, (bounded(part, bounds) for part in args))
    if origin is list or (origin is tuple and args[-1] is Ellipsis):
        inner = bounded(args[0], bounds)
        return Annotated[list[inner], Field(min_length=1, max_length=bounds.length)]  # type: ignore[valid-type]
    if origin is tuple:
        inner = bounded(args[0], bounds)
        return Annotated[list[inner], Field(min_length=len(args), max_length=len(args))]  # type: ignore[valid-type]
    return value


def _of_text(kind: Any, value: Any) -> Any:
    """The value of a text, as forms have it, of an argument that may be a list: JSON, or what would
    be its only element."""
    if not isinstance(value, str):
        return value
    words = has_scalar(kind, str)
    if value.lstrip().startswith("[") or not words:
        try:
            value = from_json(value)
        except ValueError:
            if has_scalar(kind, int) or has_scalar(kind, float):
                raise PydanticCustomError(
                    "list", "send a list as JSON, such as [1, 2], or the field several times"
                ) from None
    only_lists = all(get_origin(part) in (list, tuple) for part in parts_of(kind))
    return [value] if only_lists and not isinstance(value, list) else value
