"""What requests may say to a pipeline: its call, described from its signature."""

from stepweave.calls.argument import (
    Argument,
    ArgumentType,
    has_scalar,
    parts_of,
    takes_lists,
)
from stepweave.calls.bounds import Bounds, WorkLimits
from stepweave.calls.description import CONTROL_IMAGE, CallDescription, Kind, described
from stepweave.calls.fields import NONE, ArgumentField, RequestFields, fields_of
from stepweave.calls.tensors import (
    SentTensor,
    has_tokens,
    read_tensor,
    stands_for_prompt,
)

__all__ = [
    "CONTROL_IMAGE",
    "NONE",
    "Argument",
    "ArgumentField",
    "ArgumentType",
    "Bounds",
    "CallDescription",
    "Kind",
    "RequestFields",
    "SentTensor",
    "WorkLimits",
    "described",
    "fields_of",
    "has_scalar",
    "has_tokens",
    "parts_of",
    "read_tensor",
    "stands_for_prompt",
    "takes_lists",
]
