"""Previews of unfinished images: a small map from latents to pixels, fitted to the autoencoder
that is served.

Latents of most autoencoders tell the colours of the pixels they stand for nearly linearly, so no
decoder need run and no denoising step is spent. The map is linear in the latents around a pixel and
in some random features of them, and is solved for, not trained. What is mapped is not the noisy
latents but the clean ones that the model predicts at a step (`Latents.clean`).
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

if TYPE_CHECKING:
    from stepweave.previews.latents import Latents

logger = logging.getLogger(__name__)

LONGEST = 512  # pixels of a preview's longer side
DETAIL = 4  # pixels a side that one latent becomes, at most
REACH = 3  # latents a side that a pixel depends on; odd
FEATURES = 256  # random ones
SYNTHETIC_IMAGES = 32  # that the map is fitted to; a quarter of them is kept to judge it
LATENT_SIDE = 8  # of those
TOGETHER = 8  # in a forward
PROOF = 0.5  # share of the variance of unseen pixels that the map must explain
RIDGE = 3e-2  # of the mean square of a feature
LAST = 0.75  # share of the steps after which the last preview is made


def preview_steps(total: int, count: int) -> list[int]:
    """After which of `total` steps to show `count` previews: evenly spread, before the last step;
    fewer if there are fewer.

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
    """Makes previews, on any thread. `fit` makes one."""

    map: PixelMap
    unpack: Callable[[torch.Tensor, int, int], torch.Tensor] | None
    explained: float  # share of the variance of unseen pixels

    @classmethod
    def fit(cls, pipeline: Any) -> Previewer | None:
        """One for a pipeline whose `vae` is loaded; None, and a line of the log, where no such map
        does.

        To be called before an engine has the pipeline. It takes a few forwards of the autoencoder
        on small images.
        """
        began = time.monotonic()
        try:
            with torch.no_grad():
                # where CPU offload brings the autoencoder
                device = getattr(pipeline, "_execution_device", None)
                fitted, explained = _fit(
                    pipeline.vae, getattr(pipeline, "vae_scale_factor", 8), device
                )
        except Exception as error:
            logger.warning(
                "there will be no previews: %s (%s)",
                type(error).__name__,
                str(error).partition("\n")[0],
            )
            return None
        finally:
            for hook in getattr(pipeline, "_all_hooks", ()):
                hook.offload()  # with CPU offload the autoencoder came to the GPU
        if not explained >= PROOF:
            logger.warning(
                "there will be no previews: latents explain %.0f %% of the pixels", 100 * explained
            )
            return None
        logger.info(
            "previews explain %.0f %% of the pixels, fitted in %.1f s",
            100 * explained,
            time.monotonic() - began,
        )
        return cls(fitted, _unpacker(pipeline), explained)

    def image(self, latents: Latents, width: int, height: int, row: int = 0) -> Image.Image:
        """What an image of this size looks like at a step, as large as it will be, or LONGEST
        pixels on its longer side.

        Raises ValueError if the latents are not what the autoencoder takes.
        """
        clean = latents.rows(row, row + 1).clean()
        if clean.ndim == 3 and self.unpack is not None:
            clean = self.unpack(clean, width, height)
        if clean.ndim == 5:
            clean = clean[:, :, 0]
        if clean.ndim != 4 or clean.shape[1] != self.map.channels:
            raise ValueError(
                f"latents are {tuple(clean.shape)}; {self.map.channels} channels can be previewed"
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

    `readout` (3 * detail ** 2, inputs) is of the latents around a pixel, of FEATURES rectified
    combinations of them, and of one.
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
        return functional.pixel_shuffle(
            values.reshape(*values.shape[:2], *latents.shape[2:]), self.detail
        )

    def inputs(self, latents: torch.Tensor) -> torch.Tensor:
        """What the readout is of, (rows, inputs, height * width)."""
        padded = functional.pad(latents.to(self.combinations), (REACH // 2,) * 4, mode="replicate")
        linear = functional.unfold(padded, REACH)
        rectified = functional.conv2d(padded, self.combinations, self.thresholds).relu().flatten(2)
        return torch.cat([linear, rectified, torch.ones_like(linear[:, :1])], dim=1)


def _fit(vae: Any, factor: int, device: torch.device | None) -> tuple[PixelMap, float]:
    """A map for latents that are `factor` times smaller than the pixels, and the share of the
    variance that it explains."""
    device = device or vae.device
    if vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
        vae = _unhooked_copy(vae).to(device, torch.float32)  # in half precision it overflows
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
    """Doubles on the CPU (images * places, n) of (images, n, places...)."""
    return values.flatten(2).transpose(1, 2).flatten(0, 1).to("cpu", torch.float64)


def _solve(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The ridge regression's (inputs, targets)."""
    gram = inputs.T @ inputs
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    solution: torch.Tensor = torch.linalg.solve(gram, inputs.T @ targets)
    return solution


def _unhooked_copy(vae: nn.Module) -> nn.Module:
    """A copy without accelerate's hook, which holds the models that are offloaded before this
    one."""
    hook = getattr(vae, "_hf_hook", None)
    copied = copy.deepcopy(vae, {} if hook is None else {id(hook): ModelHook()})
    unhooked: nn.Module = remove_hook_from_module(copied)
    return unhooked


def _samples(vae: Any, side: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of the autoencoder, (images, channels, side, side), and their pixels, -1 to 1,
    float32."""
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
    """The autoencoder's latents (rows, channels, height, width) as the denoiser has them, by the
    autoencoder's config."""

    def value(name: str, otherwise: float) -> torch.Tensor:
        found = getattr(vae.config, name, None)
        return (
            torch.as_tensor(otherwise if found is None else found, device=latents.device)
            .float()
            .reshape(-1, 1, 1)
        )

    mean = value("latents_mean", 0.0) + value("shift_factor", 0.0)
    return (latents - mean) * value("scaling_factor", 1.0) / value("latents_std", 1.0)


def synthetic_images(count: int, side: int) -> torch.Tensor:
    """Round and square shapes of all colours on plain and graded grounds, (count, 3, side, side),
    -1 to 1; always the same.

    Many colours are pure: grounds of black and white are what grain shows on.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(count, *shape, 1, 1, generator=generator)

    line = torch.linspace(0, 1, side)
    y, x = torch.meshgrid(line, line, indexing="ij")
    slope = (draw(1) * x + draw(1) * y) / 2
    one, other, plain = draw(3), draw(3), draw(1) < 0.5
    images = torch.where(plain, one, one * (1 - slope) + other * slope)
    for i in range(6):
        centre_x, centre_y, size = draw(1), draw(1), 0.08 + 0.25 * draw(1)
        far_x, far_y = (x - centre_x).abs(), (y - centre_y).abs()
        inside = (torch.maximum(far_x, far_y) if i % 2 else (far_x**2 + far_y**2).sqrt()) < size
        images = torch.where(inside, draw(3), images)
    return ((images * 2 - 1) * (1 + 2 * draw(1))).clamp(-1, 1)


def _unpacker(pipeline: Any) -> Callable[[torch.Tensor, int, int], torch.Tensor] | None:
    """The pipeline's own way from packed latents to (rows, channels, [1,] height, width); None if
    there is none of use."""
    function = getattr(pipeline, "_unpack_latents", None)
    if function is None:
        return None
    names = list(inspect.signature(function).parameters)
    known = {"vae_scale_factor": getattr(pipeline, "vae_scale_factor", None)}
    if not set(names) <= {"latents", "height", "width", *known}:
        return None

    def unpack(latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
        values = {"latents": latents, "height": height, "width": width, **known}
        unpacked: torch.Tensor = function(**{name: values[name] for name in names})
        return unpacked

    return unpack
