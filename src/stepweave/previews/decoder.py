"""Previews of unfinished images: a small map from latents to pixels, fitted to the served
autoencoder.

In most autoencoders, colours depend nearly linearly on latents, so previews need no decoder and no
extra denoising step. The map is linear in the latents around a pixel and in random features of
them; it is solved for, not trained. It is applied to the clean latents that the model predicts at a
step (`Latents.clean`).
"""

from __future__ import annotations

import copy
import inspect
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.hooks import ModelHook, remove_hook_from_module
from PIL import Image
from torch import nn
from torch.nn import functional

from stepweave.compat.modular import unpacker_of

if TYPE_CHECKING:
    from stepweave.previews.latents import Latents

logger = logging.getLogger(__name__)

LONGEST = 512  # pixels of a preview's longer side
DETAIL = 4  # most pixels per side that one latent becomes
REACH = 3  # latents per side that a pixel depends on; odd
FEATURES = 256  # random features of the latents
SYNTHETIC_IMAGES = 32  # for the fit; a quarter of them tests it
LATENT_SIDE = 8  # latents per side of a synthetic image
TOGETHER = 8  # synthetic images in a forward
PROOF = 0.5  # share of the variance of test pixels that the map must explain
RIDGE = 3e-2  # regularisation, as a share of the mean square of a feature
LAST = 0.75  # share of the steps before the last preview


def preview_steps(total: int, count: int) -> list[int]:
    """The steps, of `total`, after which to show `count` previews: evenly spread, and before the
    last step, so fewer if there are few steps.

    >>> preview_steps(20, 3), preview_steps(3, 3), preview_steps(30, 1)
    ([5, 10, 15], [1, 2], [22])
    """
    count = min(count, total - 1)
    if count < 1:
        return []
    last = max(count, min(total - 1, int(LAST * total)))
    return [max(1, round(last * i / count)) for i in range(1, count + 1)]


@dataclass(frozen=True)
class Previewer:
    """Makes previews, on any thread. Create it with `fit`."""

    map: PixelMap
    unpack: Callable[[torch.Tensor, int, int], torch.Tensor] | None
    explained: float  # share of the variance of test pixels

    @classmethod
    def fit(cls, pipeline: Any) -> Previewer | None:
        """Fit a previewer to a pipeline's loaded `vae`, by a few forwards of it on small images. If
        no such map works, log that and return None. Call it before an engine has the pipeline.
        """
        began = time.monotonic()
        try:
            with torch.no_grad():
                # CPU offload moves the autoencoder there
                device = getattr(pipeline, "_execution_device", None)
                factor = getattr(pipeline, "vae_scale_factor", 8)
                fitted, explained = _fit(pipeline.vae, factor, device)
        except Exception as error:
            kind, reason = type(error).__name__, str(error).partition("\n")[0]
            logger.warning("previews are disabled: %s (%s)", kind, reason)
            return None
        finally:
            for hook in getattr(pipeline, "_all_hooks", ()):
                hook.offload()  # CPU offload has moved the autoencoder to the GPU
        share, least = 100 * explained, 100 * PROOF
        if not explained >= PROOF:
            logger.warning(
                "previews are disabled: they explain %.0f %% of the variance of pixels, "
                "less than %.0f %%", share, least,
            )  # fmt: skip
            return None
        seconds = time.monotonic() - began
        logger.info("previews explain %.0f %% of pixels, fitted in %.1f s", share, seconds)
        return cls(fitted, _unpacker(pipeline), explained)

    def image(self, latents: Latents, width: int, height: int, row: int = 0) -> Image.Image:
        """The preview of one row, in the image's size (pixels), but at most LONGEST on its longer
        side. Raises ValueError if the autoencoder cannot take the latents."""
        clean = latents.rows(row, row + 1).clean()
        if clean.ndim == 3 and self.unpack is not None:
            clean = self.unpack(clean, width, height)
        if clean.ndim == 5:
            clean = clean[:, :, 0]
        if clean.ndim != 4 or clean.shape[1] != self.map.channels:
            raise ValueError(
                f"latents have shape {tuple(clean.shape)}; previews need {self.map.channels} "
                f"channels"
            )
        pixels = self.map(clean).add_(1).mul_(127.5).clamp_(0, 255)
        image = Image.fromarray(pixels[0].permute(1, 2, 0).round().to("cpu", torch.uint8).numpy())
        scale = min(1.0, LONGEST / max(width, height))
        size = max(1, round(width * scale)), max(1, round(height * scale))
        return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


# The fit


