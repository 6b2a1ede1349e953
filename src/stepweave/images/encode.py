"""Encodes images as PNG, JPEG or WebP, with their parameters inside."""

from __future__ import annotations

import io
import json
from typing import Any

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from stepweave import __version__
from stepweave.errors import InvalidRequestError
from stepweave.parameters import COMPONENTS, OutputFormat, component_texts, lora_text

# limits of the encoders, in pixels
MAX_SIDES: dict[OutputFormat, int] = {"png": 2**31 - 1, "jpeg": 65_500, "webp": 16_383}
_ASCII_CODE = b"ASCII\0\0\0"  # EXIF 2.32, 4.6.5: the character code that precedes a UserComment
_UNICODE_CODE = b"UNICODE\0"
# bytes in a JPEG segment after its length and "Exif" marker
_EXIF_LIMIT = 65_527


def a1111_text(values: dict[str, Any], model: str) -> str:
    """The parameters in the format of the A1111 web UI, which most image tools read."""
    lines = [values.get("prompt", "")]
    if values.get("negative_prompt"):
        lines.append(f"Negative prompt: {values['negative_prompt']}")
    fields: dict[str, Any] = {
        "Steps": values["num_inference_steps"],
        "CFG scale": values.get("guidance_scale"),
        "Seed": values["seed"],
        "Size": values["size"],
        "Model": model,
        # texts with commas are quoted
        "Lora": json.dumps(lora) if (lora := lora_text(values)) else None,
        **_units(values),
        "Version": f"stepweave {__version__}",
    }
    known = [f"{name}: {value}" for name, value in fields.items() if value is not None]
    return "\n".join([*lines, ", ".join(known)])


def _units(values: dict[str, Any]) -> dict[str, str]:
    """What guides an image, as the web UI's extension for ControlNets writes it, a unit each."""
    texts, units = component_texts(values), []
    for field, scale in COMPONENTS.items():
        if scale is None or field not in texts:
            continue
        names, scales = texts[field].split(","), texts.get(scale, "").split(",")
        if len(scales) != len(names):  # one for all
            scales = scales[:1] * len(names)
        units += list(zip(names, scales, strict=True))
    return {
        f"ControlNet {i}": json.dumps(
            f"Module: none, Model: {name}" + (f", Weight: {scale}" if scale else "")
        )
        for i, (name, scale) in enumerate(units)
    }


def check_file(
    output_format: OutputFormat, compression: int | None, width: int, height: int
) -> None:
    """Raise InvalidRequestError if the format does not allow this size or compression."""
    most = MAX_SIDES[output_format]
    if max(width, height) > most:
        raise InvalidRequestError(
            f"size is {width}x{height}; {output_format} takes {most} a side.", param="size"
        )
    if compression is not None and output_format == "png":
        message = (
            f"output_compression is {compression}, but png has none; output_format may be jpeg or "
            f"webp."
        )
        raise InvalidRequestError(message, param="output_compression")


def encode(
    image: Image.Image,
    output_format: OutputFormat,
    values: dict[str, Any] | None,
    model: str,
    quality: int | None = None,
) -> bytes:
    """Encode an image as a file. `values` are its parameters (`Parameters.of_image`), or None to
    omit them.

    They are stored in PNG as text chunks `parameters` (A1111) and `stepweave` (JSON); in JPEG and
    WebP as EXIF UserComment (A1111) and ImageDescription (JSON), which a JPEG omits if it is too
    long. `quality` is 0 to 100, ignored for PNG.
    """
    buffer = io.BytesIO()
    # PNG has no floating-point or CMYK modes
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
        image = image.convert("RGB")
    if output_format == "png":
        info = PngInfo()
        if values is not None:
            info.add_itxt("parameters", a1111_text(values, model))
            info.add_itxt("stepweave", json.dumps({**values, "model": model}))
        image.save(buffer, "PNG", pnginfo=info)
        return buffer.getvalue()
    # 4:4:4 and high quality: chroma subsampling is visible in flat colours and hard edges
    options: dict[str, Any] = (
        {"quality": 95, "subsampling": 0} if output_format == "jpeg" else {"quality": 90}
    )
    if quality is not None:
        options["quality"] = quality
    if values is not None:
        options["exif"] = _exif(values, model, output_format)
    _plain(image, output_format).save(buffer, output_format.upper(), **options)
    return buffer.getvalue()


def _plain(image: Image.Image, output_format: OutputFormat) -> Image.Image:
    """The image in a mode of the format: RGB, on white where it is transparent; in WebP also RGBA.
    Converting copies it."""
    if image.mode == "RGB" or (image.mode == "RGBA" and output_format == "webp"):
        return image
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _exif(values: dict[str, Any], model: str, output_format: OutputFormat) -> Image.Exif:
    text = a1111_text(values, model)
    exif = Image.Exif()
    comment = (
        _ASCII_CODE + text.encode() if text.isascii() else _UNICODE_CODE + text.encode("utf-16-be")
    )
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    exif[ExifTags.Base.ImageDescription] = json.dumps({**values, "model": model})
    if output_format == "jpeg" and len(exif.tobytes()) > _EXIF_LIMIT:
        del exif[ExifTags.Base.ImageDescription]
    return exif
