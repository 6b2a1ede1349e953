from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from stepweave.images.encode import encode
from stepweave.parameters import ImageRequest, OutputFormat, lora_text

VALUES: dict[str, Any] = {
    "prompt": "a red circle",
    "seed": 7,
    "negative_prompt": "blue",
    "size": "64x48",
    "num_inference_steps": 20,
    "guidance_scale": 4.0,
}
A1111 = (
    "a red circle\nNegative prompt: blue\nSteps: 20, CFG scale: 4.0, Seed: 7, Size: 64x48, Model: "
    "shapes, Version: stepweave"
)


@pytest.fixture
def image() -> Image.Image:
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[10:30, 10:40] = (226, 30, 34)
    return Image.fromarray(pixels)


def reopen(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def test_png_is_lossless_and_carries_the_parameters(image: Image.Image) -> None:
    file = reopen(encode(image, "png", VALUES, "shapes"))
    assert file.format == "PNG"
    assert file.tobytes() == image.tobytes()
    assert file.info["parameters"].startswith(A1111)
    assert json.loads(file.info["stepweave"]) == {**VALUES, "model": "shapes"}


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
@pytest.mark.parametrize("prompt", ["a red circle", "ein roter Kreis — 赤い円 🔴"])
def test_exif_carries_the_parameters(
    image: Image.Image, output_format: OutputFormat, prompt: str
) -> None:
    values = {**VALUES, "prompt": prompt}
    file = reopen(encode(image, output_format, values, "shapes"))
    exif = file.getexif()
    comment = exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    text = comment[8:].decode("ascii" if comment.startswith(b"ASCII") else "utf-16-be")
    assert text.startswith(A1111.replace("a red circle", prompt))
    assert json.loads(exif[ExifTags.Base.ImageDescription])["prompt"] == prompt
    difference = np.abs(np.asarray(file.convert("RGB"), np.int16) - np.asarray(image, np.int16))
    assert difference.mean() < 4


def test_the_longest_prompts_fit_into_jpeg(image: Image.Image) -> None:
    values = {**VALUES, "prompt": "🔴" * 7000, "negative_prompt": "🔵" * 7000}
    exif = reopen(encode(image, "jpeg", values, "shapes")).getexif()
    comment = exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment[8:].decode("utf-16-be").startswith("🔴" * 7000)


@pytest.mark.parametrize(
    ("scale", "text"),
    [(1.0, "1"), (-0.5, "-0.5"), (0.12345678, "0.12345678"), (1e-7, "0.0000001"), (10.0, "10"),
     (0.1 + 0.2, "0.30000000000000004")],
)  # fmt: skip
def test_scales_of_loras_are_exact(image: Image.Image, scale: float, text: str) -> None:
    values = {**VALUES, "lora": [{"name": "rings", "scale": scale}]}
    assert lora_text(values) == f"rings:{text}"
    read = ImageRequest(prompt="x", lora=lora_text(values)).lora  # type: ignore[arg-type]
    assert read is not None and read[0].scale == scale
    told = reopen(encode(image, "png", values, "shapes")).info["parameters"]
    assert f'Lora: "rings:{text}"' in told


def test_what_guided_an_image_is_told_with_its_scale(image: Image.Image) -> None:
    guided = {
        "controlnet": ["outlines", "depth"],
        "controlnet_conditioning_scale": [0.8, 1.0],
        "ip_adapter": "faces",
    }
    told = reopen(encode(image, "png", {**VALUES, **guided}, "shapes")).info["parameters"]
    assert (
        'ControlNet 0: "Module: none, Model: outlines, Weight: 0.8", '
        'ControlNet 1: "Module: none, Model: depth, Weight: 1", '
        'ControlNet 2: "Module: none, Model: faces", '
    ) in told
    one = {**VALUES, **guided, "controlnet_conditioning_scale": 0.5}
    told = reopen(encode(image, "png", one, "shapes")).info["parameters"]
    assert told.count("Weight: 0.5") == 2, "one scale is for all"
