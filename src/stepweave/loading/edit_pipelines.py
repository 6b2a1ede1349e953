"""Makes diffusers' pipelines for edits from the modules of a text-to-image pipeline."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import diffusers
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils.import_utils import DummyObject

from stepweave.compat.async_scheduler import clone_scheduler

logger = logging.getLogger(__name__)

Edit = Literal["image_to_image", "inpaint"]

_SUFFIXES: dict[Edit, str] = {"image_to_image": "Img2ImgPipeline", "inpaint": "InpaintPipeline"}
_NEEDS: dict[Edit, set[str]] = {"image_to_image": {"image"}, "inpaint": {"image", "mask_image"}}


def edit_pipeline(pipeline: Any, edit: Edit) -> Any:
    """The pipeline for such edits with the modules of `pipeline`, which are neither cast nor moved.

    None if diffusers has no such class for the family, or the class needs other components. The
    scheduler is a copy, since pipelines write to its configuration. For a pipeline that is not
    diffusers', it is the attribute named after the edit.
    """
    if not isinstance(pipeline, DiffusionPipeline):
        return getattr(pipeline, edit, None)
    try:
        kind = edit_pipeline_class(type(pipeline).__name__, edit)
        if kind is None:
            return None
        made = pipeline if kind is type(pipeline) else made_of(pipeline, kind)
    except Exception as error:  # it cannot be imported, or refuses the components
        name = type(pipeline).__name__
        logger.warning("%s has no pipeline for edits (%s): %s", name, edit, error)
        return None
    if made is None or not _NEEDS[edit] <= inspect.signature(made.__call__).parameters.keys():
        return None
    return made


def edit_pipeline_class(name: str, edit: Edit) -> type[Any] | None:
    """The class of diffusers for edits in the family of a pipeline class; None if there is none, or
    if packages for it are missing."""
    kind = getattr(diffusers, name.removesuffix("Pipeline") + _SUFFIXES[edit], None)
    if kind is None:  # imports every family
        from diffusers.pipelines import auto_pipeline

        mapping = {
            "image_to_image": auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
            "inpaint": auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING,
        }[edit]
        kind = auto_pipeline._get_task_class(mapping, name, throw_error_if_not_exist=False)
    return None if kind is None or isinstance(kind, DummyObject) else kind


def made_of(
    pipeline: Any, kind: type[Any], others: Mapping[str, Any] = MappingProxyType({})
) -> Any:
    """A pipeline of a class with another's components and options, and with `others` by name, which
    have precedence; None if some are missing. The scheduler is a copy."""
    components, config, types = pipeline.components, pipeline.config, kind._get_signature_types()
    arguments = {}
    for name, parameter in list(inspect.signature(kind.__init__).parameters.items())[1:]:
        if name in others:
            arguments[name] = others[name]
        elif name in components:
            value = components[name]
            if isinstance(value, ModelMixin) and not isinstance(value, types[name]):
                return None
            arguments[name] = clone_scheduler(value) if isinstance(value, SchedulerMixin) else value
        elif name in config:
            arguments[name] = config[name]
        elif parameter.default is parameter.empty:
            return None
    made = kind(**arguments)
    made.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
    return made