@dataclass(frozen=True)
class PixelMap:
    """Maps the denoiser's latents (rows, channels, height, width) to pixels (rows, 3, detail *
    height, detail * width), -1 to 1.

    The inputs of `readout` (3 * detail ** 2, inputs) are the latents around a pixel, FEATURES
    rectified combinations of them, and 1.
    """

    combinations: torch.Tensor  # (FEATURES, channels, REACH, REACH)
    thresholds: torch.Tensor  # (FEATURES,)
    readout: torch.Tensor
    detail: int

    @property
    def channels(self) -> int:
        return self.combinations.shape[1]

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        values = self.readout @ self.inputs(latents)
        values = values.reshape(*values.shape[:2], *latents.shape[2:])
        return functional.pixel_shuffle(values, self.detail)

    def inputs(self, latents: torch.Tensor) -> torch.Tensor:
        """The inputs of `readout`, (rows, inputs, height * width)."""
        padded = functional.pad(latents.to(self.combinations), (REACH // 2,) * 4, mode="replicate")
        linear = functional.unfold(padded, REACH)
        rectified = functional.conv2d(padded, self.combinations, self.thresholds).relu().flatten(2)
        return torch.cat([linear, rectified, torch.ones_like(linear[:, :1])], dim=1)


def _fit(vae: Any, factor: int, device: torch.device | None) -> tuple[PixelMap, float]:
    """Fit a map for latents that are `factor` times smaller than the pixels. Returns it and the
    share of the variance of test pixels that it explains."""
    device = device or vae.device
    if vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
        vae = _unhooked_copy(vae).to(device, torch.float32)  # half precision would overflow
    latents, pixels = _samples(vae, LATENT_SIDE * factor, device)
    latents = normalised(vae, latents)
    factor = pixels.shape[-1] // latents.shape[-1]
    detail = max(detail for detail in range(1, min(DETAIL, factor) + 1) if factor % detail == 0)
    targets = functional.pixel_unshuffle(functional.avg_pool2d(pixels, factor // detail), detail)
    generator = torch.Generator().manual_seed(0)
    channels = latents.shape[1]
    combinations = torch.randn(FEATURES, channels, REACH, REACH, generator=generator)
    combinations /= float(latents.std()) * (channels * REACH**2) ** 0.5
    thresholds = torch.randn(FEATURES, generator=generator) / 2
    nothing = torch.zeros(targets.shape[1], 0)
    blank = PixelMap(combinations.to(latents), thresholds.to(latents), nothing, detail)
    inputs, targets = _flat(blank.inputs(latents)), _flat(targets)
    seen = len(targets) * 3 // 4
    unseen = targets[seen:]
    error = unseen - inputs[seen:] @ _solve(inputs[:seen], targets[:seen])
    explained = 1 - float(error.square().sum() / (unseen - unseen.mean(0)).square().sum())
    return replace(blank, readout=_solve(inputs, targets).T.to(latents)), explained


def _flat(values: torch.Tensor) -> torch.Tensor:
    """Convert (images, n, places...) to doubles on the CPU, (images * places, n)."""
    return values.flatten(2).transpose(1, 2).flatten(0, 1).to("cpu", torch.float64)


def _solve(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The solution of the ridge regression, (inputs, targets)."""
    gram = inputs.T @ inputs
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    solution: torch.Tensor = torch.linalg.solve(gram, inputs.T @ targets)
    return solution


def _unhooked_copy(vae: nn.Module) -> nn.Module:
    """A copy without accelerate's hook, which refers to other offloaded models."""
    hook = getattr(vae, "_hf_hook", None)
    copied = copy.deepcopy(vae, {} if hook is None else {id(hook): ModelHook()})
    unhooked: nn.Module = remove_hook_from_module(copied)
    return unhooked


def _samples(vae: Any, side: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of synthetic images, (images, channels, side, side), and their decoded pixels, from
    -1 to 1, in float32."""
    film = any(isinstance(module, nn.Conv3d) for module in vae.modules())
    latents, pixels = [], []
    images = synthetic_images(SYNTHETIC_IMAGES, side)
    for start in range(0, SYNTHETIC_IMAGES, TOGETHER):
        batch = images[start : start + TOGETHER].to(device, vae.dtype)
        encoded = vae.encode(batch[:, :, None] if film else batch)
        mode = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded[0]
        decoded = vae.decode(mode, return_dict=False)[0]
        latents.append((mode[:, :, 0] if film else mode).float())
        pixels.append((decoded[:, :, 0] if film else decoded).float().clamp(-1, 1))
    return torch.cat(latents), torch.cat(pixels)


def normalised(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Scale the autoencoder's latents (rows, channels, height, width) to the denoiser's, by the
    autoencoder's config."""

    def value(name: str, default: float) -> torch.Tensor:
        setting = getattr(vae.config, name, None)
        setting = default if setting is None else setting
        return torch.as_tensor(setting, device=latents.device).float().reshape(-1, 1, 1)

    mean = value("latents_mean", 0.0) + value("shift_factor", 0.0)
    return (latents - mean) * value("scaling_factor", 1.0) / value("latents_std", 1.0)


def synthetic_images(count: int, side: int) -> torch.Tensor:
    """Draw round and square shapes on plain and graded backgrounds, (count, 3, side, side), from -1
    to 1; always the same. Many colours are pure, since grain shows on black and white backgrounds.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(count, *shape, 1, 1, generator=generator)

    line = torch.linspace(0, 1, side)
    y, x = torch.meshgrid(line, line, indexing="ij")
    slope = (draw(1) * x + draw(1) * y) / 2
    first, second, plain = draw(3), draw(3), draw(1) < 0.5
    images = torch.where(plain, first, first * (1 - slope) + second * slope)
    for i in range(6):
        centre_x, centre_y, size = draw(1), draw(1), 0.08 + 0.25 * draw(1)
        far_x, far_y = (x - centre_x).abs(), (y - centre_y).abs()
        inside = (torch.maximum(far_x, far_y) if i % 2 else (far_x**2 + far_y**2).sqrt()) < size
        images = torch.where(inside, draw(3), images)
    return ((images * 2 - 1) * (1 + 2 * draw(1))).clamp(-1, 1)


def _unpacker(pipeline: Any) -> Callable[[torch.Tensor, int, int], torch.Tensor] | None:
    """The pipeline's function that unpacks latents to (rows, channels, [1,] height, width); None if
    there is none, or it has other parameters."""
    function = unpacker_of(pipeline)
    if function is None:
        return None
    names = list(inspect.signature(function).parameters)
    constants = {name: getattr(pipeline, name, None) for name in ("vae_scale_factor", "patch_size")}
    if not set(names) <= {"latents", "height", "width", *constants}:
        return None

    def unpack(latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
        values = {"latents": latents, "height": height, "width": width, **constants}
        unpacked: torch.Tensor = function(**{name: values[name] for name in names})
        return unpacked

    return unpack
