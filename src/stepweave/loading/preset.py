"""What a model should be called with when the request does not say: `stepweave.json` in its directory."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from stepweave.errors import LoadError, shown
from stepweave.reasons import reason_of

FILE_NAME = "stepweave.json"


class Preset(BaseModel):
    """Optional defaults of a model. What is absent comes from the pipeline's own `__call__`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str | None = Field(None, min_length=1, max_length=200, description="Name the API serves it under.")
    width: int | None = Field(None, ge=8, description="Native width in pixels.")
    height: int | None = Field(None, ge=8, description="Native height in pixels.")
    num_inference_steps: int | None = Field(None, ge=1, description="Default number of steps.")
    guidance_scale: float | None = Field(None, ge=0, description="Default guidance.")
    call: dict[str, Any] = Field(default_factory=dict, description="Further keyword arguments of every call.")


def read_preset(directory: Path | None) -> Preset:
    """The preset in a model's directory, or an empty one. Raises LoadError, naming file and key, if it is not a valid preset."""
    path = directory / FILE_NAME if directory else None
    if path is None or not path.exists():
        return Preset()
    try:
        return Preset.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise LoadError(f"{FILE_NAME}: {'; '.join(map(_problem, error.errors()))}") from None
    except OSError as error:
        raise LoadError(reason_of(error, directory)) from None


def _problem(item: ErrorDetails) -> str:
    key = ".".join(map(str, item["loc"]))
    if item["type"] == "json_invalid":
        return f"not JSON, {item['msg'].removeprefix('Invalid JSON: ')}"
    if item["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, Preset.model_fields, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"it may have {', '.join(Preset.model_fields)}"
        return f"there is no {shown(key)} ({hint})"
    return f"{key} is {shown(item['input'])}: {item['msg']}" if key else f"it is {shown(item['input'])}: {item['msg']}"
