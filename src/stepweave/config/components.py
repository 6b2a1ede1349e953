"""Components that are loaded beside the model, such as ControlNets: where they are, by name."""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError, from_json
from pydantic_settings import NoDecode

from stepweave.errors import shown

MOST_COMPONENTS = 32
# by the field of requests that names them, what they are called
GUIDES = {"controlnet": "ControlNet", "t2i_adapter": "T2I-Adapter"}
IP_ADAPTER = "ip_adapter"
VAE = "vae"
REFINER = "refiner"
WITH_IMAGE = frozenset((*GUIDES, IP_ADAPTER))  # fields of those that need an image of their own
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_PLACE = r"^[\w-][\w.-]*(/[\w-][\w.-]*)*$"  # below a source, never above it
_ON_THE_HUB = re.compile(r"([\w-][\w.-]*/[\w.-]+)@([0-9a-f]{40})")


class ComponentSource(BaseModel):
    """Where a component is: a directory, or a repository of the hub at a commit. Instead of an
    object, it may be written as its `source` alone."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    source: str = Field(min_length=1, description="A directory, or `OWNER/NAME@COMMIT`.")
    subfolder: str | None = Field(None, pattern=_PLACE, description="Where in it the component is.")
    weights: str | None = Field(
        None,
        pattern=r"^[\w-][\w.-]*\.safetensors$",
        description="The file of an IP-Adapter, if the directory has several.",
    )
    image_encoder: str | None = Field(
        None,
        pattern=_PLACE,
        description="Where in the source an IP-Adapter's image encoder is; by default in "
        "`image_encoder` beside its file.",
    )
    default: bool = Field(
        False,
        description="Whether an autoencoder is for requests that name none, instead of the "
        "model's.",
    )
    description: str = Field("", max_length=200, description="What it is for, as clients are told.")

    @model_validator(mode="before")
    @classmethod
    def _of_text(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    def on_the_hub(self) -> tuple[str, str] | None:
        """Repository and commit; None if it is a directory."""
        found = _ON_THE_HUB.fullmatch(self.source)
        return None if found is None else (found[1], found[2])

    def directory(self, base: Path | None = None) -> Path:
        """Its directory; a relative path begins at `base`."""
        path = Path(self.source).expanduser()
        return path if base is None else base / path


def _named(value: Any) -> Any:
    """Check the names of components, and how many there are."""
    if not isinstance(value, dict):
        return value
    if len(value) > MOST_COMPONENTS:
        raise PydanticCustomError(
            "many", "{count} components; the limit is {limit}",
            {"count": len(value), "limit": MOST_COMPONENTS},
        )  # fmt: skip
    for name in value:
        if not NAME.fullmatch(name):
            raise PydanticCustomError(
                "name", "{name} is not a name of a component: use 1 to 64 letters, digits and ._-",
                {"name": shown(name)},
            )  # fmt: skip
    return value


def _of_setting(value: Any) -> Any:
    """The value of a text: JSON, or the path of a file with it."""
    if not isinstance(value, str):
        return value
    try:
        content = object_or_file(value)
    except ValueError as error:
        raise PydanticCustomError("file", "{reason}", {"reason": str(error)}) from None
    try:
        return from_json(content)
    except ValueError as error:
        raise PydanticCustomError("json", "not JSON: {reason}", {"reason": str(error)}) from None


def object_or_file(text: str) -> bytes:
    """The JSON object of a setting, or of the file that it names, without a byte order mark. Raises
    ValueError for a file that cannot be read."""
    if is_object(text):
        return text.removeprefix("\ufeff").encode()
    try:
        content = Path(text.removeprefix("\ufeff")).expanduser().read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"it must be a JSON object, or the path of a file with one ({reason})"
        ) from None
    return content.removeprefix(codecs.BOM_UTF8)


def is_object(text: str) -> bool:
    """Whether a setting is a JSON object itself, and not a file's name."""
    return text.removeprefix("\ufeff").lstrip().startswith("{")


Components = Annotated[dict[str, ComponentSource], BeforeValidator(_named)]
ComponentsValue = Annotated[Components, NoDecode, BeforeValidator(_of_setting)]
