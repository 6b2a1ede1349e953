"""Pipelines that are saved, loaded by the server, and asked over HTTP: some of every kind, and in
the full run all; that none is forgotten, and that the comparison finds what differs."""

from __future__ import annotations

import asyncio
import base64
import inspect
import io
import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load
from starlette.requests import Request

from tests.pipelines.catalog import entries
from tests.pipelines.document import section_of, with_section
from tests.pipelines.registry import ABSENT, Entry, example_image, mask
from tests.served.candidates import options
from tests.served.check import Report, compare
from tests.served.document import section, share
from tests.served.entries import NOT_IMAGES, NOT_SERVED, excluded, served
from tests.served.plain import Case, as_array
from tests.served.requests import Answer, NotAskedError, ask, check_sayable
from tests.served.run import RUNS, run
from tests.served.run import load as load_report
from tests.support.environment import ROOT

ENTRIES = served()
LEAST_SHARE = 0.95
# one of every kind of input and result
SOME = (  # of all, which the full test runs
    "flux_kontext",  # an instruction
    "marigold_depth",
    "ddpm",  # neither prompt nor image
    "dit",  # class labels
    "flux_modular",  # inputs that blocks declare
    "kandinsky_v22_img2img",  # tensors
)


# Which are asked


def test_what_is_not_asked_is_there_and_has_one_reason() -> None:
    modules = {entry.module for entry in entries().values()}
    assert set(NOT_IMAGES) <= modules
    assert set(NOT_SERVED) <= set(entries())
    assert [name for name in NOT_SERVED if entries()[name].module in NOT_IMAGES] == []
    assert len(ENTRIES) + len(excluded()) == len(entries())


def test_only_what_makes_no_images_is_left_out() -> None:
    assert set(NOT_SERVED.values()) == {"it makes sound", "its results are embeddings"}


# What is sent, and what is wrong with an answer


def sent(case: Case, preset: tuple[str, ...] = ()) -> httpx.Request:
    """The request of a case."""
    requests: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(400, json={"error": {"message": "no"}})

    async def send() -> Answer:
        transport = httpx.MockTransport(answer)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await ask(client, case, preset)

    assert asyncio.run(send()).error == "400 no"
    return requests[0]


def test_a_request_without_images_is_json_without_what_the_preset_says() -> None:
    arguments = {"prompt": "a", "width": 32, "height": 16, "eta": 0.5, "clean_caption": False}
    request = sent(Case("call 1", arguments, seed=7, n=2), ("clean_caption",))
    assert request.url.path == "/v1/images/generations"
    assert json.loads(request.content) == {
        "prompt": "a", "size": "32x16", "eta": 0.5, "seed": 7, "n": 2
    }  # fmt: skip
    request = sent(Case("clean_caption", arguments, seed=7), ("clean_caption",))
    assert json.loads(request.content)["clean_caption"] is False


def test_a_request_with_images_is_a_form() -> None:
    images = [example_image(1), example_image(2)]
    arguments = {"image": images, "mask_image": mask(0), "sigmas": [1.0, 0.5], "flag": True}
    request = sent(Case("call 0", arguments, seed=3))
    assert request.url.path == "/v1/images/edits"
    parts = parts_of(request)
    fields = {name: value for name, value in parts if isinstance(value, str)}
    assert fields == {"sigmas": "[1.0, 0.5]", "flag": "true", "seed": "3"}
    files = [(name, value) for name, value in parts if isinstance(value, bytes)]
    assert [name for name, _ in files] == ["image[]", "image[]", "mask"]
    for (_, content), image in zip(files, [*images, mask(0)], strict=True):
        assert np.array_equal(as_array(Image.open(io.BytesIO(content))), as_array(image))


def test_a_tensor_is_a_file_of_a_form_or_base64_in_json() -> None:
    arguments = {"image_embeds": torch.ones(1, 2), "mask_image": torch.ones(1, 4, 4)}
    parts = dict(parts_of(sent(Case("call 0", arguments, seed=3))))
    assert isinstance(parts["image_embeds"], bytes) and isinstance(parts["mask"], bytes)
    assert torch.equal(load(parts["image_embeds"])["image_embeds"], torch.ones(1, 2))
    assert Image.open(io.BytesIO(parts["mask"])).getextrema() == (255, 255)
    del arguments["mask_image"]
    body = json.loads(sent(Case("call 0", arguments, seed=3)).content)
    file = base64.b64decode(body["image_embeds"])
    assert torch.equal(load(file)["image_embeds"], torch.ones(1, 2))


