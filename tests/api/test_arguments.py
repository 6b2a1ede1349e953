"""A pipeline's own arguments and images, on every HTTP surface."""

from __future__ import annotations

import base64
import copy
import gzip
import io
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from stepweave.api.middleware.native_schema import with_model
from stepweave.api.routes.openai import NO_STREAM
from stepweave.api.schemas import EditBody
from stepweave.config import Settings
from stepweave.config.preset import parsed
from stepweave.errors import LoadError
from stepweave.serving.model import ServedModel
from tests.support.asgi import serving
from tests.support.bodies import natively
from tests.support.fake_pipeline import FakePipeline
from tests.support.in_process import InProcess
from tests.support.waiting import wait_until

Make = Callable[..., InProcess]
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
ROWS = 8  # of an image that show what was sent


class Own(FakePipeline):
    """With arguments of its own, whose values its record has."""

    def __call__(  # type: ignore[override]
        self,
        prompt: str | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 4,
        guidance_scale: float = 7.0,
        true_cfg_scale: float = 4.0,
        clip_skip: int | None = None,
        tiled: bool = False,
        layers: int = 2,
        original_size: tuple[int, int] | None = None,
        sigmas: list[float] | None = None,
        edit_threshold: float | list[float] = 0.9,
        phrases: list[str] | None = None,
        latents: torch.Tensor | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        num_images_per_prompt: int = 1,
        generator: list[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> SimpleNamespace:
        given = {
            name: value for name, value in locals().items() if name not in ("self", "__class__")
        }
        if clip_skip == 13:
            raise IndexError("list index out of range")
        if clip_skip == 14:
            raise RuntimeError("the device burns")
        made = super().__call__(
            prompt, None, height, width, num_inference_steps, guidance_scale,
            num_images_per_prompt, generator, output_type,
        )  # fmt: skip
        self.record.calls[-1] = given
        return made


class Editing(FakePipeline):
    """Makes images from images alone: the mean of all colours that it is given, however many, and
    above it the first pixel's row of a second argument. It takes no prompt."""

    def __call__(  # type: ignore[override]
        self,
        image: Image.Image | list[Image.Image],
        height: int | None = None,
        width: int | None = None,
        guide_image: Image.Image | None = None,
        num_inference_steps: int = 4,
        num_images_per_prompt: int = 1,
        generator: list[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> SimpleNamespace:
        given = {
            name: value for name, value in locals().items() if name not in ("self", "__class__")
        }
        images = image if isinstance(image, list) else [image]
        made = super().__call__(
            "", None, height, width, num_inference_steps, 1.0,
            num_images_per_prompt, generator, output_type,
        )  # fmt: skip
        self.record.calls[-1] = given
        colour = np.mean([np.asarray(one).mean((0, 1)) for one in images], axis=0)
        for one in made.images:
            one.paste(tuple(round(part) for part in colour), (0, ROWS, *one.size))
            if guide_image is not None:
                one.paste(guide_image.getpixel((0, 0)), (0, 0, one.width, ROWS))
        return made


def colour(name: str, size: tuple[int, int] = (64, 64)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, name).save(file, "PNG")
    return file.getvalue()


def url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def error(answer: httpx.Response) -> tuple[int, str, str]:
    told = answer.json()["error"]
    return answer.status_code, told["param"], told["message"]


def made(answer: httpx.Response) -> Image.Image:
    assert answer.status_code == 200, answer.text
    content = answer.content
    if answer.headers["content-type"].startswith("application/json"):
        content = base64.b64decode(answer.json()["data"][0]["b64_json"])
    return Image.open(io.BytesIO(content)).convert("RGB")


def details(app: InProcess) -> dict[str, Any]:
    found: dict[str, Any] = app.client.get("/v1/models").json()["data"][0]["stepweave"]
    return found


def details_id(app: InProcess) -> str:
    return str(app.client.get("/v1/models").json()["data"][0]["id"])


@pytest.fixture
def own(in_process: Make) -> InProcess:
    return in_process(Own(), max_images=4, max_steps=50, warmup=False)


@pytest.fixture
def editing(in_process: Make) -> InProcess:
    return in_process(Editing())


VALUES: dict[str, tuple[Any, Any]] = {  # as they are sent, and as the pipeline is given them
    "true_cfg_scale": (3, 3.0),
    "clip_skip": (2, 2),
    "tiled": (True, True),
    "layers": (3, 3),
    "original_size": ([64, 32], (64, 32)),
    "sigmas": ([1.0, 0.5], [1.0, 0.5]),
    "edit_threshold": ([0.5, 0.25], [0.5, 0.25]),
    "phrases": (["ring", "7"], ["ring", "7"]),
}


@pytest.mark.parametrize("name", VALUES)
def test_an_argument_is_passed_by_the_pipelines_name(own: InProcess, name: str) -> None:
    sent, passed = VALUES[name]
    answer = own.post(**{name: sent})
    assert answer.status_code == 200, answer.text
    call = own.pipeline.record.calls[-1]
    assert call[name] == passed and type(call[name]) is type(passed)
    assert answer.json()["parameters"][name] == sent
    others = set(VALUES) - {name}
    defaults = {
        "true_cfg_scale": 4.0, "clip_skip": None, "tiled": False, "layers": 2,
        "original_size": None, "sigmas": None, "edit_threshold": 0.9, "phrases": None,
    }  # fmt: skip
    assert {other: call[other] for other in others} == {one: defaults[one] for one in others}


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("true_cfg_scale", 101, "less than or equal to 100"),
        ("true_cfg_scale", "4", "valid number"),
        ("true_cfg_scale", True, "valid number"),
        ("clip_skip", -1, "greater than or equal to 0"),
        ("clip_skip", 1.5, "valid integer"),
        ("tiled", 1, "valid boolean"),
        ("layers", 5, "less than or equal to 4"),
        ("original_size", [1], "at least 2 items"),
        ("original_size", [10**6, 1], "less than or equal to"),
        ("sigmas", [], "at least 1 item"),
        ("sigmas", [0.5] * 51, "at most 50 items"),
        ("edit_threshold", 2, "less than or equal to 1"),
        ("phrases", ["x" * 40_001], "at most"),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_name(
    own: InProcess, name: str, value: Any, told: str
) -> None:
    before = len(own.pipeline.record.calls)
    status, param, message = error(own.post(**{name: value}))
    assert (status, param) == (400, name)
    assert message.startswith(f"{name} is ") and told in message
    assert len(own.pipeline.record.calls) == before


@pytest.mark.parametrize(
    "name", ["latents", "callback_on_step_end", "cross_attention_kwargs", "generator"]
)
def test_what_is_no_value_cannot_be_sent(own: InProcess, name: str) -> None:
    assert error(own.post(**{name: [1]}))[:2] == (400, name)


def test_an_unknown_name_is_refused_with_one_that_is_like_it(own: InProcess) -> None:
    assert error(own.post(clip_skp=1)) == (
        400, "clip_skp", "Unknown field 'clip_skp' (did you mean clip_skip?)."
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("steps", "(did you mean num_inference_steps?)"),
        ("width", "(did you mean size?)"),
        ("num_images_per_prompt", "(did you mean n?)"),
        ("sampler", "(did you mean scheduler?)"),
        ("callback_on_step_end", "requests send texts, numbers, flags, images and some tensors"),
        ("cross_attention_kwargs", "requests send texts, numbers, flags, images and some tensors"),
    ],
)
def test_names_of_others_are_known(own: InProcess, name: str, told: str) -> None:
    assert told in error(own.post(**{name: 1}))[2]


def test_work_that_is_multiplied_counts_as_images(own: InProcess) -> None:
    assert own.post(n=2, layers=4).status_code == 200
    status, param, message = error(own.post(n=3, layers=4))
    assert (status, param) == (
        400,
        "n",
    ) and "as much as that of 6 images; the limit is 4" in message


def test_a_list_of_sigmas_is_the_number_of_steps(own: InProcess) -> None:
    answer = own.post(sigmas=[1.0, 0.7, 0.3])
    assert answer.json()["parameters"]["num_inference_steps"] == 3
    status, param, message = error(own.post(sigmas=[1.0, 0.7, 0.3], num_inference_steps=4))
    assert (status, param) == (400, "num_inference_steps") and "sigmas has 3 elements" in message


class Scheduled(FakePipeline):
    """With a number for each of its usual steps."""

    def __call__(  # type: ignore[override]
        self,
        prompt: str,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 4,
        guidance_schedule: list = (7.0, 7.0, 7.0, 3.0),  # type: ignore[type-arg,assignment]
        num_images_per_prompt: int = 1,
        generator: list[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> SimpleNamespace:
        made = super().__call__(
            prompt, None, height, width, num_inference_steps, 1.0,
            num_images_per_prompt, generator, output_type,
        )  # fmt: skip
        self.record.calls[-1]["guidance_schedule"] = guidance_schedule
        return made


def test_a_schedule_of_the_usual_steps_fits_those_of_the_request(in_process: Make) -> None:
    app = in_process(Scheduled(), warmup=False)
    schedules = {
        8: (7.0, 7.0, 7.0, 7.0, 7.0, 7.0, 3.0, 3.0),
        4: (7.0, 7.0, 7.0, 3.0),
        2: (7.0, 7.0),
    }
    for steps, expected in schedules.items():
        assert app.post(num_inference_steps=steps).status_code == 200
        assert app.pipeline.record.calls[-1]["guidance_schedule"] == expected
    assert app.post(num_inference_steps=2, guidance_schedule=[5, 6]).status_code == 200
    assert app.pipeline.record.calls[-1]["guidance_schedule"] == [5.0, 6.0]


def test_values_that_the_pipeline_fails_with_are_the_requests_fault(own: InProcess) -> None:
    assert own.post().status_code == 200
    status, param, message = error(own.post(clip_skip=13))
    assert (status, param) == (400, "clip_skip")
    assert message == "The pipeline fails with these values (IndexError): clip_skip=13."


def test_the_model_says_what_it_takes(own: InProcess) -> None:
    found = {one.pop("name"): one for one in details(own)["arguments"]}
    assert set(found) == {*VALUES, "latents"}
    assert found["layers"] == {
        "type": "integer", "required": False, "default": 2, "minimum": 1, "maximum": 4,
        "max_items": None, "max_length": None, "description": "",
    }  # fmt: skip
    assert found["sigmas"]["type"] == "array" and found["sigmas"]["max_items"] == 50


def test_the_document_has_them(own: InProcess) -> None:
    schemas = own.client.get("/openapi.json").json()["components"]["schemas"]
    for name in ("GenerationRequest", "ImageRequest", "StreamRequest"):
        properties = schemas[name]["properties"]
        assert set(VALUES) <= set(properties)
        assert properties["layers"]["anyOf"][0] == {"maximum": 4, "minimum": 1, "type": "integer"}
        assert schemas[name]["additionalProperties"] is False


def test_a_preset_sets_a_default_and_bounds(in_process: Make) -> None:
    preset = {"call": {"clip_skip": 3}, "limits": {"layers": [1, 2], "tiled": False}}
    app = in_process(Own(), warmup=False, preset=json.dumps(preset))
    assert app.post().status_code == 200
    assert app.pipeline.record.calls[-1]["clip_skip"] == 3
    assert app.post(clip_skip=1).status_code == 200
    assert app.pipeline.record.calls[-1]["clip_skip"] == 1
    assert "less than or equal to 2" in error(app.post(layers=3))[2]
    assert error(app.post(tiled=True))[2].startswith("Unknown field 'tiled'")


# --- what has no effect ---


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"negative_prompt": "x", "true_cfg_scale": 1.0},
         "negative_prompt: it has no effect without guidance; true_cfg_scale is 1."),
        ({"true_cfg_scale": 3.0}, "true_cfg_scale: it has no effect without negative_prompt"),
        ({"prompt": "a (large:1.3) ring"}, "prompt: '(large:1.3)' is passed to the model as it is"),
        ({"prompt": "a ring <lora:pastel:0.5>"}, "named in the field lora, as 'pastel' or"),
        ({"negative_prompt": "<Lora: pale>"}, "negative_prompt: '<Lora: pale>' is passed to"),
        ({"partial_images": 2}, NO_STREAM),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_told(own: InProcess, fields: dict[str, Any], told: str) -> None:
    warnings = own.post(**fields).json()["warnings"]
    assert len(warnings) == 1 and told in warnings[0]
    assert own.post(negative_prompt="x").json()["warnings"] == []


# --- images ---


def test_a_pipeline_that_needs_images_is_ready_and_refuses_generations(editing: InProcess) -> None:
    assert editing.client.get("/readyz").status_code == 200
    status, param, message = error(editing.client.post(GENERATIONS, json={}))
    assert (status, param) == (400, "image")
    assert message.startswith("image is missing: Editing makes images from image. Send ")
    assert details(editing)["generations"] is False
    assert details(editing)["edits"] == ["image_to_image"]
    assert [
        (one["name"], one["required"], one["several"]) for one in details(editing)["images"]
    ] == [
        ("image", True, True),
        ("guide_image", False, False),
    ]


def test_images_come_by_their_names_one_or_several(editing: InProcess) -> None:
    files = [
        ("image[]", ("a.png", colour("red", (32, 16)), "image/png")),
        ("image[]", ("b.png", colour("blue", (64, 64)), "image/png")),
        ("guide_image", ("c.png", colour("lime"), "image/png")),
    ]
    image = made(editing.client.post(EDITS, data={"size": "64x64"}, files=files))
    assert image.getpixel((5, 60)) == (128, 0, 128) and image.getpixel((5, 2)) == (0, 255, 0)
    call = editing.pipeline.record.calls[-1]
    assert [one.size for one in call["image"]] == [(32, 16), (64, 64)], (
        "references stay as they are"
    )
    assert "prompt" not in call


IN_JSON = {
    "image": [url(colour("red")), {"image_url": url(colour("blue"))}],
    "guide_image": url(colour("lime")),
    "size": "64x64",
}


@pytest.mark.parametrize("path", [EDITS, GENERATIONS])
def test_images_come_as_data_urls_in_json(editing: InProcess, path: str) -> None:
    image = made(editing.client.post(path, json=IN_JSON))
    assert image.getpixel((5, 60)) == (128, 0, 128) and image.getpixel((5, 2)) == (0, 255, 0)


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/edit", "/generate"])
async def test_native_routes_have_images_in_json(path: str) -> None:
    async with serving(Editing(), warmup=True) as app:
        natively(app)
        content = json.dumps(IN_JSON).encode()
        sent = app.send("POST", path, content, {"Content-Type": "application/json"})
        answer = await sent.done()
        assert answer.status == 200, answer.content
        image = Image.open(io.BytesIO(answer.content)).convert("RGB")
        assert image.getpixel((5, 60)) == (128, 0, 128) and image.getpixel((5, 2)) == (0, 255, 0)


def test_openais_json_names_images(editing: InProcess) -> None:
    body = {"images": [{"image_url": url(colour("red"))}, {"image_url": url(colour("blue"))}]}
    assert made(editing.client.post(EDITS, json=body)).getpixel((5, 60)) == (128, 0, 128)


@pytest.mark.parametrize(
    "image",
    ["https://example.com/a.png", "file:///etc/passwd", "/etc/passwd", "data:text/plain,x", ""],
)
def test_a_url_is_never_fetched(editing: InProcess, image: str) -> None:
    status, param, message = error(editing.client.post(EDITS, json={"image": image}))
    assert (status, param) == (400, "image") and "this server fetches none" in message


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"no image", "is no PNG, JPEG or WebP image"),
        (colour("red")[:60], "corrupt or cut short"),
        (b"", "empty"),
    ],
)
@pytest.mark.parametrize("name", ["image", "guide_image"])
def test_a_damaged_image_is_refused_by_its_name(
    editing: InProcess, name: str, content: bytes, told: str
) -> None:
    body = {"image": url(colour("red")), name: url(content)}
    status, param, message = error(editing.client.post(EDITS, json=body))
    assert (status, param) == (400, name) and told in message
    status, param, message = error(
        editing.client.post(EDITS, json={"image": [url(colour("red")), url(content)]})
    )
    assert (status, param) == (400, "image[1]")


