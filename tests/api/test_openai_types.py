"""What the installed `openai` package says of the Images API: answers are as its types have them,
in strict mode, and each field and value that its types have is taken, or refused with a reason."""

from __future__ import annotations

import io
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import httpx
import openai
import pytest
from openai.types import (
    ImageEditCompletedEvent,
    ImageEditPartialImageEvent,
    ImageGenCompletedEvent,
    ImageGenPartialImageEvent,
    ImagesResponse,
    image_edit_params,
    image_generate_params,
)
from PIL import Image
from pydantic import BaseModel
from typing_extensions import is_typeddict

from tests.support.fake_pipeline import FakePipeline
from tests.support.in_process import InProcess, listening
from tests.support.served import Served
from tests.support.waiting import SECONDS

PROMPT = "a large red circle on a blue background"
EVENTS: dict[str, type[BaseModel]] = {
    "image_generation.partial_image": ImageGenPartialImageEvent,
    "image_generation.completed": ImageGenCompletedEvent,
    "image_edit.partial_image": ImageEditPartialImageEvent,
    "image_edit.completed": ImageEditCompletedEvent,
}
POSITIONS = 8 * 8  # of the latents of an image of 64x64
TOKENIZERS = 2  # of the embedded model


@pytest.fixture(scope="module")
def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (40, 60, 220)).save(buffer, "PNG")
    return buffer.getvalue()


def ask(served: Served, png: bytes | None, **fields: Any) -> httpx.Response:
    """A generation, or, with a file, an edit."""
    fields = {"prompt": PROMPT, "num_inference_steps": 4, **fields}
    if png is None:
        return httpx.post(f"{served.url}/v1/images/generations", json=fields, timeout=SECONDS)
    texts = {
        name: (None, str(value).lower() if isinstance(value, bool) else str(value))
        for name, value in fields.items()
    }
    files: dict[str, Any] = {**texts, "image": ("x.png", png, "image/png")}
    return httpx.post(f"{served.url}/v1/images/edits", files=files, timeout=SECONDS)


@pytest.mark.parametrize("edit", [False, True])
@pytest.mark.parametrize("response_format", ["b64_json", "url"])
@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_answers_are_as_the_types_have_them(
    served: Served, png: bytes, edit: bool, response_format: str, output_format: str
) -> None:
    answer = ask(
        served,
        png if edit else None,
        n=2,
        response_format=response_format,
        output_format=output_format,
    )
    read = ImagesResponse.model_validate_json(answer.text, strict=True)
    assert (
        read.data is not None
        and read.usage is not None
        and read.usage.output_tokens_details is not None
    )
    assert (read.size, read.output_format, read.background, len(read.data)) == (
        "64x64",
        output_format,
        "opaque",
        2,
    )
    assert all((one.url is None) == (response_format == "b64_json") for one in read.data)
    usage = read.usage
    # the prompt's eight words, the empty negative prompt, and two special ones of each
    assert usage.input_tokens_details.text_tokens == TOKENIZERS * (8 + 2 + 2)
    assert usage.input_tokens_details.image_tokens == (POSITIONS if edit else 0)
    assert (
        usage.input_tokens
        == usage.input_tokens_details.text_tokens + usage.input_tokens_details.image_tokens
    )
    assert usage.output_tokens == usage.output_tokens_details.image_tokens == 2 * POSITIONS
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    beside = {"images": 2, "pixels": 2 * 64 * 64}
    assert beside.items() <= answer.json()["usage"].items()


@pytest.mark.parametrize("edit", [False, True])
@pytest.mark.parametrize("response_format", ["b64_json", "url"])
def test_events_are_as_the_types_have_them(
    served: Served, png: bytes, edit: bool, response_format: str
) -> None:
    asked = {
        "stream": True,
        "partial_images": 2,
        "response_format": response_format,
        "strength": 1.0,
    }
    told = ask(served, png if edit else None, **(asked if edit else {**asked, "strength": None}))
    data = [
        line.removeprefix("data: ") for line in told.text.splitlines() if line.startswith("data: ")
    ]
    names = [
        line.removeprefix("event: ")
        for line in told.text.splitlines()
        if line.startswith("event: ")
    ]
    kind = "image_edit" if edit else "image_generation"
    assert names == [f"{kind}.partial_image"] * 2 + [f"{kind}.completed"]
    events = [
        EVENTS[name].model_validate_json(one, strict=True)
        for name, one in zip(names, data, strict=True)
    ]
    assert [event.type for event in events] == names  # type: ignore[attr-defined]
    completed: Any = events[-1]
    assert (completed.usage.output_tokens, completed.usage.input_tokens_details.image_tokens) == (
        POSITIONS, POSITIONS if edit else 0,
    )  # fmt: skip
    assert ("url" in (completed.model_extra or {})) == (response_format == "url")


# What the client may send

HAVE_AN_EFFECT = {
    "prompt",
    "image",
    "mask",
    "model",
    "n",
    "size",
    "stream",
    "response_format",
    "output_format",
    "output_compression",
    "partial_images",
}
WITHOUT_STREAM = {("partial_images", number) for number in "123"}  # no previews are sent
TEXTS = {"size": ["64x64"], "model": ["shapes"]}  # one of the values where any text is right


