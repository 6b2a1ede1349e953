"""Parses values of settings: lists, API keys, names of models, presets."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError
from pydantic_settings import NoDecode

from stepweave.config.clients import Client, clients_of_setting
from stepweave.config.preset import Preset, preset_of_setting
from stepweave.errors import shown

ANY = "*"  # among the names of a model: any name
MAX_NAME = 200  # characters
# a name of the model in the setting; colons are reserved
NAME = rf"[A-Za-z0-9](?:[A-Za-z0-9._/-]{{0,{MAX_NAME - 2}}}[A-Za-z0-9_])?"


class Quantization(BaseModel):
    """Arguments of diffusers' `PipelineQuantizationConfig`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    quant_backend: str = Field(min_length=1)
    quant_kwargs: dict[str, Any] = Field(default_factory=dict)
    components_to_quantize: list[str] | None = Field(None, min_length=1)


def _split(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    parts = tuple(filter(None, map(str.strip, value.split(","))))
    if not parts:  # an empty list of keys would turn authentication off
        raise PydanticCustomError("empty", "the list has no values")
    return parts


def _clients(value: Any) -> Any:
    """The clients of a text of keys, without the keys themselves."""
    try:
        return clients_of_setting(_split(value)) if isinstance(value, str) else value
    except ValueError as error:
        raise PydanticCustomError("keys", "{reason}", {"reason": str(error)}) from None


def _model_names(value: Any) -> Any:
    names = _split(value)
    for name in names if isinstance(names, tuple) else ():
        if name != ANY and not re.fullmatch(NAME, name):
            raise PydanticCustomError(
                "name",
                "{name} is not a valid name of a model: use 1 to {limit} letters, digits and ._/- "
                "(colons are reserved), or *",
                {"name": shown(name), "limit": MAX_NAME},
            )
    return names


def _preset(value: Any) -> Any:
    try:
        return preset_of_setting(value) if isinstance(value, str) else value
    except ValueError as error:
        raise PydanticCustomError("preset", "{reason}", {"reason": str(error)}) from None


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
ModelNames = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_model_names)]
Clients = Annotated[tuple[Client, ...], NoDecode, BeforeValidator(_clients)]
PresetValue = Annotated[Preset | None, NoDecode, BeforeValidator(_preset)]