def test_too_many_images_and_pixels_are_refused(in_process: Make) -> None:
    app = in_process(Editing(), max_input_pixels=64 * 64)
    many = [("image[]", ("a.png", colour("red", (8, 8)), "image/png"))] * 17
    assert error(app.client.post(EDITS, files=many)) == (
        400, "image", "image is given more than 16 times; the limit is 16."
    )  # fmt: skip
    two = [("image[]", ("a.png", colour("red", (64, 40)), "image/png"))] * 2
    status, param, message = error(app.client.post(EDITS, files=two))
    assert (status, param) == (400, "image[1]") and "pixels" in message
    guides = [("guide_image", ("a.png", colour("red", (8, 8)), "image/png"))] * 2
    one = ("image", ("a.png", colour("red", (8, 8)), "image/png"))
    assert error(app.client.post(EDITS, files=[one, *guides])) == (
        400, "guide_image", "guide_image is given 2 times; Editing takes one."
    )  # fmt: skip


@pytest.mark.parametrize("part", ["[]", "{}", '{"image_url":1}', "1", '"x"'])
@pytest.mark.parametrize("path", [EDITS, "/edit", "/v1/images/generations", "/v2/models/{}/infer"])
def test_a_body_of_far_too_many_parts_is_refused_before_it_is_read(
    editing: InProcess, path: str, part: str
) -> None:
    """Compressed it is tiny, and each part would become objects and errors."""
    body = b'{"prompt": "x", "image": [' + b",".join([part.encode()] * 40_000) + b"]}"
    with patch("stepweave.api.schemas.from_json", side_effect=AssertionError("it was read")):
        answer = editing.client.post(
            path.format(details_id(editing)),
            content=gzip.compress(body),
            headers={"Content-Type": "application/json", "Content-Encoding": "gzip"},
        )
    assert answer.status_code == 400 and "the limit is 20000" in answer.text


