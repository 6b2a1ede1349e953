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
        """JSON of printable ASCII alone: readers of event streams take some other characters for
        ends of lines."""
        return without_del(self.model_dump_json(ensure_ascii=True)).encode()


def without_del(ascii_json: str) -> str:
    """JSON in ASCII with DEL as an escape, the one character of ASCII that is left unescaped but
    cannot be printed."""
    return ascii_json.replace("\x7f", "\\u007f")
