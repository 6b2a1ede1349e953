"""Base of the models that make answers and document them in OpenAPI."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_json


def _is_none(value: Any) -> bool:
    return value is None


def _never_null(schema: dict[str, Any]) -> None:
    (branch,) = (branch for branch in schema.pop("anyOf") if branch != {"type": "null"})
    schema.update(branch)
    del schema["default"]


def absent(**options: Any) -> Any:
    """A member that answers omit if it is None."""
    return Field(default=None, exclude_if=_is_none, json_schema_extra=_never_null, **options)


class Resource(BaseModel):
    """An answer's body, or a part of one."""

    model_config = ConfigDict(frozen=True)

    def to_json(self) -> bytes:
        return to_json(self, inf_nan_mode="null")

    def to_ascii(self) -> bytes:
        """As JSON in printable ASCII: readers of event streams end lines at other characters."""
        return self.model_dump_json(ensure_ascii=True).replace("\x7f", "\\u007f").encode()
