"""Modular pipelines of diffusers: what their blocks declare, as the call of a class.

A usual pipeline's call has its arguments in its signature. That of a modular pipeline takes any
(`__call__(state, output, **kwargs)`); its blocks declare them, so they belong to one object.
`call_class` makes a class of them whose call has that signature and returns images as usual
pipelines do. Where a component guides, it also takes that guider's scale. All that reads
signatures, results or code reads those of this class.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import re
import sys
import types
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stepweave.compat.subclasses import like

GUIDER, GUIDANCE = "guider", "guidance_scale"  # a component of many, and its attribute
UNPACK = "_unpack_latents"
_BASE = "diffusers.modular_pipelines.modular_pipeline"  # not imported here: that takes seconds
# types of inputs whose blocks declare none, as the usual pipelines of the families have them
_TYPES: dict[str, Any] = {
    "width": int,
    "height": int,
    "clip_skip": int,
    "sigmas": list[float],
}
_TEXT = re.compile(r"^(?:negative_)?prompt(?:_\d+)?$")
_PAIR = re.compile(r"_size$|^(?:negative_)?crops_coords")

# classes by blocks, and by the components that there are and the guider's scale
_Key = tuple[frozenset[str], float | None]
_classes: weakref.WeakKeyDictionary[Any, dict[_Key, type[Any]]] = weakref.WeakKeyDictionary()


@dataclass
class ModularOutput:
    """What the call of such a class returns."""

    images: Any


def is_modular(pipeline: Any) -> bool:
    """Whether it is a modular pipeline of diffusers, or a class of them."""
    return _is_modular(pipeline if isinstance(pipeline, type) else type(pipeline))


@functools.lru_cache(1024)
def _is_modular(kind: Any) -> bool:
    return any(
        base.__name__ == "ModularPipeline" and base.__module__ == _BASE for base in kind.__mro__
    )


def call_class(pipeline: Any) -> Any:
    """The class that describes the call of a pipeline, or of a class: itself, unless it is modular.
    Of a class, the one of its default blocks with all their components."""
    kind = pipeline if isinstance(pipeline, type) else type(pipeline)
    if not is_modular(kind) or hasattr(kind, "declared_blocks"):
        return kind
    if isinstance(pipeline, type):
        return _of_class(kind)
    present = [name for name, part in pipeline.components.items() if part is not None]
    guider = getattr(pipeline, GUIDER, None)
    return class_of_blocks(kind, pipeline._blocks, present, getattr(guider, GUIDANCE, None))


def with_declared_call(pipeline: Any) -> Any:
    """The modular pipeline, whose class becomes its `call_class`."""
    pipeline.__class__ = call_class(pipeline)
    return pipeline


@functools.cache
def _of_class(kind: Any) -> Any:
    blocks = getattr(sys.modules["diffusers"], kind.default_blocks_name or "", None)
    if blocks is None:
        return kind
    made = blocks()
    return class_of_blocks(kind, made, [part.name for part in made.expected_components])


def class_of_blocks(
    kind: type[Any], blocks: Any, present: Collection[str], guidance: float | None = None
) -> type[Any]:
    """The class for pipelines of the class `kind` with such blocks, of whose components those that
    are loaded from files are `present`; `guidance` is their guider's scale, by default that of the
    blocks' own guider."""
    if guidance is None:
        guidance = _declared_guidance(blocks)
    known = _classes.setdefault(blocks, {})
    key = frozenset(present), guidance
    if key not in known:
        known[key] = _made(kind, blocks, *key)
    return known[key]


def _declared_guidance(blocks: Any) -> float | None:
    for part in blocks.expected_components:
        if part.name == GUIDER and part.type_hint is not None:
            made = part.create() if part.default_creation_method == "from_config" else None
            return getattr(made, GUIDANCE, None)
    return None


def lacking(blocks: Any, present: Collection[str]) -> list[str]:
    """The components from files that are missing for the least of the blocks' workflows; none if
    one of these can run."""
    return min((sorted(_absent(flow, present)) for flow in _workflows(blocks)), key=len)


def _made(
    kind: type[Any], blocks: Any, present: frozenset[str], guidance: float | None
) -> type[Any]:
    flows = _workflows(blocks)
    runnable = [flow for flow in flows if not _absent(flow, present)] or flows
    parameters = {parameter.name: parameter for parameter in _parameters(runnable)}
    guides = guidance is not None and GUIDANCE not in parameters
    if guides:
        parameters[GUIDANCE] = inspect.Parameter(
            GUIDANCE, inspect.Parameter.KEYWORD_ONLY, default=guidance, annotation=float
        )
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = inspect.Signature([itself, *parameters.values()])

    def __call__(self: Any, *args: Any, **kwargs: Any) -> ModularOutput:
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        del given["self"]
        scale = given.pop(GUIDANCE, None) if guides else None
        with contextlib.nullcontext() if scale is None else _guided(self, scale):
            return ModularOutput(kind.__call__(self, output="images", **given))

    __call__.__signature__ = signature  # type: ignore[attr-defined]
    __call__.__doc__ = _documented(runnable)
    return like(
        kind,
        __call__=__call__,
        declared_blocks=tuple(type(block) for block in _all_blocks(blocks)),
        declared_outputs=tuple(output.name for output in blocks.outputs),
        begins_with_image=any(_begins_with_image(flow) for flow in runnable),
    )


