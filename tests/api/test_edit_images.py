"""Edits of images that people have, over HTTP: large, turned, of wide gamuts, of other kinds."""

from __future__ import annotations

import base64
import functools
import io
import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from stepweave.config.preset import Preset
from tests.support import colour_profiles as profiles
from tests.support.fake_pipeline import FakePipeline
from tests.support.in_process import InProcess
from tests.support.served import Served
from tests.support.waiting import SECONDS

EDITS = "/v1/images/edits"
BOTH = (EDITS, "/edit")
PHOTO = (4000, 3000)  # a phone's
PHONES = 1024 * 768  # pixels that the fake makes at most
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)

Make = Callable[..., InProcess]


def file_of(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def scene(size: tuple[int, int]) -> Image.Image:
    """Red above left, green above right, blue below: so it is seen which way up it is."""
    image = Image.new("RGB", size, (0, 0, 200))
    image.paste((200, 0, 0), (0, 0, size[0] // 2, size[1] // 2))
    image.paste((0, 200, 0), (size[0] // 2, 0, size[0], size[1] // 2))
    return image


@functools.cache
def portrait(profile: bytes = b"") -> bytes:
    """A phone's JPEG that was taken upright: it is stored lying, with an orientation."""
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = scene(PHOTO[::-1]).transpose(Image.Transpose.ROTATE_90)
    assert lying.size == PHOTO
    return file_of(lying, "JPEG", quality=90, exif=exif, icc_profile=profile)


def keeps_all(size: tuple[int, int]) -> bytes:
    return file_of(Image.new("L", size, 0))


def edit(app: InProcess, image: bytes, mask: bytes | None = None, **fields: str) -> httpx.Response:
    files = {"image": ("x", image)} | ({} if mask is None else {"mask": ("x", mask)})
    return app.client.post(EDITS, data={"prompt": "x", **fields}, files=files)


def image_of(answer: Any) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))).convert("RGB")


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    """The middles of its upper left, upper right and lower half."""
    width, height = image.size
    places = (
        (width // 4, height // 4),
        (3 * width // 4, height // 4),
        (width // 2, 3 * height // 4),
    )
    return [image.getpixel(place) for place in places]  # type: ignore[misc]


def test_a_phones_portrait_is_turned_and_scaled_to_as_many_pixels_as_the_model_makes_itself(
    in_process: Make,
) -> None:
    """A mask that keeps all shows what the pipeline was given."""
    app = in_process(
        FakePipeline(edits=True), max_pixels=PHONES, preset=Preset(width=768, height=1024)
    )
    response = edit(app, portrait(), keeps_all((300, 400)))
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["parameters"]["size"] == "768x1024"
    assert answer["warnings"][:2] == [
        "image: it is 3000x4000, and was scaled to 768x1024.",
        "mask: it is 300x400, and was scaled to 768x1024 with the image.",
    ]
    result = image_of(answer)
    assert result.size == (768, 1024)
    assert np.abs(np.array(corners(result)) - [(200, 0, 0), (0, 200, 0), (0, 0, 200)]).max() <= 3
    small = edit(app, portrait(), size="64x96").json()
    assert small["warnings"][0] == "image: it is 3000x4000, and was scaled to 64x96."
    assert image_of(small).size == (64, 96)


def test_a_photo_of_a_wide_gamut_is_edited_in_srgb(in_process: Make) -> None:
    app = in_process(
        FakePipeline(edits=True), max_pixels=PHONES, preset=Preset(width=768, height=1024)
    )
    answer = edit(app, portrait(profiles.P3), keeps_all((30, 40))).json()
    expected = profiles.in_srgb(
        np.array([(200, 0, 0), (0, 200, 0), (0, 0, 200)]), profiles.DISPLAY_P3, profiles.linear
    )
    # JPEG's rounding, enlarged by the matrix
    assert np.abs(np.array(corners(image_of(answer))) - expected).max() <= 4
    assert not [warning for warning in answer["warnings"] if "profile" in warning]


def test_an_image_that_needs_no_change_gets_none_and_no_warning(in_process: Make) -> None:
    app = in_process(FakePipeline(edits=True))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    mask = Image.new("L", noise.size, 0)
    mask.paste(255, (0, 0, 8, 8))
    answer = edit(app, file_of(noise), file_of(mask)).json()
    assert answer["warnings"] == []
    kept = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(image_of(answer))[kept], np.asarray(noise)[kept])


def test_inputs_have_a_limit_of_their_own(in_process: Make) -> None:
    app = in_process(FakePipeline(edits=True), max_pixels=64 * 64, max_input_pixels=200 * 100)
    assert edit(app, file_of(scene((200, 100)))).status_code == 200
    for files in (
        (file_of(scene((201, 100))), None),
        (file_of(scene((100, 50))), keeps_all((202, 101))),
    ):
        response = edit(app, *files)
        assert response.status_code == 400
        error = response.json()["error"]
        assert "the limit is 20000." in error["message"] and error["param"] == (
            "mask" if files[1] else "image"
        )
    described = app.client.get("/v1/models").json()["data"][0]["stepweave"]
    assert (described["max_pixels"], described["max_input_pixels"]) == (64 * 64, 200 * 100)


def test_a_size_that_is_not_made_is_refused_as_without_an_image(in_process: Make) -> None:
    app = in_process(FakePipeline(edits=True))
    for size in ("63x64", "100000x64"):
        refused, like = edit(app, file_of(scene((64, 64))), size=size), app.post(size=size)
        assert refused.status_code == 400 and refused.json() == like.json()
    thread = edit(app, file_of(Image.new("RGB", (1, 20_000))))
    assert (
        thread.status_code == 400
        and "image is 1x20000; unless size is given" in thread.json()["error"]["message"]
    )
    assert edit(app, file_of(Image.new("RGB", (1, 20_000))), size="64x64").status_code == 200


def test_warnings_of_the_files_come_with_every_kind_of_answer(in_process: Make) -> None:
    app = in_process(FakePipeline(edits=True))
    image, says = (
        file_of(scene((300, 100)).convert("CMYK"), "JPEG"),
        "image: it is CMYK without a colour profile",
    )
    form = {"data": {"prompt": "x", "size": "64x64"}, "files": {"image": ("x", image)}}
    direct = app.client.post(EDITS, headers={"Accept": "image/png"}, **form)  # type: ignore[arg-type]
    assert says in direct.headers["X-Stepweave-Warnings"]
    stream = app.client.post(EDITS, headers={"Accept": "text/event-stream"}, **form)  # type: ignore[arg-type]
    assert says in stream.text
    job = app.client.post(EDITS, headers={"Prefer": "respond-async"}, **form)  # type: ignore[arg-type]
    assert job.status_code == 202 and any(says in warning for warning in job.json()["warnings"])


# --- on the real server ---


@pytest.mark.parametrize("path", BOTH)
def test_what_is_of_another_kind_is_415_on_every_surface(served: Served, path: str) -> None:
    good = file_of(scene((64, 64)))
    for param, files in (("image", {"image": HEIC}), ("mask", {"image": good, "mask": HEIC})):
        form = {name: ("x.heic", data, "image/heic") for name, data in files.items()}
        response = httpx.post(served.url + path, data={"prompt": "x"}, files=form, timeout=SECONDS)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (
            415,
            "unsupported_image",
            param,
        )
        assert "HEIC" in error["message"] and "PNG, JPEG or WebP" in error["message"]
    garbage = httpx.post(
        served.url + path, data={"prompt": "x"}, files={"image": ("x", b"garbage")}, timeout=SECONDS
    )
    assert garbage.status_code == 400


@pytest.mark.parametrize("path", BOTH)
def test_a_phones_photo_is_edited_on_every_surface(served: Served, path: str) -> None:
    fields = {"prompt": "a red circle", "num_inference_steps": "2", "strength": "0.5", "seed": "1"}
    files = {"image": ("x.jpg", portrait(profiles.P3)), "mask": ("x.png", keeps_all((300, 400)))}
    headers = {"Accept": "image/png"}
    response = httpx.post(
        served.url + path, data=fields, files=files, headers=headers, timeout=SECONDS
    )
    assert response.status_code == 200, response.text
    warnings = json.loads(response.headers["X-Stepweave-Warnings"])
    with Image.open(io.BytesIO(response.content)) as image:
        assert image.size == (56, 72), "as many pixels as the model makes itself"
        assert (
            warnings[0]
            == f"image: it is 3000x4000, and was scaled to {image.width}x{image.height}."
        )
        (red, _, green), (above, grass, _), (_, _, sky) = corners(image.convert("RGB"))
        assert red > 150 and grass > 150 and sky > 150 and green < 100 and above < 100, (
            "it is the right way up"
        )


@pytest.mark.parametrize("sigmas", [[1, 1], [0, 0], [0.5, 0.5, 0.2]])
def test_sigmas_that_a_scheduler_cannot_tell_apart_are_the_requests_fault(
    served: Served, sigmas: list[float]
) -> None:
    """It fails when it looks up the second step."""
    answer = httpx.post(
        f"{served.url}/v1/images/generations",
        json={"prompt": "x", "sigmas": sigmas},
        timeout=SECONDS,
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "sigmas"), error


def test_a_schedulers_own_reason_is_told(served: Served) -> None:
    body = {"prompt": "x", "sigmas": [1, 0.5], "scheduler": "FlowMatchHeunDiscreteScheduler"}
    answer = httpx.post(f"{served.url}/v1/images/generations", json=body, timeout=SECONDS)
    assert answer.status_code == 400
    assert "does not support custom sigmas" in answer.json()["error"]["message"]


def test_an_argument_of_another_kind_of_request_says_which(served: Served) -> None:
    body = {"prompt": "x", "padding_mask_crop": 4}
    answer = httpx.post(f"{served.url}/v1/images/generations", json=body, timeout=SECONDS)
    assert answer.status_code == 400
    assert "requests with a mask have it" in answer.json()["error"]["message"]


def test_the_schedulers_of_edits_are_listed_where_they_differ(served: Served) -> None:
    details = httpx.get(f"{served.url}/v1/models", timeout=SECONDS).json()["data"][0]["stepweave"]
    of_edits = details["schedulers_of_edits"]
    assert of_edits.keys() == {"image_to_image", "inpainting"}
    assert all(set(names) < set(details["schedulers"]) for names in of_edits.values())
