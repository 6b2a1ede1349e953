"""Which names requests may call the model by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stepweave.errors import LoadError, shown
from stepweave.loading.preset import Preset, read_preset

if TYPE_CHECKING:
    from stepweave.config import Settings

ANY = "*"
MAX_NAME = 200  # characters
NAME = (
    rf"[A-Za-z0-9](?:[A-Za-z0-9._/-]{{0,{MAX_NAME - 2}}}[A-Za-z0-9_])?"  # of a setting; a colon is kept for later use
)


class ModelNames:
    """The names of `STEPWEAVE_MODEL_NAMES`, or the model's `own` where there are none.

    `told` is the one that answers have: the first, or the model's own where that is `*`. With `*` among them any name is taken
    that has no colon and at most `MAX_NAME` characters.
    """

    def __init__(self, names: Sequence[str], own: str) -> None:
        self.listed = tuple(dict.fromkeys(name for name in names if name != ANY)) or (own,)
        self.any = ANY in names
        self.told = own if names and names[0] == ANY else self.listed[0]

    def take(self, name: str) -> bool:
        """Whether a request may call the model so."""
        return name in (self.told, *self.listed) or (self.any and is_any_name(name))

    def refusal(self, name: str) -> str:
        """Why a request may not, and what to do."""
        if self.any:
            return f"There is no model {shown(name)}: {_WHAT_ANY_IS}."
        others = "".join(f", {one!r}" for one in self.listed if one != self.told)
        return (
            f"There is no model {shown(name)}; this server has {self.told!r}{others}. STEPWEAVE_MODEL_NAMES sets the names that "
            "it answers to, * any."
        )


def names_of(settings: Settings, preset: Preset) -> ModelNames:
    """The names of the model that a server is to serve, with the `preset` that is in force."""
    return ModelNames(settings.model_names, preset.id or settings.model_name())


def told_name(settings: Settings) -> str:
    """The name that answers have, before anything is loaded; of a model made in code that is the directory's."""
    try:
        preset = read_preset(settings.model_directory())
    except LoadError:
        preset = Preset()
    return names_of(settings, preset if settings.preset is None else settings.preset.over(preset)).told


_WHAT_ANY_IS = f"STEPWEAVE_MODEL_NAMES has *, any name of 1 to {MAX_NAME} characters that has no colon"


def is_any_name(name: str) -> bool:
    """Whether `*` stands for such a name."""
    return 1 <= len(name) <= MAX_NAME and ":" not in name
