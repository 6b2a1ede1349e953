"""A member of JSON that is null is absent, on every route and for every field."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import BaseModel

from stepweave.api.routes.diffusers_example import DiffusersExampleRequest
from stepweave.api.schemas import LONG, GenerationRequest, StreamRequest, parse, without_nulls
from stepweave.errors import InvalidRequestError
from stepweave.parameters import ImageRequest
from tests.support.fake_pipeline import FakePipeline
from tests.support.in_process import InProcess

Make = Callable[..., InProcess]


@pytest.mark.parametrize(
    "schema", [GenerationRequest, ImageRequest, StreamRequest, DiffusersExampleRequest]
)
def test_null_is_absent_of_every_field_of_every_body(schema: type[BaseModel]) -> None:
    nothing = dict.fromkeys([*schema.model_fields, "whatever"])
    given = {**nothing, "prompt": "a\u2028null"}
    for body in (json.dumps(given), json.dumps(given, indent=LONG // len(given))):
        read = parse(body.encode(), schema)
        assert read == schema.model_validate({"prompt": "a\u2028null"})
        assert read.model_fields_set == {"prompt"}
    with pytest.raises(InvalidRequestError, match="prompt is missing"):
        parse(json.dumps(nothing).encode(), schema)


SCALARS = st.none() | st.booleans() | st.integers() | st.text()


@given(st.recursive(SCALARS, lambda one: st.lists(one) | st.dictionaries(st.text(), one)))
def test_null_members_go_however_deep_they_stand(value: Any) -> None:
    def kept(value: Any, found: Any) -> None:
        if isinstance(value, dict):
            assert list(found) == [name for name, one in value.items() if one is not None]
            for name in found:
                kept(value[name], found[name])
        elif isinstance(value, list):
            assert len(found) == len(value)
            for one, other in zip(value, found, strict=True):
                kept(one, other)
        else:
            assert found is value

    kept(value, without_nulls(value))


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "a", "n": null, "guidance_scale": 1e999}',
        b'{"prompt": "a", "n": null, "seed": NaN}',
        b'{"prompt": "a", "n": null, "steps": 3}',
        b'{"prompt": null null}',
        b'{"prompt": "\\ud800", "n": null}',
        b"null",
        b"[null]",
    ],
)
def test_what_stands_beside_a_null_is_checked_as_ever(body: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        parse(body, GenerationRequest)


@pytest.mark.parametrize(
    ("route", "body"),
    [
        (
            "/v1/images/generations",
            {"prompt": "a", "seed": None, "stream": None, "svg": None, "whatever": None},
        ),
        ("/api/diffusers/inference", {"prompt": "a", "num_images_per_prompt": None, "model": None}),
        (
            "/v2/models/shapes/infer",
            {
                "id": None,
                "outputs": None,
                "parameters": {"seed": None, "reproducible": None},
                "inputs": [
                    {
                        "name": "prompt",
                        "datatype": "BYTES",
                        "shape": [1],
                        "parameters": None,
                        "data": ["a"],
                    }
                ],
            },
        ),
    ],
)
def test_null_on_every_route(in_process: Make, route: str, body: dict[str, Any]) -> None:
    app = in_process(trusted_hosts="testserver")
    answer = app.client.post(route, json=body)
    assert answer.status_code == 200, answer.text


def test_an_empty_field_of_a_form_is_absent(in_process: Make) -> None:
    app = in_process(FakePipeline(edits=True))
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    fields = {
        "prompt": "null",
        "negative_prompt": "",
        "n": "",
        "quality": "null",
        "seed": "",
        "svg": "",
        "user": "null",
    }
    answer = app.client.post(
        "/v1/images/edits", data=fields, files={"image": ("a.png", buffer.getvalue(), "image/png")}
    )
    assert (answer.status_code, answer.json()["warnings"]) == (200, [])
    assert answer.json()["parameters"]["prompt"] == "null"
    assert "negative_prompt" not in answer.json()["parameters"]
