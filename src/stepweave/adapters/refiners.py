"""Refiners (Podell et al. 2023, arXiv:2307.01952, section 2.5): a second model that takes over the
last steps of Stable Diffusion XL, as diffusers' two calls do, in one call."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    SchedulerMixin,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import retrieve_timesteps

from stepweave.adapters.autoencoders import fit_in
from stepweave.config.components import VAE
from stepweave.errors import LoadError, shown
from stepweave.loading.beside import read_model
from stepweave.loading.components import (
    absent_components,
    components_of,
    pipeline_class,
    read_index,
)
from stepweave.loading.edit_pipelines import made_of
from stepweave.loading.files import check_vocabularies, files_of
from stepweave.loading.tokenizers import check_tokenizers
from stepweave.loading.variants import choose_variant
from stepweave.reasons import reason_of

START = 0.8  # the share of the steps after which a refiner takes over; the paper's
_OPTIONS = ("requires_aesthetics_score", "force_zeros_for_empty_prompt")
# what a schedule of noise consists of; the two models must have been trained with the same
_NOISE = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("prediction_type", "rescale_betas_zero_snr"),
)
_THE_MODELS = (VAE, "text_encoder_2", "tokenizer_2")  # if it has none
_OF_FILES = ("architectures", "dtype", "torch_dtype", "transformers_version")  # in configurations
_TOKENS = "token_embedding.weight"  # to which textual inversions add rows

# of the call of one model, and none of both: embeddings have other widths
_EMBEDDINGS = ("prompt_embeds", "pooled_prompt_embeds")
_DROPPED = {*_EMBEDDINGS, *(f"negative_{name}" for name in _EMBEDDINGS), "denoising_end", "kwargs"}
# of the first model alone: what its results begin with, and its adapters
_FIRST = {"latents", "ip_adapter_image", "ip_adapter_image_embeds", "cross_attention_kwargs"}
_SCORES = ("aesthetic_score", "negative_aesthetic_score")  # of the refiner alone
_BASE = inspect.signature(StableDiffusionXLPipeline.__call__).parameters
_SECOND = inspect.signature(StableDiffusionXLImg2ImgPipeline.__call__).parameters
_BOTH = (_BASE.keys() & _SECOND.keys()) - _DROPPED - _FIRST - {"self"}
_TIMES = ("num_inference_steps", "timesteps", "sigmas")
_KEYWORD = inspect.Parameter.KEYWORD_ONLY
_CALL = inspect.Signature(
    [
        *(parameter for name, parameter in _BASE.items() if name not in _DROPPED),
        inspect.Parameter("refiner_start", _KEYWORD, default=START, annotation=float),
        *(_SECOND[name].replace(kind=_KEYWORD) for name in _SCORES),
    ]
)


class SecondStage(StableDiffusionXLImg2ImgPipeline):  # type: ignore[misc]
    """The refiner in a `RefinedXLPipeline`, whose steps that one's progress includes."""

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        return super().progress_bar(iterable, None if total is None else 0)


class RefinedXLPipeline(StableDiffusionXLPipeline):  # type: ignore[misc]
    """Stable Diffusion XL whose last steps another model, `refiner`, takes over.

    Its call is that of the base model, without embeddings; `refiner_start` is the share of the
    steps after which the refiner takes over, between 0 and 1. Both go through one schedule, that of
    `scheduler`.
    """

    refiner: SecondStage
    _steps = 0  # of both

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = _CALL.bind(self, *args, **kwargs)
        bound.apply_defaults()
        asked = dict(bound.arguments)
        del asked["self"]
        start = asked.pop("refiner_start")
        scores = {name: asked.pop(name) for name in _SCORES}
        self.check_start(start, **{name: asked[name] for name in _TIMES})
        both = {name: asked[name] for name in _BOTH}
        first = {**asked, "output_type": "latent", "return_dict": True}
        latents = super().__call__(**first, denoising_end=start).images
        return self.refiner(image=latents, denoising_start=start, **both, **scores)

    def check_start(self, refiner_start: float, num_inference_steps: int, **times: Any) -> None:
        """Raise ValueError unless each of the two models has a step."""
        if not 0 < refiner_start < 1:
            raise ValueError(f"refiner_start is {refiner_start:g}; it must be between 0 and 1")
        found, steps = retrieve_timesteps(self.scheduler, num_inference_steps, **times)
        trained, order = self.scheduler.config.num_train_timesteps, self.scheduler.order
        left = int((found < round(trained - refiner_start * trained)).sum())  # as diffusers counts
        first = len(found) - left
        if not left or not first:
            whose = "the model" if left else "the refiner"
            raise ValueError(
                f"refiner_start is {refiner_start:g}, of {steps} steps: none is left for {whose}"
            )
        self._steps = _advances(first, len(found) - steps * order, order)
        left += order == 2 and left % 2 == 0  # it begins with a whole step
        self._steps += _advances(left, 0, order)

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        return super().progress_bar(iterable, None if total is None else self._steps)


def _advances(timesteps: int, before: int, order: int) -> int:
    """How often a loop over timesteps advances its progress: once for `order` of them, beginning
    after those that are `before` the first, and at its end."""
    last = timesteps - 1
    return sum(at == last or (at >= before and (at + 1) % order == 0) for at in range(timesteps))