def values(name: str, hint: Any) -> Iterator[Any]:
    """Every literal that a type has, and one of each other kind of value."""
    if get_origin(hint) is Literal:
        yield from get_args(hint)
    elif get_origin(hint) in (Union, types.UnionType):
        for one in get_args(hint):
            yield from values(name, one)
    elif is_typeddict(hint):
        members = get_type_hints(hint)
        yield {}
        for member, one in members.items():
            yield from ({member: value} for value in values(member, one))
    elif hint is type(None):
        yield None
    elif hint is str:
        yield from TEXTS.get(name, ["something"])
    elif hint is int:
        yield 1
    else:
        raise AssertionError(f"{name} has a type that this test knows nothing of: {hint}")


def fields(*params: Any, png: bytes) -> list[tuple[str, Any]]:
    """Each field of some types of parameters with each of its values."""
    file = ("x.png", png, "image/png")
    found: list[tuple[str, Any]] = []
    for one in params:
        files = {name for name, hint in one.__annotations__.items() if "FileTypes" in str(hint)}
        for name in files:
            several = "Sequence" in str(one.__annotations__[name])
            found += [
                (name, value) for value in ([file, [file], [file, file]] if several else [file])
            ]
        hints = get_type_hints(one)
        found += [
            (name, value) for name in hints.keys() - files for value in values(name, hints[name])
        ]
    return sorted({repr(pair): pair for pair in found}.values(), key=lambda pair: pair[0])


def holds_anything(value: Any) -> bool:
    """Whether there is anything in it that a form has a field for."""
    return (
        any(map(holds_anything, value.values())) if isinstance(value, dict) else value is not None
    )


def problem(client: openai.OpenAI, png: bytes, name: str, value: Any, edit: bool) -> str | None:
    """What is wrong with how a value is answered; None if nothing is."""
    # the least that there is of all else
    asked: dict[str, Any] = {
        "prompt": PROMPT,
        "extra_body": {"num_inference_steps": 1, "strength": 1.0},
    }
    if edit:
        asked["image"] = ("x.png", png, "image/png")
    else:
        del asked["extra_body"]["strength"]
    if name == "output_compression":
        asked["output_format"] = "jpeg"
    asked[name] = value
    called: Any = client.images.edit if edit else client.images.generate
    try:
        answer = called(**asked)
        warnings = list(answer)[-1].warnings if value is True else answer.warnings
    except openai.APIStatusError as error:
        if error.status_code not in (400, 404) or error.code == "unknown_field":
            return f"{error.status_code} {error.code}: {error.message}"
        what_to_do = "STEPWEAVE_MODEL_NAMES" if name == "model" else ""
        return (
            None
            if error.param == name and len(error.message) > 30 and what_to_do in error.message
            else error.message
        )
    warned = any(warning.startswith(f"{name}:") for warning in warnings)
    effect = (
        (name in HAVE_AN_EFFECT and (name, str(value)) not in WITHOUT_STREAM)
        or value in (None, "auto")
        or (edit and not holds_anything(value))
    )
    return None if warned is not effect else f"taken with the warnings {warnings}"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("edit", [False, True])
def test_every_field_and_value_is_taken_or_refused_with_a_reason(
    in_process: Callable[..., InProcess], png: bytes, edit: bool
) -> None:
    module: Any = image_edit_params if edit else image_generate_params
    name = "ImageEditParams" if edit else "ImageGenerateParams"
    params = [getattr(module, f"{name}{kind}") for kind in ("Base", "NonStreaming", "Streaming")]
    asked = fields(*params, png=png)
    assert len({name for name, _ in asked}) > 15
    with (
        listening(in_process(FakePipeline(edits=True), trusted_hosts="127.0.0.1")) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        found = list(pool.map(lambda pair: problem(client, png, *pair, edit), asked))
    assert [
        (pair, wrong) for pair, wrong in zip(asked, found, strict=True) if wrong is not None
    ] == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_refusals_are_the_clients_own_errors(
    in_process: Callable[..., InProcess], tmp_path: Path, png: bytes
) -> None:
    (tmp_path / "x.png").write_bytes(png)
    with (
        listening(in_process(FakePipeline(edits=True))) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client,
    ):
        with pytest.raises(openai.BadRequestError, match="/v1/images/edits") as caught:
            client.images.create_variation(image=tmp_path / "x.png")
        assert caught.value.code == "unsupported"
        with pytest.raises(
            openai.BadRequestError, match="image is given 3 times; FakePipeline takes one"
        ) as caught:
            client.images.edit(image=[tmp_path / "x.png"] * 3, prompt=PROMPT)
        assert (caught.value.code, caught.value.param) == ("invalid_value", "image")
        with pytest.raises(openai.NotFoundError, match="STEPWEAVE_MODEL_NAMES") as missing:
            client.images.generate(model="dall-e-3", prompt=PROMPT)
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("dall-e-3")