@contextlib.contextmanager
def _guided(pipeline: Any, scale: float) -> Iterator[None]:
    """Within the block, the pipeline has a guider of its own with this scale."""
    before = getattr(pipeline, GUIDER)
    own = copy.copy(before)
    setattr(own, GUIDANCE, scale)
    pipeline.__dict__[GUIDER] = own
    try:
        yield
    finally:
        pipeline.__dict__[GUIDER] = before


def _workflows(blocks: Any) -> list[Any]:
    """The blocks of each workflow that they declare; if they declare none, all of them."""
    if not getattr(blocks, "_workflow_map", None):
        return [blocks]
    return [blocks.get_workflow(name) for name in blocks.available_workflows]


def _begins_with_image(flow: Any) -> bool:
    """Whether a workflow begins with an image, and repaints all of it."""
    names = {item.name for item in flow.inputs}
    return {"image", "strength"} <= names and "mask_image" not in names


def _absent(blocks: Any, present: Collection[str]) -> set[str]:
    return {
        part.name
        for part in blocks.expected_components
        if part.default_creation_method == "from_pretrained" and part.name not in present
    }


def _parameters(flows: list[Any]) -> Iterator[inspect.Parameter]:
    """The inputs of all workflows. One is required if all of them require it, and has a default if
    they agree."""
    declared: dict[str, list[Any]] = {}
    for flow in flows:
        for item in flow.inputs:
            if item.name is not None and item.name.isidentifier():  # else a group of tensors
                declared.setdefault(item.name, []).append(item)
    required = set.intersection(*(set(_required(flow)) for flow in flows))
    for name, items in declared.items():
        default = items[0].default if all(i.default == items[0].default for i in items) else None
        yield inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if name in required else default,
            annotation=_type(name, items[0].type_hint),
        )


def _required(flow: Any) -> Iterator[str]:
    """Inputs that a call must have: blocks also name what blocks before them make as required."""
    made = {output.name for block in _all_blocks(flow) for output in block.intermediate_outputs}
    for item in flow.inputs:
        if item.required and item.default is None and item.name not in made:
            yield item.name


def _type(name: str, declared: Any) -> Any:
    if declared is not None:
        return declared
    if _TEXT.search(name):
        return str
    return tuple[int, int] if _PAIR.search(name) else _TYPES.get(name, inspect.Parameter.empty)


def _documented(flows: list[Any]) -> str:
    """A docstring in the style of diffusers' calls."""
    texts: dict[str, str] = {}
    for flow in flows:
        for item in flow.inputs:
            if item.name is not None and item.description:
                texts.setdefault(item.name, " ".join(item.description.split()))
    return "\n".join(f"{name} (`input`):\n    {text}" for name, text in texts.items())


def _all_blocks(blocks: Any) -> Iterator[Any]:
    yield blocks
    for block in blocks.sub_blocks.values():
        yield from _all_blocks(block)


def loops_of(pipeline: Any) -> Iterator[Any]:
    """The blocks of a modular pipeline that show their progress on a bar; none of a usual one."""
    if is_modular(pipeline):
        for block in _all_blocks(pipeline._blocks):
            if callable(getattr(block, "progress_bar", None)):
                yield block


def unpacker_of(pipeline: Any) -> Callable[..., Any] | None:
    """The function with which a pipeline, or the blocks of a modular one, unpack latents; None if
    there is none."""
    function = getattr(pipeline, UNPACK, None)
    if function is None and is_modular(pipeline):
        function = getattr(getattr(pipeline, "pachifier", None), "unpack_latents", None)
        named = (one for one in functions_of(call_class(pipeline)) if one.__name__ == UNPACK)
        function = function or next(named, None)
    return function


def functions_of(kind: type[Any]) -> Iterator[types.FunctionType]:
    """diffusers' own functions that a call of a pipeline's class may run, without base classes that
    all pipelines have; of a modular one, those of its blocks and of their modules."""
    places: dict[Any, Mapping[str, Any]] = {}
    for block in getattr(kind, "declared_blocks", ()):
        for cls in block.__mro__:
            if cls.__module__ not in (_BASE, "builtins"):
                places[cls] = vars(cls)
                places[cls.__module__] = _own_functions(cls.__module__)
    if not places:
        bases = [cls for cls in kind.__mro__ if _is_pipeline(cls)]
        places = {cls: vars(cls) for cls in bases}
    for members in places.values():
        for member in list(members.values()):  # other threads may add some
            function = member.__func__ if isinstance(member, staticmethod) else member
            if inspect.isfunction(function):
                yield function


def _own_functions(module: str) -> Mapping[str, Any]:
    members = vars(sys.modules[module]) if module.startswith("diffusers.") else {}
    return {
        name: value
        for name, value in list(members.items())
        if inspect.isfunction(value) and inspect.unwrap(value).__module__ == module
    }


def _is_pipeline(cls: type) -> bool:
    """Whether a class is a kind of DiffusionPipeline, and not that itself."""
    names = [base.__name__ for base in cls.__mro__ if base.__module__.startswith("diffusers.")]
    return "DiffusionPipeline" in names and cls.__name__ != "DiffusionPipeline"