def parts_of(request: httpx.Request) -> list[tuple[str, str | bytes]]:
    """The fields of a form, and the contents of its files."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": request.content, "more_body": False}

    async def parse() -> list[tuple[str, str | bytes]]:
        headers = [(name.lower(), value) for name, value in request.headers.raw]
        async with Request({"type": "http", "headers": headers}, receive).form() as form:
            return [
                (name, value if isinstance(value, str) else await value.read())
                for name, value in form.multi_items()
            ]

    return asyncio.run(parse())


def test_what_no_request_can_say_is_named() -> None:
    with pytest.raises(NotAskedError, match="lists of lists of images: image"):
        check_sayable(Case("call 0", {"image": [[example_image(0), None]]}, 0))
    check_sayable(Case("call 0", {"image": [example_image(0)], "boxes": [[0.1]]}, 0))


def test_answers_are_compared_pixel_by_pixel() -> None:
    image = np.full((2, 2, 3), 100, np.uint8)
    assert compare(Answer([image + 1]), [image]) == (1, "")
    assert compare(Answer([image - 3]), [image]) == (3, "differs by 3/255")
    assert compare(Answer([], "400 no"), [image]) == (0, "400 no")
    assert compare(Answer([image, image]), [image])[1].startswith("2 images (2x2x3, 2x2x3) inst")
    grey = as_array(Image.new("L", (2, 2), 100))
    assert compare(Answer([grey]), [image]) == (0, "")
    assert as_array(Image.new("LA", (2, 2))).shape == (2, 2, 4)


def test_a_report_is_right_only_if_every_answer_is() -> None:
    assert Report("a", "A", merged_share=0.5, largest_error=1).right
    assert not Report("a", "A", library="ValueError").right
    assert not Report("a", "A", failed="it does not start").right
    assert not Report("a", "A", wrong=("call 0, alone: 400",)).right
    assert not Report("a", "A", errors=1).right


# Which further inputs there are


class Toy:
    """In place of `Plain`: each argument does what its name says."""

    def makes_several(self, case: Case) -> bool:
        return True

    def __init__(self) -> None:
        self.loaded = self.broken = 0
        self.parameters = inspect.signature(Toy.call).parameters

    def call(
        self,
        prompt: str,
        width: int,
        height: int,
        changes: float = 0.5,
        only_3: int = 1,
        flips: bool = True,
        does_nothing: bool = False,
        breaks: int | None = None,
        draws: bool = False,
        mask_image: Any | None = None,
        latents: Any = None,
        sigmas: list[float] | None = None,
        use_resolution_binning: bool = True,
        num_images_per_prompt: int = 1,
    ) -> np.ndarray:
        if breaks is not None or self.broken:
            self.broken += 1
            raise ValueError
        drawn = next(DRAWS) if draws else 0
        value = changes + (only_3 == 3) + 2 * flips + drawn + 5 * (mask_image is not None)
        return np.full((height, width, 3), value + 7 * len(sigmas or ()))

    def images(self, case: Case) -> list[np.ndarray]:
        return [self.call(**case.arguments)] * case.n

    def load(self) -> None:
        self.loaded, self.broken = self.loaded + 1, 0


DRAWS = itertools.count(100)


def test_further_inputs_are_those_that_change_the_plain_call() -> None:
    arguments = {"prompt": "a", "width": 16, "height": 8}
    entry = Entry("toy", "Toy", "", "", lambda: None, {"num_inference_steps": ABSENT, **arguments})
    base, toy = Case("call 0", arguments, 0), Toy()
    found = options(entry, toy, base, toy.images(base))  # type: ignore[arg-type]
    assert [each.name for each, _ in found.cases] == [
        "changes", "only_3", "flips", "mask_image", "sigmas", "size", "n"
    ]  # fmt: skip
    cases = {each.name: each for each, _ in found.cases}
    assert cases["changes"].arguments == {**arguments, "changes": 0.75}
    assert cases["only_3"].arguments["only_3"] == 3
    assert cases["size"].arguments == {"prompt": "a", "width": 32, "height": 8}
    assert cases["n"].n == 2
    for each, images in found.cases:
        assert all(map(np.array_equal, toy.images(each), images))
    assert found.no_effect == ["prompt", "does_nothing"]
    assert (found.refused, found.random) == (["breaks"], ["draws"])
    assert toy.loaded > 0, "what a call has broken is loaded again"


# The document


def test_the_section_has_a_row_for_each_report_and_leaves_the_rest_of_the_document() -> None:
    reports = [
        Report("good", "A", merged_share=0.834, largest_error=1, asked=("eta",), refused=("n",)),
        Report("odd", "B", wrong=("call 1, alone: a | b", "eta, alone: 400"), largest_error=9),
        Report("gone", "C", failed="it does not start"),
        Report("broken", "D", library="ValueError: no class"),
    ]
    text = section(reports, {"film": "it makes videos"})
    assert re.findall(r"^\| `.*$", text, re.MULTILINE) == [
        "| `good` | yes | yes | 83 % | 1 |",
        "| `odd` | yes | no: call 1, alone: a \\| b (and 1 more) | no denoiser | 9 |",
        "| `gone` | yes | no: it does not start |  |  |",
        "| `broken` | no: ValueError: no class | no: it is not loaded |  |  |",
    ]
    assert "| served | 1 (25 %) |" in text
    assert "| it makes videos | `film` |" in text
    document = with_section((ROOT / "docs/pipelines.md").read_text(), text)
    assert section_of(document) == text
    assert with_section(document, "") == with_section((ROOT / "docs/pipelines.md").read_text(), "")


def test_the_committed_section_has_a_row_for_every_entry() -> None:
    text = section_of((ROOT / "docs/pipelines.md").read_text())
    rows = re.findall(r"^\| `(\w+)` \| (?:yes|no)", text, re.MULTILINE)
    assert sorted(rows) == sorted(ENTRIES), "run `python -m tests.served --write`"


# Runs


@pytest.mark.parametrize("name", SOME)
def test_some_of_every_kind_are_served(tmp_path: Path, name: str) -> None:
    (report,) = run([name], tmp_path)
    assert report.right, (report, (tmp_path / f"{name}.log").read_text()[-2000:])
    assert load_report(name, tmp_path) == report


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the reports of this run are kept, by all of its processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "served"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ENTRIES)
def test_every_entry_is_asked(name: str, folder: Path) -> None:
    """Whatever comes of it: how many are served is asserted of all."""
    (report,) = run([name], folder)
    assert not report.failed.startswith(("took", "its process ended")), report
    assert not report.errors, report


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_nearly_all_are_served(folder: Path, request: pytest.FixtureRequest) -> None:
    test = test_every_entry_is_asked.__name__
    reports = RUNS.reports(ENTRIES, folder, request.session.items, test)
    assert share(reports) >= LEAST_SHARE, [one.name for one in reports if not one.right]
