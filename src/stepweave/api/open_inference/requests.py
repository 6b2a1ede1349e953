"""The requests in a message of the Open Inference Protocol: an image for each element of
`prompt`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from pydantic import ValidationError

from stepweave.api.open_inference.tensors import FLOATS, INTEGERS, TEXTS, InferenceRequest, wrong
from stepweave.api.schemas import explain, some_of
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
REQUIRED = ("prompt",)
OUTPUTS = ("image", "parameters")
PARAMETERS = tuple(name for name in ImageRequest.model_fields if name != "prompt")
TRITON_PRIORITIES: dict[int, PriorityName] = {1: "high", 2: "normal", 3: "low"}
MICROSECONDS = 1000  # in a millisecond


def accepted_inputs(arguments: Collection[str]) -> dict[str, Sequence[str]]:
    """The inputs of a pipeline whose call has these arguments, each with its datatypes, the usual
    one first."""
    return {
        name: datatypes
        for name, datatypes in INPUTS.items()
        if name not in OPTIONAL_ARGUMENTS or name in arguments
    }


def parameters_of(given: dict[str, Any]) -> dict[str, Any]:
    """The request's parameters as fields of an ImageRequest. `priority` and `timeout` may be as
    Triton defines them."""
    known = (*PARAMETERS, "timeout")
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


def ignored_parameters(message: InferenceRequest) -> list[str]:
    """A warning of unknown parameters, which the protocol says to ignore."""
    accepted = (*PARAMETERS, "timeout", "binary_data_output")
    unknown = [name for name in message.parameters or () if name not in accepted]
    known = f"Those that are known are {', '.join(accepted)}."
    return [f"Unknown parameters are ignored: {some_of(unknown)}. {known}"] if unknown else []


def image_requests(
    fields: dict[str, list[Any]], shared: dict[str, Any], most: int
) -> list[ImageRequest]:
    """One request for each prompt. Raises InvalidRequestError naming the tensor or parameter that
    is wrong."""
    if "prompt" not in fields:
        raise wrong("prompt", "it is missing", code="missing_field")
    count = len(fields["prompt"])
    if not 1 <= count <= most:
        raise wrong("prompt", f"its shape is [{count}]; the limit is 1 to {most} elements")
    for name, elements in fields.items():
        if len(elements) not in (1, count):
            raise wrong(
                name, f"its shape is [{len(elements)}]; it must be [1] or, as prompt's, [{count}]"
            )
        if name in shared:
            raise wrong(name, "it is given as an input and as a parameter")
    requests = []
    for i in range(count):
        values = {
            name: elements[i if len(elements) == count else 0] for name, elements in fields.items()
        }
        try:
            requests.append(ImageRequest.model_validate({**shared, **values}))
        except ValidationError as error:
            explained = explain(error)
            if explained.param in values and count > 1:
                explained = wrong(
                    explained.param, f"element {i}: {explained.message.removesuffix('.')}"
                )
            raise explained from None
    return requests


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
