"""The pipeline being served: what it accepts, its defaults, and how it is called."""

from __future__ import annotations

import inspect
import logging
import secrets
import time
from typing import Any

import torch

from stepweave.config import Settings
from stepweave.engine import StepEngine
from stepweave.errors import InvalidRequest, LoadError, shown
from stepweave.generation import MAX_SEED, Parameters, Sources
from stepweave.loading.preset import Preset

logger = logging.getLogger(__name__)

DRAWN_SEED_BITS = 32  # of a seed the server draws, easy to copy

WARM_UP_STEPS = 2
PROFILE_SECONDS = 10.0  # after which no more is run for the cost model's sake alone: it goes on to learn from requests


class ServedModel:
    """One text-to-image pipeline with its preset.

    Raises LoadError if the pipeline cannot serve text to image or the preset names arguments that its call lacks.
    """

    def __init__(self, pipeline: Any, preset: Preset, settings: Settings) -> None:
        self.pipeline = pipeline
        self.settings = settings
        self.arguments = inspect.signature(pipeline.__call__).parameters
        self.call_arguments = preset.call
        directory = settings.model_directory()
        self.id = preset.id or (directory.resolve().name if directory else settings.model)
        for name in ("prompt", "num_inference_steps", "generator", *preset.call):
            if name not in self.arguments:
                raise LoadError(f"{self.pipeline_class} takes no argument {name!r}")
        self.schedulers: dict[str, Any] = {}
        self.edits: tuple[str, ...] = ()
        self.guidance_range = (0.0, 100.0)
        self.multiple = _size_multiple(pipeline)
        width, height = _native_size(pipeline)
        self.width, self.height = preset.width or width, preset.height or height
        self.max_side = _max_side(pipeline)
        self.default_steps = preset.num_inference_steps or self._default("num_inference_steps") or 50
        guidance = preset.guidance_scale if preset.guidance_scale is not None else self._default("guidance_scale")
        self.default_guidance: float | None = guidance if "guidance_scale" in self.arguments else None
        for setting, limit, default in (
            ("MAX_STEPS", settings.max_steps, self.default_steps),
            ("MAX_PIXELS", settings.max_pixels, self.width * self.height),
        ):
            if default > limit:
                raise LoadError(f"STEPWEAVE_{setting}={limit} is less than the model's own default, {default}")

    @property
    def pipeline_class(self) -> str:
        return type(self.pipeline).__name__

    def _default(self, name: str) -> Any:
        default = self.arguments[name].default if name in self.arguments else None
        return None if default is inspect.Parameter.empty else default

    def resolve(
        self,
        *,
        prompt: str,
        negative_prompt: str | None = None,
        size: str | None = None,
        n: int = 1,
        seed: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        reproducible: bool = False,
        scheduler: str | None = None,
        strength: float | None = None,
        sources: Sources | None = None,
    ) -> Parameters:
        """Fill in the defaults and hold every value against the limits. Raises InvalidRequest naming value and limit."""
        limits = self.settings
        for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            if text is not None and len(text) > limits.max_prompt_characters:
                raise InvalidRequest(
                    f"{name} has {len(text)} characters; the limit is {limits.max_prompt_characters}.", param=name
                )
            if text is not None and "\0" in text:
                raise InvalidRequest(f"{name} is {shown(text)}; it must not hold the character NUL.", param=name)
        if not prompt.strip():
            raise InvalidRequest(f"prompt is empty: {shown(prompt)}. Say what the picture should show.", param="prompt")
        most = limits.max_images if "num_images_per_prompt" in self.arguments else 1
        if n > most:
            raise InvalidRequest(f"n is {n}; the limit is {most}.", param="n")
        if seed is not None and seed + n - 1 > MAX_SEED:
            raise InvalidRequest(f"seed is {seed} and n is {n}; the limit of seed + n - 1 is {MAX_SEED}.", param="seed")
        width, height = self._resolve_size(size)
        steps = self.default_steps if num_inference_steps is None else num_inference_steps
        if steps > limits.max_steps:
            raise InvalidRequest(
                f"num_inference_steps is {steps}; the limit is {limits.max_steps}.", param="num_inference_steps"
            )
        for name, value in (("negative_prompt", negative_prompt), ("guidance_scale", guidance_scale)):
            if value is not None and name not in self.arguments:
                raise InvalidRequest(f"{name} is {shown(value)}, but {self.pipeline_class} has no {name}.", param=name)
        return Parameters(
            prompt=prompt,
            negative_prompt=negative_prompt,
            width=width,
            height=height,
            n=n,
            seed=secrets.randbits(DRAWN_SEED_BITS) if seed is None else seed,
            num_inference_steps=steps,
            guidance_scale=self.default_guidance if guidance_scale is None else guidance_scale,
            reproducible=reproducible,
        )

    def _resolve_size(self, size: str | None) -> tuple[int, int]:
        if size is None or size == "auto":
            return self.width, self.height
        width, height = (int(side) for side in size.split("x"))
        if width % self.multiple or height % self.multiple or not width or not height:
            raise InvalidRequest(
                f"size is {shown(size)}; both sides must be positive multiples of {self.multiple}.", param="size"
            )
        if self.max_side is not None and max(width, height) > self.max_side:
            raise InvalidRequest(f"size is {shown(size)}; the model's limit is {self.max_side} a side.", param="size")
        if width * height > self.settings.max_pixels:
            raise InvalidRequest(
                f"size is {shown(size)}, {width * height} pixels; the limit is {self.settings.max_pixels}.",
                param="size",
            )
        return width, height

    def warm_up(self, engine: StepEngine) -> None:
        """Run short jobs of the native size, and of half its sides: one alone, then as many as fill the largest shared step, then
        growing numbers for the cost model.

        So the first requests do not pay for first calls, what the engine may merge is certified, and what steps cost is known
        before they come. The jobs differ in prompt, seed, steps and guidance, as requests do.
        """
        most = 1 if engine.mode in ("off", "threads") else max(2, -(-self.settings.max_rows // 2))
        native, half = (self.width, self.height), self._half_size()
        for count in (1, most):
            self._run_together(engine, native, count)
        began = time.monotonic()
        counts = [2**i for i in range(most.bit_length())]
        rounds = [(native, count) for count in counts] + [(half, count) for count in counts[:3] if half]
        for size, count in rounds:
            if size is None or time.monotonic() - began > PROFILE_SECONDS:
                continue
            try:
                self._run_together(engine, size, count)
            except Exception as error:
                if size == native:
                    raise
                logger.info("pictures of %dx%d fail (%s); what they cost is not known", *size, type(error).__name__)

    def _run_together(self, engine: StepEngine, size: tuple[int, int], count: int) -> None:
        jobs = [engine.submit(**self.call(self._warm_up_parameters(i, *size))) for i in range(count)]
        for job in jobs:
            job.result()

    def _half_size(self) -> tuple[int, int] | None:
        width, height = (side // 2 // self.multiple * self.multiple for side in (self.width, self.height))
        return (width, height) if width and height else None

    def _warm_up_parameters(self, index: int, width: int, height: int) -> Parameters:
        guidance = self.default_guidance
        if guidance is not None and index % 4 == 3:
            guidance = guidance * 1.5
        prompt = f"{index}, to warm up"  # differs in its first token: encoders cut long prompts
        return Parameters(prompt, None, width, height, 1, index, WARM_UP_STEPS + index % 3, guidance)

    def call(self, parameters: Parameters) -> dict[str, Any]:
        """The keyword arguments of the pipeline's own call, which returns n RGB pictures of height x width."""
        # on the CPU whatever the device: a seed then gives the same noise everywhere
        generators = [torch.Generator("cpu").manual_seed(parameters.seed + i) for i in range(parameters.n)]
        optional = {
            "negative_prompt": parameters.negative_prompt,
            "width": parameters.width,
            "height": parameters.height,
            "guidance_scale": parameters.guidance_scale,
            "num_images_per_prompt": parameters.n,
        }
        return {
            **self.call_arguments,
            "prompt": parameters.prompt,
            "num_inference_steps": parameters.num_inference_steps,
            "generator": generators,
            "output_type": "pil",
            **{name: value for name, value in optional.items() if value is not None and name in self.arguments},
        }


def _denoiser_config(pipeline: Any) -> Any:
    denoiser = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)
    return getattr(denoiser, "config", None)


def _vae_scale(pipeline: Any) -> int:
    """Pixels to a latent pixel, along one axis."""
    return int(getattr(pipeline, "vae_scale_factor", 8))


def _patch_size(pipeline: Any) -> int:
    """Latent pixels to a token of the denoiser, along one axis; the largest where the axes differ."""
    patch = getattr(_denoiser_config(pipeline), "patch_size", None) or 1
    return int(max(patch) if isinstance(patch, (list, tuple)) else patch)


def _size_multiple(pipeline: Any) -> int:
    """What both sides must be a multiple of: the VAE's scale times the denoiser's patch (packed latents included)."""
    patch = _patch_size(pipeline)
    if patch == 1 and hasattr(pipeline, "_pack_latents"):
        patch = 2
    return _vae_scale(pipeline) * patch


def _max_side(pipeline: Any) -> int | None:
    """The longest side in pixels that the denoiser's table of positions covers, None where there is no such table."""
    positions = getattr(_denoiser_config(pipeline), "pos_embed_max_size", None)
    return positions * _patch_size(pipeline) * _vae_scale(pipeline) if isinstance(positions, int) else None


def _native_size(pipeline: Any) -> tuple[int, int]:
    """Width and height in pixels that the pipeline makes when asked for none."""
    side = getattr(pipeline, "default_sample_size", None) or getattr(_denoiser_config(pipeline), "sample_size", None)
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    scale = _vae_scale(pipeline)
    return int(width or 64) * scale, int(height or 64) * scale
