"""What requests may say to a pipeline: its call, described from its signature."""

from stepweave.calls.argument import (
    Argument,
    ArgumentType,
    has_scalar,
    parts_of,
    takes_lists,
)
from stepweave.calls.bounds import Bounds, WorkLimits
from stepweave.calls.description import CallDescription, Kind, described
from stepweave.calls.fields import NONE, ArgumentField, RequestFields, fields_of

__all__ = [
    "NONE",
    "Argument",
    "ArgumentField",
    "ArgumentType",
    "Bounds",
    "CallDescription",
    "Kind",
    "RequestFields",
    "WorkLimits",
    "described",
    "fields_of",
    "has_scalar",
    "parts_of",
    "takes_lists",
]
