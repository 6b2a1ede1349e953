"""An edit: the part of an image that the mask shows in white is painted again."""

import base64
import io
import os
from pathlib import Path

import httpx
from PIL import Image, ImageDraw

server = os.environ.get("STEPWEAVE_URL", "http://localhost:3000")


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


image = Image.new("RGB", (64, 64), "blue")
ImageDraw.Draw(image).ellipse((12, 12, 52, 52), fill="red")
mask = Image.new("L", (64, 64), 0)
ImageDraw.Draw(mask).rectangle((8, 8, 56, 56), fill=255)

answer = httpx.post(
    f"{server}/v1/images/edits",
    files={"image": ("image.png", png(image)), "mask": ("mask.png", png(mask))},
    data={"prompt": "a large yellow square on a blue background", "seed": "7"},
    timeout=None,
)
answer.raise_for_status()
Path("edit.png").write_bytes(base64.b64decode(answer.json()["data"][0]["b64_json"]))
print("edit.png")