def test_only_the_first_of_many_wrong_images_is_looked_at() -> None:
    body = b'{"prompt": "x", "image": [' + b",".join([b"[]"] * 5000) + b"]}"
    with pytest.raises(ValidationError) as caught:
        EditBody.model_validate_json(body)
    assert caught.value.error_count() < 10


def test_a_presets_bounds_of_sigmas_leave_their_number_as_it_is(in_process: Make) -> None:
    preset = json.dumps({"limits": {"sigmas": [0, 1]}})
    app = in_process(Own(), warmup=False, preset=preset, max_steps=16)
    found = {one["name"]: one for one in details(app)["arguments"]}["sigmas"]
    assert (found["maximum"], found["max_items"]) == (1, 16)
    status, param, _ = error(app.post(sigmas=[0.5] * 17))
    assert (status, param) == (400, "sigmas")


def test_a_list_may_come_in_as_many_fields_as_it_may_have_elements(in_process: Make) -> None:
    app = in_process(OwnEdits(), warmup=False)
    parts: list[Any] = [("prompt", (None, "x")), ("image", ("a.png", colour("red"), "image/png"))]
    parts += [("sigmas", (None, str(1 - step / 200))) for step in range(100)]
    answer = app.client.post(EDITS, files=parts)
    assert "Too many fields" not in answer.text


