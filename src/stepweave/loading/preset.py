"""What a model should be called with when the request does not say: `stepweave.json` in its directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stepweave.errors import LoadError

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
    """The preset in a model's directory, or an empty one. Raises LoadError if the file is not a valid preset."""
    path = directory / FILE_NAME if directory else None
    if path is None or not path.is_file():
        return Preset()
    try:
        return Preset.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise LoadError(f"{FILE_NAME} of the model: {problems}") from None
