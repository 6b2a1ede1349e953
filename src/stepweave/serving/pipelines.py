"""The pipelines of a model, all of the same modules, by the kind of request that they serve."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from stepweave.adapters.beside import Added, by_field
from stepweave.adapters.control_pipelines import control_pipeline
from stepweave.adapters.refiners import refined
from stepweave.calls import CONTROL_IMAGE, described
from stepweave.compat.turn_taking import modules_in
from stepweave.config.components import GUIDES, REFINER, VAE
from stepweave.errors import InvalidRequestError, LoadError
from stepweave.loading.edit_pipelines import edit_pipeline, made_of
from stepweave.serving.kinds import IMAGE_TO_IMAGE, INPAINTING, MOST_TOGETHER, TEXT_TO_IMAGE, Kind

logger = logging.getLogger(__name__)

REMEMBERED = 64  # pipelines of several components


class Pipelines:
    """Finds the pipeline of each kind of request: the model's own if it serves it, else another of
    its family.

    Those of the tasks, and those of each single component beside the model, are made at once.
    Raises LoadError, naming it, for a component with which the model has no pipeline.
    """

    def __init__(self, pipeline: Any, added: Mapping[str, Added]) -> None:
        self.main = pipeline
        call = described(pipeline)
        own_images = call.image in ("image", "images") or call.image in call.needs
        takes_masks = call.mask is not None
        edits = own_images and call.mask not in call.needs
        self._tasks: dict[str, Any] = {
            TEXT_TO_IMAGE: None if call.needs_images else pipeline,
            IMAGE_TO_IMAGE: pipeline if edits else edit_pipeline(pipeline, "image_to_image"),
            INPAINTING: pipeline if takes_masks else edit_pipeline(pipeline, "inpaint"),
        }
        self._added = by_field(added)
        self._guided: dict[Kind, Any] = {}
        for field, components in self._added.items():
            for name in components:
                self._add(field, name)
        self._several: OrderedDict[Kind, Any] = OrderedDict()

    def _add(self, field: str, name: str) -> None:
        """Add the pipelines of a component, for the tasks for which diffusers has one."""
        problems = []
        for task in self.tasks():
            kind = Kind(task, ((field, (name,)),))
            try:
                self._guided[kind] = self._made(kind)
            except LoadError as error:
                problems.append(error.message)
        if len(problems) == len(self.tasks()):
            what = f"the component {name!r} cannot be used with this model"
            raise LoadError(f"{what}: {problems[0]}")
        for problem in problems:
            logger.info("component %s: %s", name, problem)

    def tasks(self) -> dict[str, Any]:
        """By task, without components; the model's own pipeline first."""
        found = {task: one for task, one in self._tasks.items() if one is not None}
        return dict(sorted(found.items(), key=lambda item: item[1] is not self.main))

    def by_kind(self) -> dict[Kind, Any]:
        """Those of the tasks, then those of single components."""
        return {**{Kind(task): one for task, one in self.tasks().items()}, **self._guided}

    def components(self) -> dict[str, dict[str, Added]]:
        """What requests may name, by field."""
        return self._added

    def tasks_of(self, field: str, name: str) -> list[str]:
        """The tasks for which a component can be used."""
        return [kind.task for kind in self._guided if kind.components == ((field, (name,)),)]

    @property
    def most_together(self) -> int:
        """The most components of one request."""
        guides = [len(known) for field, known in self._added.items() if field in GUIDES]
        most = max(guides, default=1)
        return min(most, MOST_TOGETHER)

    def modules(self) -> dict[str, nn.Module]:
        """The modules that only pipelines with components have, by name."""
        known = {id(module) for _, module in modules_in(self.main)}
        found: dict[str, nn.Module] = {}
        for components in self._added.values():
            for one in components.values():
                for name, module in one.modules().items():
                    if id(module) not in known:
                        known.add(id(module))
                        found[name] = module
        return found

    def of(self, kind: Kind) -> Any:
        """The pipeline of a kind of request; None if there is none for its task. Raises
        InvalidRequestError for components that cannot be used together, or for the task."""
        if not kind.components:
            return self._tasks.get(kind.task)
        found = self._guided.get(kind) or self._several.get(kind)
        if found is None and self._tasks.get(kind.task) is not None:
            found = self._combined(kind)
        return found

    def single(self, kind: Kind) -> Kind:
        """The kind with the first of its components alone, whose limits it has."""
        if kind in self._guided or not kind.components:
            return kind
        (field, names), *_ = kind.components
        return Kind(kind.task, ((field, names[:1]),))

    def drop(self, kind: Kind) -> None:
        """Stop serving a kind of request, and all with its task if it has no components."""
        if kind.components:
            self._guided.pop(kind, None)
            return
        self._tasks[kind.task] = None
        for other in [other for other in self._guided if other.task == kind.task]:
            del self._guided[other]

    def _combined(self, kind: Kind) -> Any:
        guides = [field for field, _ in kind.components if field in GUIDES]
        if len(guides) > 1:
            raise InvalidRequestError(
                f"{' and '.join(guides)} are both set; set one of them.", param=guides[0]
            )
        if guides and REFINER in dict(kind.components):
            raise InvalidRequestError(
                f"{REFINER} and {guides[0]} are both set; a refiner is used without it.",
                param=REFINER,
                code="unsupported",
            )
        for field, names in kind.components:
            most = MOST_TOGETHER if field in GUIDES else 1
            if len(names) > most:
                raise InvalidRequestError(
                    f"{field} has {len(names)} names; the limit is {most}.", param=field
                )
            for name in names:
                if Kind(kind.task, ((field, (name,)),)) not in self._guided:
                    alone = Kind(TEXT_TO_IMAGE, ((field, (name,)),)) in self._guided
                    hint = "; for an image from text, send the image that guides it as "
                    raise InvalidRequestError(
                        f"{field} is {name}, which this model does not use for "
                        f"{kind.task.replace('_', ' ')}"
                        f"{f'{hint}{CONTROL_IMAGE} alone' if alone and field in GUIDES else ''}.",
                        param=field,
                        code="unsupported",
                    )
        try:
            made = self._made(kind)
        except LoadError as error:
            field, names = kind.components[0]
            raise InvalidRequestError(
                f"{field} is {', '.join(names)}: {error.message}.", param=field, code="unsupported"
            ) from None
        self._several[kind] = made
        while len(self._several) > REMEMBERED:
            self._several.popitem(last=False)
        return made

    def _made(self, kind: Kind) -> Any:
        pipeline = self._tasks[kind.task]
        guides: list[Any] = []
        parts: dict[str, Any] = {}
        refiner: Any = None
        for field, names in kind.components:
            components = [self._added[field][name] for name in names]
            if field in GUIDES:
                guides = [one.model for one in components]
            elif field == REFINER:
                refiner = components[0].model
            elif field == VAE:
                parts[VAE] = components[0].model
            else:
                parts |= components[0].parts
        if parts:
            pipeline = _with_parts(pipeline, parts)
        if guides:
            return control_pipeline(pipeline, guides)
        if refiner is None:
            return pipeline
        return refined(pipeline, refiner, {VAE: parts[VAE]} if VAE in parts else {})


def _with_parts(pipeline: Any, parts: Mapping[str, Any]) -> Any:
    """A pipeline like another, with other parts by name. Raises LoadError if it is of no class of
    diffusers."""
    if not isinstance(pipeline, DiffusionPipeline):
        raise LoadError(
            f"{type(pipeline).__name__} is made by other means; an autoencoder can be its default "
            "(`default`), but not be named by requests"
        )
    return made_of(pipeline, type(pipeline), parts)