# what requests may send is read from these
RefinedXLPipeline.__call__.__signature__ = _CALL  # type: ignore[attr-defined]
RefinedXLPipeline.__call__.__doc__ = f"""{inspect.getdoc(StableDiffusionXLPipeline.__call__)}

refiner_start (`float`, *optional*, defaults to {START}):
    The share of the steps after which the refiner takes over.
aesthetic_score (`float`, *optional*, defaults to 6.0):
    How pleasing the refiner makes the image.
negative_aesthetic_score (`float`, *optional*, defaults to 2.5):
    How pleasing an image is that the refiner avoids.
"""


def refined(pipeline: Any, refiner: Any, parts: Mapping[str, Any]) -> RefinedXLPipeline:
    """A pipeline of the modules of two, the second of which refines what the first makes. `parts`
    replace the refiner's by name.

    Raises LoadError for a pipeline that no refiner takes over from.
    """
    _check_base(pipeline)
    made = made_of(pipeline, RefinedXLPipeline)
    # one schedule: latents of another have other noise
    parts = {**parts, "scheduler": made.scheduler}
    made.refiner = made_of(refiner, SecondStage, parts)
    return made  # type: ignore[no-any-return]


def check_refiner(folder: Path) -> dict[str, Any]:
    """The index of the refiner in a directory; its weights are not read. Raises LoadError."""
    index = read_index(folder)
    kind = pipeline_class(index)
    if kind is not StableDiffusionXLImg2ImgPipeline:
        wanted = StableDiffusionXLImg2ImgPipeline.__name__
        raise LoadError(f"it is a {kind.__name__}; of pipelines, only a {wanted} is a component")
    files = files_of(folder)
    choose_variant(index, files, None)
    check_vocabularies(components_of(index), files)
    return index


def load_refiner(folder: Path, pipeline: Any, dtype: torch.dtype) -> Any:
    """The refiner in a directory, for the model `pipeline`, whose autoencoder, text encoders and
    tokenizers it shares if its own are the same. Raises LoadError."""
    _check_base(pipeline)
    index = check_refiner(folder)
    parts: dict[str, Any] = dict(absent_components(index))
    for component in components_of(index):
        name, place = component.name, folder / component.name
        if component.is_a(SchedulerMixin):
            _check_noise(component.kind.load_config(str(place)), pipeline.scheduler.config)
            parts[name] = pipeline.scheduler
        elif component.is_tokenizer:
            parts[name] = _tokenizer(component.kind, place)
        elif component.weights is not None:
            parts[name] = read_model(name, component.kind, place, dtype)
        else:
            parts[name] = None  # for images, which only the model is given
    for name in _THE_MODELS:
        if parts.get(name) is None:
            parts[name] = getattr(pipeline, name)
    _check_widths(parts, pipeline)
    check_tokenizers(parts)
    for name, part in parts.items():
        own = getattr(pipeline, name, None)
        if part is not own and type(part) is type(own) and _equal(part, own):
            parts[name] = own
    options = {name: index[name] for name in _OPTIONS if name in index}
    return StableDiffusionXLImg2ImgPipeline(**parts, **options)


def _check_base(pipeline: Any) -> None:
    if type(pipeline) is not StableDiffusionXLPipeline:
        raise LoadError(
            f"refiners take over from {StableDiffusionXLPipeline.__name__}, which "
            f"{type(pipeline).__name__} is not"
        )


def _tokenizer(kind: Any, folder: Path) -> Any:
    try:
        return kind.from_pretrained(str(folder))
    except Exception as error:
        raise LoadError(f"{folder.name}/ cannot be read: {reason_of(error, folder)}") from error


def _check_noise(config: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    for name in _NOISE:
        if config.get(name, own.get(name)) != own.get(name):
            raise LoadError(
                f"its scheduler's {name} is {shown(config[name])}; that of the model's is "
                f"{shown(own.get(name))}: it was trained with another noise"
            )


def _check_widths(parts: Mapping[str, Any], pipeline: Any) -> None:
    if parts["unet"] is None:
        raise LoadError("it has no unet")
    if parts[VAE] is not pipeline.vae:
        fit_in(pipeline, parts[VAE])
    for name in ("in_channels", "out_channels"):
        value, wanted = parts["unet"].config[name], pipeline.unet.config[name]
        if value != wanted:
            raise LoadError(f"its unet's {name} is {value}; that of the model's is {wanted}")


def _equal(part: Any, own: Any) -> bool:
    """Whether two parts of the same class give the same results. The model's may also have tokens
    of textual inversions."""
    if not isinstance(part, torch.nn.Module):
        words = own.get_vocab()
        known = ((word, number) for word, number in part.get_vocab().items())
        return part.model_max_length == own.model_max_length and all(
            words.get(word) == number for word, number in known
        )
    tensors, owns = part.state_dict(), own.state_dict()
    if tensors.keys() != owns.keys() or _settings(part) != _settings(own):
        return False
    return all(
        _same(tensor, owns[name][: len(tensor)] if name.endswith(_TOKENS) else owns[name])
        for name, tensor in tensors.items()
    )


def _same(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    alike = tensor.shape == other.shape and tensor.dtype == other.dtype
    return alike and torch.equal(tensor.to(other.device), other)


def _settings(model: Any) -> str:
    """A model's configuration, without what only says where it is from, and how many tokens it
    knows."""
    config = model.config
    found = dict(config.to_dict() if hasattr(config, "to_dict") else config)
    kept = {
        name: value
        for name, value in found.items()
        if not name.startswith("_") and name not in (*_OF_FILES, "vocab_size")
    }
    return json.dumps(kept, sort_keys=True, default=str)  # where tuples are lists
