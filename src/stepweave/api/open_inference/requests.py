"""The requests in a message of the Open Inference Protocol: an image for each element of
`prompt`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from pydantic import ValidationError

from stepweave.api.model_fields import with_fields
from stepweave.api.open_inference.tensors import (
    FLAGS,
    FLOATS,
    INTEGERS,
    TEXTS,
    InferenceRequest,
    wrong,
)
from stepweave.api.schemas import MAX_SAME, Edit, explain, some_of
from stepweave.calls import ArgumentType, RequestFields
from stepweave.errors import InvalidRequestError, StepweaveError, shown
from stepweave.parameters import OPTIONAL_ARGUMENTS, ImageRequest, PriorityName

INPUTS = {
    "prompt": TEXTS,
    "negative_prompt": TEXTS,
    "size": TEXTS,
    "seed": INTEGERS,
    "num_inference_steps": ("INT32", *(name for name in INTEGERS if name != "INT32")),
    "guidance_scale": FLOATS,
}
DATATYPES: dict[ArgumentType, Sequence[str]] = {
    "integer": ("INT32", *(name for name in INTEGERS if name != "INT32")),
    "number": FLOATS,
    "boolean": FLAGS,
    "string": TEXTS,
    "tensor": TEXTS,  # a file of safetensors in base64
}
OUTPUTS = ("image", "parameters")
TRITON_PRIORITIES: dict[int, PriorityName] = {1: "high", 2: "normal", 3: "low"}
MICROSECONDS = 1000  # in a millisecond


class EditOrGeneration(Edit, ImageRequest):
    """A request for one image, from others or not."""


def accepted_inputs(arguments: Collection[str], fields: RequestFields) -> dict[str, Sequence[str]]:
    """The inputs of a model whose pipeline's call has these arguments, each with its datatypes, the
    usual one first. Arguments that are lists come as parameters."""
    found: dict[str, Sequence[str]] = {
        name: datatypes
        for name, datatypes in INPUTS.items()
        if (name not in OPTIONAL_ARGUMENTS or name in arguments)
        and (name != "prompt" or fields.prompt)
    }
    if fields.loras:
        found["lora"] = TEXTS
    for name, known in fields.arguments.items():
        if known.argument.type in DATATYPES and name not in found:
            found[name] = DATATYPES[known.argument.type]
    return {**found, **dict.fromkeys(file_inputs(fields), TEXTS)}


def file_inputs(fields: RequestFields) -> tuple[str, ...]:
    """The inputs that are image files."""
    return tuple(fields.files)


def required_inputs(fields: RequestFields) -> tuple[str, ...]:
    """The inputs that every request has."""
    needs = (name for name in fields.needs if fields.arguments[name].argument.type in DATATYPES)
    return (*(("prompt",) if fields.prompt and not fields.for_prompt else ()), *needs)


def schema_of(fields: RequestFields) -> type[EditOrGeneration]:
    """The schema of a request for one image."""
    return with_fields(EditOrGeneration, fields, files=False)


def _parameters(fields: RequestFields) -> list[str]:
    return [name for name in schema_of(fields).model_fields if name != "prompt"]


def parameters_of(given: dict[str, Any], fields: RequestFields) -> dict[str, Any]:
    """The request's parameters as fields of an ImageRequest. `priority` and `timeout` may be as
    Triton defines them."""
    known = (*_parameters(fields), "timeout")
    values = {name: value for name, value in given.items() if value is not None and name in known}
    for name in ("timeout", "priority"):
        if type(values.get(name)) is int and values[name] == 0:  # Triton's default
            del values[name]
    timeout = values.pop("timeout", None)
    if timeout is not None:
        if type(timeout) is not int or timeout < 1:
            raise InvalidRequestError(
                f"timeout is {shown(timeout)}; it is a number of microseconds, or 0 for none.",
                param="timeout",
            )
        if "deadline_ms" in values:
            raise InvalidRequestError(
                "timeout and deadline_ms are both given; they mean the same.", param="timeout"
            )
        values["deadline_ms"] = -(-timeout // MICROSECONDS)
    if type(values.get("priority")) is int:
        if values["priority"] not in TRITON_PRIORITIES:
            raise InvalidRequestError(
                f"priority is {values['priority']}; as a number it is 1 (high), 2 (normal), 3 "
                f"(low) or 0 for the default.",
                param="priority",
            )
        values["priority"] = TRITON_PRIORITIES[values["priority"]]
    return values


def as_sent(
    error: StepweaveError, message: InferenceRequest, image: ImageRequest
) -> StepweaveError:
    """The error, which names `timeout` if the client sent that."""
    timeout = (message.parameters or {}).get("timeout")
    told = f"deadline_ms is {image.deadline_ms}"
    if timeout and told in error.message:
        error = error.again()
        error.message = error.message.replace(told, f"timeout is {timeout} microseconds")
        error.param = error.param and "timeout"
    return error


def ignored_parameters(message: InferenceRequest, fields: RequestFields) -> list[str]:
    """A warning of unknown parameters, which the protocol says to ignore."""
    accepted = (*_parameters(fields), "timeout", "binary_data_output")
    unknown = [name for name in message.parameters or () if name not in accepted]
    known = f"Those that are known are {', '.join(accepted)}."
    return [f"Unknown parameters are ignored: {some_of(unknown)}. {known}"] if unknown else []


def image_requests(
    given: dict[str, list[Any]], shared: dict[str, Any], most: int, fields: RequestFields
) -> list[tuple[EditOrGeneration, dict[str, list[bytes]]]]:
    """One request for each prompt, and its files by name; for a model without prompts, for each
    element of the longest input. Raises InvalidRequestError naming the tensor or parameter that is
    wrong."""
    prompted = fields.prompt and not (set(fields.for_prompt) & {*given, *shared})
    leading = (
        "prompt"
        if prompted or "prompt" in given
        else max(given, key=lambda name: len(given[name]), default="")
    )
    if prompted and leading not in given:
        raise wrong(leading, "it is missing", code="missing_field")
    count = len(given[leading]) if leading else 1
    if not 1 <= count <= most:
        raise wrong(leading, f"its shape is [{count}]; the limit is 1 to {most} elements")
    for name, elements in given.items():
        if len(elements) not in (1, count):
            raise wrong(
                name,
                f"its shape is [{len(elements)}]; it must be [1] or, as {leading}'s, [{count}]",
            )
        if name in shared:
            raise wrong(name, "it is given as an input and as a parameter")
    requests = []
    for i in range(count):
        values = {
            name: elements[i if len(elements) == count else 0] for name, elements in given.items()
        }
        files = {name: values.pop(name) for name in file_inputs(fields) if name in values}
        for name, several in files.items():
            if len(several) > MAX_SAME:
                raise wrong(
                    name, f"it has {len(several)} files for an image; the limit is {MAX_SAME}"
                )
        try:
            request = schema_of(fields).model_validate({**shared, **values})
        except ValidationError as error:
            explained = explain(error, schema_of(fields))
            raise (of_element(explained, i, values) if count > 1 else explained) from None
        requests.append((request, files))
    return requests


def of_element(error: StepweaveError, element: int, tensors: Collection[str]) -> StepweaveError:
    """The error of one image of several, which names the tensor, if it is about one of these, and
    the element."""
    tensor = (error.param or "").partition(".")[0]  # its members are in the same element
    if tensor not in tensors:
        return error
    named = wrong(tensor, f"element {element}: {error.message.removesuffix('.')}")
    error = error.again()
    error.message, error.param = named.message, named.param
    return error


def requested_outputs(message: InferenceRequest) -> dict[str, bool]:
    """The requested outputs, and whether each is to be binary."""
    default = (message.parameters or {}).get("binary_data_output")
    default = False if default is None else default
    if type(default) is not bool:
        raise InvalidRequestError(
            f"binary_data_output is {shown(default)}; say true or false.",
            param="binary_data_output",
        )
    if not message.outputs:
        return dict.fromkeys(OUTPUTS, default)
    asked: dict[str, bool] = {}
    for output in message.outputs:
        if output.name not in OUTPUTS:
            problem = f"there is no such output; the outputs are {', '.join(OUTPUTS)}"
            raise wrong(output.name, problem, code="unknown_field")
        if output.name in asked:
            raise wrong(output.name, "it is asked for twice")
        if output.parameters is not None and output.parameters.shared_memory_region is not None:
            raise wrong(
                output.name, "there is no shared memory here; read the elements from the answer"
            )
        binary = None if output.parameters is None else output.parameters.binary_data
        asked[output.name] = default if binary is None else binary
    return asked
