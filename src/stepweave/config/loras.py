"""Where LoRAs are: a directory, and files of the hub at a commit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError
from pydantic_settings import NoDecode

from stepweave.config.components import NAME
from stepweave.errors import shown

_HUB = re.compile(
    rf"(?:(?P<name>{NAME.pattern})=)?"
    r"(?P<repository>[\w-][\w.-]*/[\w.-]+)@(?P<commit>[0-9a-f]{40})"
    r"(?::(?P<file>[\w-][\w./-]*\.safetensors))?"
)
_UNPINNED = re.compile(r"(?:[\w.-]+=)?[\w-][\w.-]*/[\w.-]+@\S*")


class HubLora(NamedTuple):
    """A LoRA of the hub; `file` is None for a repository with one."""

    repository: str
    commit: str
    file: str | None


class LoraPlaces(BaseModel):
    """The value of STEPWEAVE_LORAS, read: a directory, and files of the hub by name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    directory: Path | None = None
    hub: dict[str, HubLora] = {}


def _places(value: Any) -> Any:
    """The places that a text names, separated by commas."""
    if not isinstance(value, str):
        return value
    directory: Path | None = None
    hub: dict[str, HubLora] = {}
    for entry in filter(None, map(str.strip, value.split(","))):
        found = _HUB.fullmatch(entry)
        if found is not None:
            name = found["name"] or found["repository"].partition("/")[2]
            if name in hub:
                raise _wrong(f"two of them have the name {shown(name)}; use NAME=OWNER/...")
            hub[name] = HubLora(found["repository"], found["commit"], found["file"])
        elif _UNPINNED.fullmatch(entry) and not Path(entry).is_dir():
            raise _wrong(
                f"{shown(entry)} is no hub id at a commit: OWNER/NAME@COMMIT, 40 hex digits, with "
                "NAME= before it, and :FILE.safetensors after it if there are several"
            )
        elif directory is not None:
            raise _wrong(f"{shown(entry)} would be a second directory; link its files into one")
        else:
            directory = Path(entry).expanduser()
    return {"directory": directory, "hub": hub}


def _wrong(reason: str) -> PydanticCustomError:
    return PydanticCustomError("loras", "{reason}", {"reason": reason})


LorasValue = Annotated[LoraPlaces | None, NoDecode, BeforeValidator(_places)]