def test_an_unknown_file_is_refused_with_one_that_is_like_it(editing: InProcess) -> None:
    files = {"guide_img": ("a.png", colour("red"), "image/png")}
    status, param, message = error(editing.client.post(EDITS, files=files))
    assert (status, param) == (400, "guide_img") and "did you mean guide_image?" in message


def test_a_prompt_that_is_not_taken_is_told(editing: InProcess) -> None:
    body = {"image": url(colour("red")), "prompt": "a ring"}
    assert editing.client.post(EDITS, json=body).json()["warnings"] == [
        "prompt: it has no effect: Editing takes none."
    ]


def test_jobs_have_images_too(editing: InProcess) -> None:
    body = {"image": [url(colour("red")), url(colour("blue"))]}
    answer = editing.client.post(EDITS, json=body, headers={"Prefer": "respond-async"})
    assert answer.status_code == 202
    place = answer.headers["location"]
    wait_until(lambda: editing.client.get(place).json()["state"] == "succeeded")
    job = editing.client.get(place).json()
    content = base64.b64decode(job["result"]["data"][0]["b64_json"])
    assert Image.open(io.BytesIO(content)).convert("RGB").getpixel((5, 60)) == (128, 0, 128)


def test_the_open_inference_protocol_has_them(editing: InProcess, in_process: Make) -> None:
    model = editing.client.get("/v2/models").json()["models"][0]
    inputs = editing.client.get(f"/v2/models/{model}").json()["inputs"]
    assert {"image", "guide_image"} <= {one["name"] for one in inputs}
    images = [base64.b64encode(colour(name)).decode() for name in ("red", "blue")]
    body = {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1, 2], "data": [images]}]}
    answer = editing.client.post(f"/v2/models/{model}/infer", json=body)
    assert answer.status_code == 200, answer.text
    [image, _] = answer.json()["outputs"]
    content = base64.b64decode(image["data"][0])
    assert Image.open(io.BytesIO(content)).convert("RGB").getpixel((5, 60)) == (128, 0, 128)


