"""What a client sends for a case, and the images in the answer."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from tests.served.plain import Case, as_array
from tests.served.saving import IP_ADAPTER

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
FILE_TYPE = "application/octet-stream"
FILE_NAMES = {"mask_image": "mask"}  # of images; others have the pipeline's own name


class NotAskedError(Exception):
    """A request cannot say this."""


@dataclass(frozen=True)
class Answer:
    """The images of an answer, or why there are none."""

    images: list[np.ndarray]
    error: str = ""


def check_sayable(case: Case) -> None:
    """Raise NotAskedError for arguments that no request has."""
    nested = [
        name
        for name, value in case.arguments.items()
        if isinstance(value, list) and any(isinstance(item, list) for item in value)
        if any(isinstance(item, Image.Image) for items in value for item in items)
    ]
    if nested:
        raise NotAskedError(f"needs lists of lists of images: {', '.join(nested)}")


async def ask(client: httpx.AsyncClient, case: Case, preset: Collection[str]) -> Answer:
    """Send the request of a case; `preset` names the arguments that the model's preset has."""
    # one that the case changes is said by the request
    given = {
        name: value
        for name, value in case.arguments.items()
        if name not in preset or name == case.name
    }
    files = [part for name, value in given.items() for part in _files(name, value)]
    fields = {name: value for name, value in given.items() if not _files(name, value)}
    tensors = {name: save({name: one}) for name, one in fields.items() if _is_tensor(one)}
    if "width" in fields and "height" in fields:
        fields["size"] = f"{fields.pop('width')}x{fields.pop('height')}"
    if "ip_adapter_image" in given:
        fields["ip_adapter"] = IP_ADAPTER
    fields |= {"seed": case.seed} | ({"n": case.n} if case.n != 1 else {})
    if files:
        texts = {name: value for name, value in fields.items() if name not in tensors}
        files += [
            (name, (f"{name}.safetensors", file, FILE_TYPE)) for name, file in tensors.items()
        ]
        response = await client.post(EDITS, data=_form(texts), files=files)
    else:
        sent = {name: base64.b64encode(file).decode() for name, file in tensors.items()}
        response = await client.post(GENERATIONS, json={**fields, **sent})
    if response.status_code != 200:
        return Answer([], f"{response.status_code} {_message(response)}")
    try:
        data = [base64.b64decode(item["b64_json"]) for item in response.json()["data"]]
        return Answer([as_array(Image.open(io.BytesIO(content))) for content in data])
    except (KeyError, ValueError) as error:
        return Answer([], f"200 without images ({type(error).__name__})")


def _files(name: str, value: Any) -> list[tuple[str, tuple[str, bytes, str]]]:
    """The parts of a form for an argument; none if it is not an image, or a list of images. A
    mask that the plain call has as a tensor, of 0 and 1, is an image for a request."""
    if name == "mask_image" and _is_tensor(value):
        pixels = (value.squeeze() * 255).to(torch.uint8).numpy()
        return [(FILE_NAMES[name], _file(Image.fromarray(pixels)))]
    if isinstance(value, Image.Image):
        return [(FILE_NAMES.get(name, name), _file(value))]
    if isinstance(value, list) and value and isinstance(value[0], Image.Image):
        return [(f"{name}[]", _file(image)) for image in value]
    return []


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _file(image: Image.Image) -> tuple[str, bytes, str]:
    content = io.BytesIO()
    image.save(content, "PNG")
    return "image.png", content.getvalue(), "image/png"


def _form(fields: dict[str, Any]) -> dict[str, str]:
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in fields.items()
    }


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (KeyError, TypeError, ValueError):
        return response.text[:200]
