"""Messages of the Open Inference Protocol v2: JSON, with the binary tensor data extension.

Protocol:
https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md.
Extension: a message may be JSON followed by tensors as bytes, little-endian, in the order in which
the JSON names them; the header `Inference-Header-Content-Length` is the length of the JSON. A
BYTES element is its length, 4 bytes unsigned, and its bytes.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import numpy as np
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, model_validator
from pydantic_core import from_json

from stepweave.api.answer_schemas import InferenceAnswer, ReturnedTensor
from stepweave.api.schemas import check_members, check_parts, explain, without_nulls
from stepweave.errors import Code, InvalidRequestError, shown

HEADER_LENGTH = "Inference-Header-Content-Length"
TEXTS = ("BYTES",)
FLAGS = ("BOOL",)
INTEGERS = ("INT64", "INT32", "INT16", "INT8", "UINT64", "UINT32", "UINT16", "UINT8")
FLOATS = ("FP32", "FP64")
_DTYPES = {
    **{name: np.dtype(name.lower()).newbyteorder("<") for name in INTEGERS},
    "BOOL": np.dtype("?"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
SHARED_MEMORY = "there is no shared memory here; send the elements in the request"
MAX_TENSORS = 64  # of a message; each name may come once
_LENGTH = struct.Struct("<I")

Scalar: TypeAlias = bool | int | float | str


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _has_few_members(cls, values: Any) -> Any:
        if isinstance(values, dict):
            check_members(values, cls)
        return values


class _Parameters(BaseModel):
    """Of a tensor. Any other is ignored, as the protocol says."""

    model_config = ConfigDict(
        extra="ignore", strict=True, frozen=True, json_schema_extra={"additionalProperties": True}
    )


class InputParameters(_Parameters):
    binary_data_size: int | None = Field(
        None, ge=0, description="Bytes of the tensor after the JSON."
    )
    shared_memory_region: Any = Field(None, description="Refused: elements must be in the request.")


class InputTensor(_Message):
    """One input; its elements are in `data` or, with `binary_data_size`, after the JSON."""

    name: str
    shape: Annotated[list[Annotated[int, Field(ge=0)]], FailFast()]
    datatype: str
    parameters: InputParameters | None = None
    data: list[Any] | None = Field(None, description="Flat, or nested as the shape is.")


class OutputParameters(_Parameters):
    binary_data: bool | None = Field(
        None, description="Return it after the JSON; else as `binary_data_output` says."
    )
    shared_memory_region: Any = Field(None, description="Refused: elements come in the answer.")


class RequestedOutput(_Message):
    name: str
    parameters: OutputParameters | None = None


class InferenceRequest(_Message):
    """Body of `POST /v2/models/{model}/infer`."""

    id: str | None = Field(None, max_length=256, description="Echoed.")
    model_name: str | None = None
    model_version: str | None = None
    parameters: dict[str, Any] | None = Field(
        None, description="Those that are not known are ignored, with a warning."
    )
    inputs: list[InputTensor] = Field(max_length=MAX_TENSORS)
    outputs: list[RequestedOutput] | None = Field(None, max_length=MAX_TENSORS)

    @model_validator(mode="before")
    @classmethod
    def _has_few_tensors(cls, values: Any) -> Any:
        """Before each of them becomes an error."""
        for name in ("inputs", "outputs"):
            given = values.get(name) if isinstance(values, dict) else None
            if isinstance(given, list) and len(given) > MAX_TENSORS:
                raise InvalidRequestError(
                    f"{name} has {len(given)} elements; the limit is {MAX_TENSORS}.", param=name
                )
        return values


class IndexRequest(_Message):
    """Body of `POST /v2/repository/index`."""

    ready: bool | None = Field(None, description="List it only if it is ready.")


@dataclass(frozen=True)
class OutputTensor:
    """A BYTES tensor of one dimension; as JSON each element is the text that `texts` holds for
    it."""

    name: str
    elements: Sequence[bytes]
    texts: Sequence[str]
    binary: bool
    parameters: Mapping[str, Scalar]


def read_message(body: bytes, header_length: str | None) -> tuple[InferenceRequest, bytes]:
    """The JSON of a request, and the bytes of its binary tensors. Raises InvalidRequestError naming
    the tensor that is wrong."""
    length = len(body)
    if header_length is not None:
        given = int(header_length) if header_length.isdecimal() and len(header_length) < 20 else -1
        if not 0 < given <= length:
            raise InvalidRequestError(
                f"{HEADER_LENGTH} is {shown(header_length)}; it is the length of the JSON, 1 to "
                f"the body's {length} bytes.",
                param=HEADER_LENGTH,
            )
        length = given
    text = body[:length].removeprefix(codecs.BOM_UTF8)
    check_parts(text)
    try:
        values = without_nulls(from_json(text, allow_inf_nan=False, cache_strings="none"))
        return InferenceRequest.model_validate(values), body[length:]
    except ValidationError as error:
        raise _explain(error, values) from None
    except ValueError as error:
        raise InvalidRequestError(
            f"The body's JSON is not valid: {error}.", code="invalid_json"
        ) from None


def read_inputs(
    message: InferenceRequest,
    tail: bytes,
    accepted: Mapping[str, Sequence[str]],
    files: Collection[str] = (),
) -> dict[str, list[Any]]:
    """The elements of each input by name: texts, integers, numbers or flags; of shape [n, 1] as
    those of [n]. `accepted` maps names to datatypes. Elements of `files` are lists of bytes, in
    JSON base64: of shape [n, k], k for each of n.

    Raises InvalidRequestError naming the tensor and what is wrong with it.
    """
    found: dict[str, list[Any]] = {}
    offset = 0
    for tensor in message.inputs:
        name = tensor.name
        if name not in accepted:
            problem = f"there is no such input; the inputs are {', '.join(accepted)}"
            raise wrong(name, problem, code="unknown_field")
        if name in found:
            raise wrong(name, "it is given twice")
        if tensor.datatype not in accepted[name]:
            datatypes = ", ".join(accepted[name])
            raise wrong(name, f"its datatype is {shown(tensor.datatype)}; {datatypes} would do")
        each = tensor.shape[1] if name in files and len(tensor.shape) == 2 else 1
        if not tensor.shape or any(length != each for length in tensor.shape[1:]) or not each:
            more = ", or [n, k]" if name in files else ""
            raise wrong(name, f"its shape is {shown(tensor.shape)}; it must be [n] or [n, 1]{more}")
        parameters = tensor.parameters or InputParameters()
        size = parameters.binary_data_size
        if (size is None) == (tensor.data is None):
            if parameters.shared_memory_region is not None:
                raise wrong(name, f"{SHARED_MEMORY} (shared_memory_region)")
            raise wrong(
                name, "its elements must be either in data or after the JSON, with binary_data_size"
            )
        if size is None:
            elements = _from_json(tensor)
            if name in files:
                elements = [_from_base64(tensor, element) for element in elements]
        else:
            raw = tail[offset : offset + size]
            if len(raw) < size:
                raise wrong(
                    name, f"binary_data_size is {size}, but {len(raw)} bytes are left of the body"
                )
            offset += size
            read = _from_text if tensor.datatype == "BYTES" else _from_numbers
            elements = _from_bytes(tensor, raw) if name in files else read(tensor, raw)
        if len(elements) != tensor.shape[0] * each:
            raise wrong(
                name, f"its shape is {shown(tensor.shape)}, but it has {len(elements)} elements"
            )
        if name in files:
            elements = [elements[i : i + each] for i in range(0, len(elements), each)]
        found[name] = elements
    if offset != len(tail):
        raise InvalidRequestError(
            f"{len(tail) - offset} bytes after the JSON belong to no input.", code="invalid_value"
        )
    return found


def write_message(outputs: Sequence[OutputTensor], **named: Any) -> tuple[bytes, int | None]:
    """The body of an answer, `named` the members of its InferenceAnswer beside outputs, and the
    length of its JSON if binary tensors follow it."""
    tensors = []
    tails = []
    for output in outputs:
        parameters = dict(output.parameters)
        if output.binary:
            tail = b"".join(
                piece
                for element in output.elements
                for piece in (_LENGTH.pack(len(element)), element)
            )
            parameters["binary_data_size"] = len(tail)
            tails.append(tail)
        tensors.append(
            ReturnedTensor(
                name=output.name,
                datatype="BYTES",
                shape=[len(output.elements)],
                parameters=parameters,
                data=None if output.binary else output.texts,
            )
        )
    head = InferenceAnswer(**named, outputs=tensors).to_json()
    return b"".join([head, *tails]), len(head) if tails else None


def wrong(name: str, problem: str, code: Code | None = None) -> InvalidRequestError:
    """The error of an input or output tensor."""
    return InvalidRequestError(f"Tensor {shown(name)}: {problem}.", code=code, param=name[:80])


def _explain(error: ValidationError, values: Any) -> InvalidRequestError:
    """As for any other body, but a problem in a tensor with a name is told with the name."""
    location = error.errors(include_url=False)[0]["loc"]
    explained = explain(error)
    if len(location) > 2 and location[0] in ("inputs", "outputs"):
        tensor = values[location[0]][location[1]]
        name = tensor.get("name") if isinstance(tensor, dict) else None
        if isinstance(name, str):
            named = wrong(name, explained.message.removesuffix("."))
            named.code = explained.code
            return named
    return explained


def _from_json(tensor: InputTensor) -> list[Any]:
    assert tensor.data is not None
    kind: tuple[type, ...] = (str,)
    if tensor.datatype in INTEGERS:
        kind = (int,)
    elif tensor.datatype in FLOATS:
        kind = (int, float)
    elif tensor.datatype in FLAGS:
        kind = (bool,)
    data = _flat(tensor.data, tensor.shape)
    for element in data:
        if type(element) not in kind:  # a bool is an int to isinstance
            raise wrong(tensor.name, f"{shown(element)} is no {tensor.datatype}")
        if tensor.datatype in INTEGERS:
            limits = np.iinfo(_DTYPES[tensor.datatype])
            if not limits.min <= element <= limits.max:
                raise wrong(
                    tensor.name, f"{shown(element)} is out of the range of {tensor.datatype}"
                )
    if tensor.datatype not in FLOATS:
        return data
    return [_float(tensor, element) for element in data]


def _flat(data: list[Any], shape: Sequence[int]) -> list[Any]:
    """The elements, nested as [[a], [b]] or not, if the shape has a second dimension."""
    for length in shape[1:]:
        if not all(isinstance(element, list) and len(element) == length for element in data):
            break
        data = [part for element in data for part in element]
    return data


def _float(tensor: InputTensor, element: float) -> float:
    try:
        return float(element)
    except OverflowError:  # of an integer beyond any float
        raise wrong(
            tensor.name, f"{shown(element)} is out of the range of {tensor.datatype}"
        ) from None


def _from_base64(tensor: InputTensor, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise wrong(tensor.name, f"{shown(text)} is no base64 of a file") from None


def _from_bytes(tensor: InputTensor, raw: bytes) -> list[bytes]:
    elements: list[bytes] = []
    offset = 0
    while offset < len(raw):
        start = offset + _LENGTH.size
        if start > len(raw):
            raise wrong(
                tensor.name, f"element {len(elements)} ends within its length, at byte {len(raw)}"
            )
        offset = start + _LENGTH.unpack_from(raw, offset)[0]
        if offset > len(raw):
            raise wrong(
                tensor.name,
                f"element {len(elements)} has {offset - start} bytes, but {len(raw) - start} are "
                f"left",
            )
        elements.append(raw[start:offset])
    return elements


def _from_text(tensor: InputTensor, raw: bytes) -> list[str]:
    texts = []
    for index, element in enumerate(_from_bytes(tensor, raw)):
        try:
            texts.append(element.decode())
        except UnicodeDecodeError:
            raise wrong(tensor.name, f"element {index} is not UTF-8: {shown(element)}") from None
    return texts


def _from_numbers(tensor: InputTensor, raw: bytes) -> list[Any]:
    dtype = _DTYPES[tensor.datatype]
    if len(raw) % dtype.itemsize:
        raise wrong(
            tensor.name,
            f"{len(raw)} bytes are no whole number of {tensor.datatype} of {dtype.itemsize} bytes",
        )
    elements = np.frombuffer(raw, dtype)
    # through the shortest decimal, so that 7.3 is the same number as 7.3 in JSON
    if tensor.datatype == "FP32":
        return [float(text) for text in elements.astype(str)]
    values: list[Any] = elements.tolist()
    return values
