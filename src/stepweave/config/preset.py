"""Defaults of a model, for requests that do not set a value.

Sources in order of precedence: the setting `STEPWEAVE_PRESET`, the file `stepweave.json` in the
model's directory, a built-in preset for a known layout (`loading.builtin`), and the pipeline's own
`__call__`. They are merged member by member, and `call` and `limits` argument by argument.
"""

from __future__ import annotations

import codecs
import difflib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from stepweave.config.components import Components, is_object, object_or_file
from stepweave.errors import LoadError, shown
from stepweave.reasons import reason_of

FILE_NAME = "stepweave.json"
SETTING = "STEPWEAVE_PRESET"

# members that are arguments of the call, too
_MEMBERS = ("width", "height", "num_inference_steps", "guidance_scale")
_MAPS = ("call", "limits", "components")  # members that are merged argument by argument
# arguments that the server sets
_OURS = ("prompt", "generator", "output_type", "return_dict", "num_images_per_prompt")


class Preset(BaseModel):
    """Optional defaults of a model; absent and null members come from the next source."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    id: str | None = Field(
        None, min_length=1, max_length=200, description="Name of the model in the API."
    )
    width: int | None = Field(None, ge=8, description="Native width in pixels.")
    height: int | None = Field(None, ge=8, description="Native height in pixels.")
    num_inference_steps: int | None = Field(None, ge=1, description="Default number of steps.")
    guidance_scale: float | None = Field(None, ge=0, le=100, description="Default guidance.")
    call: dict[str, Any] = Field(
        default_factory=dict,
        description="Further keyword arguments of calls, for requests that do not set them.",
    )
    limits: dict[str, tuple[float, float] | Literal[False]] = Field(
        default_factory=dict,
        description="What requests may set an argument of the call to: `[least, most]`, or `false` "
        "for nothing.",
    )
    components: Components = Field(
        default_factory=dict,
        description="Components beside the model by name, as in `STEPWEAVE_COMPONENTS`; relative "
        "paths begin at the model's directory.",
    )
    _sources: dict[str, str] = PrivateAttr(default_factory=dict)  # by member or `call.ARGUMENT`

    @field_validator("call")
    @classmethod
    def _are_further_ones(cls, call: dict[str, Any]) -> dict[str, Any]:
        for name in call:
            if name in _MEMBERS:
                raise PydanticCustomError(
                    "member", "{name} must be a member of its own, outside call", {"name": name}
                )
            if name in _OURS:
                raise PydanticCustomError("ours", "{name} is set by the server", {"name": name})
        return call

    def given(self) -> dict[str, Any]:
        """Its values by member, `call.ARGUMENT` or `limits.ARGUMENT`."""
        members = {name: value for name, value in self if name not in _MAPS and value is not None}
        return members | {
            f"{member}.{name}": value
            for member in _MAPS
            for name, value in getattr(self, member).items()
        }

    def named(self, source: str) -> Self:
        """A copy whose values are all from `source`."""
        return self._with_sources(dict.fromkeys(self.given(), source))

    def over(self, weaker: Preset) -> Preset:
        """Merged with a preset of lower precedence."""
        members = {
            name: value
            for preset in (weaker, self)
            for name, value in preset
            if name not in _MAPS and value is not None
        }
        merged = Preset(
            **members,
            call={**weaker.call, **self.call},
            limits={**weaker.limits, **self.limits},
            components={**weaker.components, **self.components},
        )
        return merged._with_sources({**weaker._all_sources(), **self._all_sources()})

    def source(self, name: str) -> str:
        """The source of a member or `call.ARGUMENT`."""
        return self._sources.get(name, FILE_NAME)

    def sources(self) -> list[str]:
        """The sources of its values, in order of precedence."""
        sources = set(self._all_sources().values())
        return sorted(sources, key=lambda source: (source != SETTING, source != FILE_NAME, source))

    def _all_sources(self) -> dict[str, str]:
        return {name: self.source(name) for name in self.given()}

    def _with_sources(self, sources: dict[str, str]) -> Self:
        copy = self.model_copy()
        copy._sources = sources
        return copy


def read_preset(directory: Path | None) -> Preset:
    """The preset in a model's directory, or an empty one. Raises LoadError if it is invalid."""
    path = directory / FILE_NAME if directory else None
    if path is None or not path.exists():
        return Preset()
    try:
        return parsed(path.read_bytes()).named(FILE_NAME)
    except ValueError as error:
        raise LoadError(f"{FILE_NAME}: {error}") from None
    except OSError as error:
        raise LoadError(reason_of(error, directory)) from None


def preset_of_setting(text: str) -> Preset:
    """The preset in the setting: a JSON object, or the path to one. Raises ValueError."""
    content = object_or_file(text)
    try:
        return parsed(content).named(SETTING)
    except ValueError as error:
        raise ValueError(f"{'' if is_object(text) else 'in the file, '}{error}") from None


def parsed(content: bytes) -> Preset:
    """The preset in a JSON text. Raises ValueError with each wrong member, its value and limit."""
    try:
        return Preset.model_validate_json(content.removeprefix(codecs.BOM_UTF8))
    except ValidationError as error:
        raise ValueError("; ".join(map(_problem, error.errors()))) from None


def _problem(item: ErrorDetails) -> str:
    key = ".".join(map(str, item["loc"]))
    if item["type"] == "json_invalid":
        return f"not JSON, {item['msg'].removeprefix('Invalid JSON: ')}"
    if item["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, Preset.model_fields, n=1)
        allowed = ", ".join(Preset.model_fields)
        hint = f"did you mean {close[0]!r}?" if close else f"allowed are {allowed}"
        return f"there is no member {shown(key)} ({hint})"
    if item["type"] in ("member", "ours"):
        return f"call.{item['msg']}"
    return f"{key or 'it'} is {shown(item['input'])}: {item['msg']}"