def test_flags_and_numbers_are_inputs_of_the_open_inference_protocol(own: InProcess) -> None:
    model = own.client.get("/v2/models").json()["models"][0]
    inputs = [
        {"name": "prompt", "datatype": "BYTES", "shape": [2], "data": ["a", "b"]},
        {"name": "tiled", "datatype": "BOOL", "shape": [2], "data": [True, False]},
        {"name": "clip_skip", "datatype": "INT32", "shape": [1], "data": [2]},
    ]
    body = {"inputs": inputs, "parameters": {"original_size": [64, 32]}}
    answer = own.client.post(f"/v2/models/{model}/infer", json=body)
    assert answer.status_code == 200, answer.text
    calls = {call["prompt"]: call for call in own.pipeline.record.calls[-2:]}
    assert (calls["a"]["tiled"], calls["b"]["tiled"]) == (True, False)
    assert all(call["clip_skip"] == 2 for call in calls.values())
    assert all(call["original_size"] == (64, 32) for call in calls.values())


@pytest.mark.parametrize(
    "fields",
    [
        [("edit_threshold", "[0.5, 0.25]")],
        [("edit_threshold", "0.5"), ("edit_threshold", "0.25")],
        [("edit_threshold[]", "0.5"), ("edit_threshold[]", "0.25")],
    ],
)
def test_lists_in_forms_are_json_or_come_one_by_one(
    in_process: Make, fields: list[tuple[str, str]]
) -> None:
    app = in_process(OwnEdits(), warmup=False)
    parts: list[Any] = [(name, (None, text)) for name, text in fields]
    parts += [("tiled", (None, "true")), ("clip_skip", (None, "2")), ("prompt", (None, "x"))]
    parts += [("image", ("a.png", colour("red"), "image/png"))]
    answer = app.client.post(EDITS, files=parts)
    assert answer.status_code == 200, answer.text
    call = app.pipeline.record.calls[-1]
    assert (call["edit_threshold"], call["tiled"], call["clip_skip"]) == ([0.5, 0.25], True, 2)


