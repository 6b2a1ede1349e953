"""Makes diffusers' pipelines that ControlNets or T2I-Adapters guide, of the modules of another."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import diffusers
from diffusers import DiffusionPipeline, ModelMixin, SD3ControlNetModel
from diffusers.utils.import_utils import DummyObject

from stepweave.compat.turn_taking import modules_in
from stepweave.errors import LoadError
from stepweave.loading.edit_pipelines import made_of

_NAME = re.compile(r"(?P<family>.+?)(?P<pag>PAG)?(?P<task>Img2Img|Inpaint)?Pipeline")
# the part of a pipeline's name, by the class of what guides it; ControlNets otherwise
_WORDS = {"ControlNetUnionModel": "ControlNetUnion", "T2IAdapter": "Adapter"}
# by the part of the name: the argument of the pipeline's constructor
_ARGUMENTS = {"Adapter": "adapter"}


def control_pipeline(pipeline: Any, models: Sequence[Any]) -> Any:
    """The pipeline for the same task with the modules of `pipeline`, guided by `models`, which are
    all ControlNets or all T2I-Adapters. Its scheduler is a copy.

    Raises LoadError if diffusers has no such pipeline for the family, or for these models.
    """
    word = _WORDS.get(type(models[0]).__name__, "ControlNet")
    name = type(pipeline).__name__
    classes = (getattr(diffusers, known, None) for known in _names(name, word))
    kind: Any = next((one for one in classes if _is_pipeline(one)), None)
    if kind is None:
        what = type(models[0]).__name__
        raise LoadError(f"diffusers has no pipeline like {name} that is guided by {what}")
    argument = _ARGUMENTS.get(word, "controlnet")
    allowed = [one for one in kind._get_signature_types()[argument] if issubclass(one, ModelMixin)]
    single = tuple(one for one in allowed if "Multi" not in one.__name__)
    for model in models:
        if not isinstance(model, single):
            names = " or ".join(one.__name__ for one in single)
            raise LoadError(f"it is a {type(model).__name__}; {kind.__name__} is guided by {names}")
        _check_channels(kind, model)
    if len(models) > 1 and len(single) == len(allowed):
        raise LoadError(f"{kind.__name__} is guided by one {single[0].__name__} at a time")
    guided = made_of(pipeline, kind, {argument: models[0] if len(models) == 1 else list(models)})
    if guided is None:
        raise LoadError(f"{kind.__name__} needs components that {name} does not have")
    return guided


def _check_channels(kind: Any, model: Any) -> None:
    """Raise LoadError for a ControlNet of Stable Diffusion 3 whose input is that of the other task:
    for inpainting it has a channel for the mask."""
    channels = getattr(model, "config", {}).get("extra_conditioning_channels")
    if isinstance(model, SD3ControlNetModel) and channels != int("Inpaint" in kind.__name__):
        raise LoadError(
            f"its input has {channels} channels for masks, and {kind.__name__} makes another one"
        )


def guides_of(pipeline: Any) -> list[Any]:
    """The ControlNets or T2I-Adapters of a pipeline, of which each takes an image of its own."""
    names = ("controlnet", "adapter")
    return [module for name, module in modules_in(pipeline) if name.partition(".")[0] in names]


def modes_of(models: Iterable[Any]) -> int | None:
    """How many kinds of images each of these ControlNets tells apart by the argument
    `control_mode`; None if none of them does."""
    found = []
    for model in models:
        config = getattr(model, "config", {})
        number = config.get("num_mode") or config.get("num_control_type")
        if isinstance(number, int):
            found.append(number)
    return min(found, default=None)


def _is_pipeline(kind: Any) -> bool:
    dummy = isinstance(kind, DummyObject)  # packages for it are missing
    return isinstance(kind, type) and not dummy and issubclass(kind, DiffusionPipeline)


def _names(name: str, word: str) -> Iterator[str]:
    """Names that the class may have."""
    found = _NAME.fullmatch(name)
    if found is None:
        return
    family, task = found["family"], found["task"] or ""
    for suffix in (task, "Inpainting") if task == "Inpaint" else (task,):
        yield f"{family}{word}{found['pag'] or ''}{suffix}Pipeline"
