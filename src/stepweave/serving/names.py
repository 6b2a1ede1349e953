"""The names of the model that requests may use."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from stepweave.config import Settings
from stepweave.config.preset import Preset, read_preset
from stepweave.config.values import ANY, MAX_NAME
from stepweave.errors import LoadError, NotFoundError, did_you_mean, nearest, shown


class ModelNames:
    """The names of `STEPWEAVE_MODEL_NAMES`; if unset, the model's `own`.

    `listed` are the names but `*`, of which answers have the first (`told`); it is the model's own
    if `*` is first. With `*`, requests may use any name of at most `MAX_NAME` characters without a
    colon.
    """

    def __init__(self, names: Sequence[str], own: str) -> None:
        first = [own] if not names or names[0] == ANY else []
        self.listed = tuple(dict.fromkeys([*first, *(name for name in names if name != ANY)]))
        self.any = ANY in names
        self.told = self.listed[0]

    def take(self, name: str) -> bool:
        """Whether a request may use this name."""
        any_takes = self.any and 1 <= len(name) <= MAX_NAME and ":" not in name
        return any_takes or name in self.listed

    def check(self, name: str, param: str | None = None, loras: Collection[str] = ()) -> str | None:
        """The LoRA of `loras` that a request means by this name of a model, as `rings` or
        `shapes:rings`; None for the model itself. Raises NotFoundError about `param` unless a
        request may use it."""
        if name in self.listed:
            return None
        base, colon, lora = name.rpartition(":")
        if lora in loras and (not colon or self.take(base)):
            return lora
        if colon and loras and self.take(base):
            raise NotFoundError(
                f"{shown(base)} has no LoRA {shown(lora)}{did_you_mean(lora, loras)}; GET "
                "/v1/models lists them.",
                code="lora_not_found", param=param,
            )  # fmt: skip
        if not self.take(name):
            raise NotFoundError(self.refusal(name, loras), code="model_not_found", param=param)
        return None

    def doubts(self, name: str, loras: Collection[str]) -> list[str]:
        """A warning if a name that was never told is taken as the model, though one of `loras` is
        like it."""
        meant = nearest(name, loras)
        if meant is None or ":" in name or name in (*self.listed, *loras):
            return []
        return [f"model is {shown(name)}, taken as {self.told}; did you mean the LoRA {meant}?"]

    def lora(self, name: str, loras: Collection[str]) -> str | None:
        """The LoRA that a request names so, as `rings` or `shapes:rings`, whether it is one of
        `loras` or not; None if what comes before a colon is no name of the model."""
        base, colon, lora = name.rpartition(":")
        if not colon or base in self.listed or (lora in loras and self.take(base)):
            return lora
        return None

    def refusal(self, name: str, loras: Collection[str] = ()) -> str:
        """Why a request may not use this name, and what to do."""
        if ":" not in name and (hint := did_you_mean(name, loras)):
            return f"There is no model and no LoRA {shown(name)}{hint}."
        if self.any:
            return (
                f"There is no model {shown(name)}: STEPWEAVE_MODEL_NAMES has *, any name of 1 to "
                f"{MAX_NAME} characters that has no colon."
            )
        listed = ", ".join(map(repr, self.listed))
        return (
            f"There is no model {shown(name)}; this server has {listed}. STEPWEAVE_MODEL_NAMES "
            "sets the accepted names (* for any)."
        )


def names_of(settings: Settings, preset: Preset) -> ModelNames:
    """The model's names, with the `preset` in force."""
    return ModelNames(settings.model_names, preset.id or settings.model_name())


def told_name(settings: Settings) -> str:
    """The model's name in answers, before it is loaded; if made in code, the directory's name."""
    try:
        preset = read_preset(settings.model_directory())
    except LoadError:
        preset = Preset()
    return names_of(settings, settings.preset_over(preset)).told