def test_a_list_in_a_form_that_is_neither_is_told_how(in_process: Make) -> None:
    app = in_process(OwnEdits(), warmup=False)
    parts: list[Any] = [("prompt", (None, "x")), ("edit_threshold", (None, "0.5,0.25"))]
    parts += [("image", ("a.png", colour("red"), "image/png"))]
    status, param, message = error(app.client.post(EDITS, files=parts))
    assert (status, param) == (400, "edit_threshold") and "send a list as JSON" in message


class OwnEdits(Own):
    """Takes an image, too."""

    def __call__(  # type: ignore[override]
        self,
        prompt: str | None = None,
        image: Image.Image | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 4,
        clip_skip: int | None = None,
        tiled: bool = False,
        edit_threshold: float | list[float] = 0.9,
        num_images_per_prompt: int = 1,
        generator: list[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> SimpleNamespace:
        return super().__call__(
            prompt, height=height, width=width, num_inference_steps=num_inference_steps,
            clip_skip=clip_skip, tiled=tiled, edit_threshold=edit_threshold,
            num_images_per_prompt=num_images_per_prompt, generator=generator,
        )  # fmt: skip


def test_strength_without_an_image_is_refused_on_every_route(editing: InProcess) -> None:
    app = editing
    model = app.client.get("/v2/models").json()["models"][0]
    for path, body in (
        (GENERATIONS, {"strength": 0.5}),
        (f"/v2/models/{model}/infer", {"inputs": [], "parameters": {"strength": 0.5}}),
    ):
        answer = app.client.post(path, json=body)
        assert answer.status_code == 400, answer.text
        assert "image is missing" in answer.text


def test_strength_is_not_ignored_by_a_model_of_both(in_process: Make) -> None:
    app = in_process(FakePipeline(edits=True))
    status, param, message = error(app.post(strength=0.5))
    assert (status, param) == (400, "strength") and "no image is given" in message


@pytest.mark.parametrize("name", ["mask", "mask_image"])
def test_a_mask_in_json_has_either_name(in_process: Make, name: str) -> None:
    app = in_process(FakePipeline(edits=True))
    body = {"prompt": "x", "image": url(colour("red")), name: url(colour("white"))}
    answer = app.client.post(EDITS, json=body)
    assert answer.status_code == 200, answer.text
    assert app.pipeline.record.calls[-1]["mask_image"] is not None
    both = {**body, "mask": url(colour("white")), "mask_image": url(colour("white"))}
    assert error(app.client.post(EDITS, json=both))[:2] == (400, "mask")


def test_texts_and_lists_are_not_in_headers(own: InProcess) -> None:
    fields = {"phrases": ["\u65e5\u672c"], "sigmas": [1.0, 0.5], "clip_skip": 2}
    body = {"prompt": "x", **fields}
    answer = own.client.post(GENERATIONS, json=body, headers={"Accept": "image/png"})
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-stepweave-clip-skip"] == "2"
    assert not {"x-stepweave-phrases", "x-stepweave-sigmas"} & set(answer.headers)
    chunk = Image.open(io.BytesIO(answer.content)).text["stepweave"]  # type: ignore[attr-defined]
    assert json.loads(chunk)["phrases"] == fields["phrases"]


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ({"num_inference_steps": [1, 8]}, "num_inference_steps is not an argument that it can"),
        ({"layers": [4, 1]}, "the first is the least"),
        ({"phrases": [1, 2]}, "phrases is no number: it may be false"),
        ({"layer": [1, 2]}, "did you mean 'layers'?"),
    ],
)
def test_limits_of_a_preset_that_have_no_meaning_are_refused(limits: Any, told: str) -> None:
    with pytest.raises(LoadError) as caught:
        preset = parsed(json.dumps({"limits": limits}).encode()).named("stepweave.json")
        ServedModel(Own(), preset, Settings())
    assert told in caught.value.message
    assert caught.value.message.startswith(f"stepweave.json: limits.{next(iter(limits))}")


def test_of_the_open_inference_protocol_there_may_be_no_inputs_and_few_images(
    editing: InProcess,
) -> None:
    model = editing.client.get("/v2/models").json()["models"][0]
    path = f"/v2/models/{model}/infer"
    assert editing.client.post(path, json={"inputs": []}).status_code == 400
    image = base64.b64encode(colour("red", (8, 8))).decode()
    given = {"name": "image", "datatype": "BYTES", "shape": [1, 17], "data": [[image] * 17]}
    answer = editing.client.post(path, json={"inputs": [given]})
    assert answer.status_code == 400 and "17 files for an image; the limit is 16" in answer.text


# --- BentoML's own description ---


def test_bentomls_clients_are_told_of_arguments_and_images(
    editing: InProcess, own: InProcess
) -> None:
    def schema(app: InProcess) -> dict[str, Any]:
        return with_model(copy.deepcopy(BENTOMLS), app.server.fields)

    generate, edit = (route["input"] for route in schema(own)["routes"])
    assert set(VALUES) <= set(generate["properties"]) and set(VALUES) <= set(edit["properties"])
    assert generate["required"] == ["prompt"]
    generate, edit = (route["input"] for route in schema(editing)["routes"])
    assert (generate["required"], edit["required"]) == ([], [])
    assert edit["properties"]["guide_image"]["type"] == "file"
    assert edit["properties"]["images"]["type"] == "array"
    assert {"type": "string"} in generate["properties"]["guide_image"]["anyOf"], "no file in JSON"
    assert "strength" in generate["properties"]
    assert edit["properties"]["image"] == FILE, "what BentoML says of its own stays"


FILE = {"type": "file", "format": "image"}
BENTOMLS: dict[str, Any] = {
    "name": "stepweave",
    "routes": [
        {
            "route": "/generate",
            "input": {"properties": {"prompt": {"type": "string"}}, "required": ["prompt"]},
        },
        {
            "route": "/edit",
            "input": {
                "properties": {"prompt": {"type": "string"}, "image": FILE},
                "required": ["prompt", "image"],
            },
        },
    ],
}
