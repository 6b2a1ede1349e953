"""LoRAs over HTTP: named on every surface, listed as models; loaded by administrators."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import shutil
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stepweave.adapters import loras
from stepweave.config.components import NAME
from stepweave.config.loras import LoraPlaces
from stepweave.config.values import MAX_NAME
from stepweave.parameters import MAX_LORA_NAME, MAX_NAMED_LORA
from tests.support.asgi import App, Exchange, serving
from tests.support.loras import plain, save_lora, shapes

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_torch_thread")]

ADMIN, USER = "an-administrators-key", "a-users-own-long-key"
KEYS = f"root: {ADMIN} admin\nalice: {USER}\n"
PROMPT, SEED, STEPS = "a red circle", 1, 4
BODY = {"prompt": PROMPT, "seed": SEED, "num_inference_steps": STEPS, "guidance_scale": 2.0}
BOTH = [{"name": "rings", "scale": 0.5}, {"name": "chalk", "scale": 0.7}]
EFFECT = 3  # levels of a pixel
SECONDS = 120


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    return {
        "rings": save_lora(folder / "rings.safetensors", shapes, {"transformer": ("to_q", "to_v")}),
        "chalk": save_lora(
            folder / "chalk" / "weights.safetensors", shapes, {"transformer": ("to_k",)}, seed=1
        ),
    }


@contextlib.asynccontextmanager
async def server(folder: Path | None, **settings: Any) -> AsyncIterator[App]:
    places = None if folder is None else LoraPlaces(directory=folder)
    async with serving(shapes(), batching="step", loras=places, **settings) as app:
        yield app


def pixels_of(data: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int)


def pixels(exchange: Exchange) -> np.ndarray:
    assert exchange.status == 200, exchange.content
    return pixels_of(exchange.json()["data"][0]["b64_json"])


@pytest.mark.full
async def test_each_surface_gives_the_image_of_set_adapters(files: dict[str, Path]) -> None:
    using = plain(shapes(), files)
    given = {**BODY, "max_sequence_length": 256}
    import torch

    def expected(lora: list[tuple[str, float]]) -> np.ndarray:
        call = {name: value for name, value in given.items() if name != "seed"}
        generator = torch.Generator().manual_seed(SEED)
        image = using(lora)(**call, generator=generator, output_type="np").images[0]
        return np.asarray(image * 255).round().astype(int)

    none, both = expected([]), expected([("rings", 0.5), ("chalk", 0.7)])
    assert abs(none - both).max() > EFFECT
    async with server(files["rings"].parent) as app:
        bodies = [
            app.post(**{**BODY, "lora": BOTH}),
            app.post(**{**BODY, "lora": "rings:0.5,chalk:0.7"}),
            app.post(**{**BODY, "lora": ["rings:0.5", {"name": "chalk", "scale": 0.7}]}),
            app.post(**BODY),
            app.post(**{**BODY, "model": "rings"}),
            app.post(**{**BODY, "model": "shapes:rings", "lora": ["chalk:0.7"]}),
        ]
        await asyncio.gather(*(body.done() for body in bodies))
        for body in bodies[:3]:
            assert abs(pixels(body) - both).max() <= 1
            assert body.json()["parameters"]["lora"] == BOTH
        assert abs(pixels(bodies[3]) - none).max() <= 1
        assert "lora" not in bodies[3].json()["parameters"]
        assert abs(pixels(bodies[4]) - expected([("rings", 1.0)])).max() <= 1
        assert abs(pixels(bodies[5]) - expected([("rings", 1.0), ("chalk", 0.7)])).max() <= 1

        inputs = [
            {"name": "prompt", "datatype": "BYTES", "shape": [2], "data": [PROMPT] * 2},
            {
                "name": "lora",
                "datatype": "BYTES",
                "shape": [2],
                "data": ["rings:0.5,chalk:0.7", "rings"],
            },
        ]
        rest = {name: value for name, value in BODY.items() if name != "prompt"}
        message = {"inputs": inputs, "parameters": rest}
        inferred = await app.send(
            "POST", "/v2/models/shapes/infer", json.dumps(message).encode(), JSON
        ).done()
        assert inferred.status == 200, inferred.content
        named = {"inputs": inputs[:1], "parameters": rest}
        by_name = await app.send(
            "POST", "/v2/models/rings/infer", json.dumps(named).encode(), JSON
        ).done()
        for data in by_name.json()["outputs"][0]["data"]:
            assert abs(pixels_of(data) - expected([("rings", 1.0)])).max() <= 1
        first, second = inferred.json()["outputs"][0]["data"]
        assert abs(pixels_of(first) - both).max() <= 1
        assert abs(pixels_of(second) - expected([("rings", 1.0)])).max() <= 1


JSON = {"Content-Type": "application/json"}


def form(**fields: str | list[str]) -> tuple[bytes, dict[str, str]]:
    """A form with an image."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "green").save(file, "png")
    mark = "boundary"
    parts = [
        f'--{mark}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{one}\r\n'.encode()
        for name, value in fields.items()
        for one in (value if isinstance(value, list) else [value])
    ]
    head = 'Content-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    parts.append(f"--{mark}\r\n{head}".encode() + file.getvalue() + f"\r\n--{mark}--\r\n".encode())
    return b"".join(parts), {"Content-Type": f"multipart/form-data; boundary={mark}"}


@pytest.mark.full
async def test_forms_take_texts_json_and_a_field_several_times(files: dict[str, Path]) -> None:
    rest = {"prompt": PROMPT, "seed": "1", "num_inference_steps": "4", "strength": "0.9"}
    async with server(files["rings"].parent) as app:
        found = []
        for lora in ("rings:0.5,chalk:0.7", json.dumps(BOTH), ["rings:0.5", "chalk:0.7"]):
            body, headers = form(**rest, lora=lora)
            edited = await app.send("POST", "/v1/images/edits", body, headers).done()
            assert edited.json().get("parameters", {}).get("lora") == BOTH, edited.content
            found.append(pixels(edited))
        assert all((one == found[0]).all() for one in found)
        body, headers = form(**rest)
        plain_edit = pixels(await app.send("POST", "/v1/images/edits", body, headers).done())
        assert abs(plain_edit - found[0]).max() > EFFECT


REFUSED: list[tuple[dict[str, Any], int, str, str]] = [
    ({"lora": "ring"}, 404, "lora_not_found", "no LoRA 'ring' (did you mean rings?)"),
    ({"model": "shapes:ring"}, 404, "lora_not_found", "(did you mean rings?)"),
    ({"model": "ring"}, 404, "model_not_found", "(did you mean rings?)"),
    ({"model": "other:rings"}, 404, "model_not_found", "There is no model 'other:rings'"),
    ({"lora": [{"name": "rings", "scale": 11}]}, 400, "invalid_value", "lora.0.scale is 11"),
    ({"lora": "rings:much"}, 400, "invalid_value", "send NAME, NAME:SCALE"),
    ({"lora": "rings:1_0"}, 400, "invalid_value", "send NAME, NAME:SCALE"),
    ({"lora": "rings:\u0661"}, 400, "invalid_value", "send NAME, NAME:SCALE"),
    ({"lora": {"rings": 1}}, 400, "invalid_value", "send NAME, NAME:SCALE"),
    ({"lora": [["rings", 0.5]]}, 400, "invalid_value", "send NAME, NAME:SCALE"),
    ({"lora": 5}, 400, "invalid_value", "send NAME, NAME:SCALE"),
    ({"lora": "rings,"}, 400, "invalid_value", "send NAME, NAME:SCALE"),
    ({"lora": [5, None]}, 400, "invalid_value", "send NAME, NAME:SCALE"),
    ({"lora": {"name": "rings", "weight": 1}}, 400, "invalid_value", "weight is called scale"),
    ({"lora": "shapes:ring:0.8"}, 404, "lora_not_found", "no LoRA 'ring' (did you mean rings?)"),
    ({"lora": "shapes:rings,rings"}, 400, "invalid_value", "'rings' is named twice"),
    ({"lora[][name]": "rings"}, 400, "unknown_field", "send NAME, NAME:SCALE"),
    ({"lora": ["rings"] * 9}, 400, "invalid_value", "9 LoRAs; the limit is 8"),
    ({"lora": "rings,rings"}, 400, "invalid_value", "'rings' is named twice"),
    ({"model": "rings", "lora": "rings"}, 400, "invalid_value", "'rings' is named twice"),
    ({"lora": "broken"}, 400, "lora_unusable", "'broken' cannot be used: broken.safetensors"),
    ({"lora": "../rings"}, 404, "lora_not_found", "'../rings'"),
]


async def test_what_cannot_be_is_told_and_nothing_else_suffers(
    files: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copy(files["rings"], tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(files["rings"].read_bytes()[:1000])
    async with server(tmp_path) as app:
        for fields, status, code, message in REFUSED:
            refused = await app.post(**{**BODY, **fields}).done()
            assert (refused.status, refused.error["code"]) == (status, code), refused.content
            assert message in refused.error["message"]
        for lora in (
            " rings : 0.5 ",
            "shapes:rings:5e-1",
            ["shapes:rings:.5"],
            {"name": "shapes:rings", "scale": 0.5},
        ):
            answered = await app.post(**{**BODY, "lora": lora}).done()
            assert answered.json()["parameters"]["lora"] == BOTH[:1], answered.content
        # numbers that the model's dtype holds, but not what it makes of them
        save_lora(tmp_path / "huge.safetensors", shapes, {"transformer": ("to_v",)}, size=1e30)
        refused = await app.post(**{**BODY, "lora": "huge:2"}).done()
        assert (refused.status, refused.error["param"]) == (400, "lora"), refused.content
        assert "lora='huge:2'" in refused.error["message"]
        image = await app.post(headers={"Accept": "image/png"}, **{**BODY, "lora": BOTH[:1]}).done()
        assert image.status == 200
        assert dict(image.headers)["x-stepweave-lora"] == "rings:0.5"
        told = Image.open(io.BytesIO(image.content)).info["parameters"]
        assert 'Lora: "rings:0.5"' in told


async def test_nothing_is_no_lora_and_errors_name_their_element(files: dict[str, Path]) -> None:
    rest = {name: value for name, value in BODY.items() if name not in ("prompt", "seed")}

    async def infer(app: App, *lora: str) -> Exchange:
        inputs = [
            {"name": "prompt", "datatype": "BYTES", "shape": [2], "data": [PROMPT] * 2},
            {"name": "lora", "datatype": "BYTES", "shape": [len(lora)], "data": list(lora)},
        ]
        message = json.dumps({"inputs": inputs, "parameters": rest}).encode()
        return await app.send("POST", "/v2/models/shapes/infer", message, JSON).done()

    async with server(files["rings"].parent) as app:
        for nothing in ([], "", " "):
            answered = await app.post(**{**BODY, "lora": nothing}).done()
            assert answered.status == 200, answered.content
            assert "lora" not in answered.json()["parameters"]
        answered = await infer(app, "rings:0.5", "")
        assert answered.status == 200, answered.content
        first, second = (json.loads(one) for one in answered.json()["outputs"][1]["data"])
        assert (first["lora"], "lora" in second) == (BOTH[:1], False)
        for wrong, status, told in (
            ("ring", 404, "no LoRA 'ring'"),
            ("rings:11", 400, "lora.0.scale is 11"),
            ("rings,rings", 400, "'rings' is named twice"),
        ):
            refused = await infer(app, "rings", wrong)
            assert refused.status == status, refused.content
            assert refused.json()["error"].startswith("Tensor 'lora': element 1: ")
            assert told in refused.json()["error"]
            alone = await infer(app, wrong)
            assert alone.status == status and told in alone.json()["error"], alone.content


async def test_a_name_of_star_that_is_like_a_loras_is_told(files: dict[str, Path]) -> None:
    async with server(files["rings"].parent, model_names=("*",)) as app:
        for model, warnings in (
            ("ringz", ["model is 'ringz', taken as shapes; did you mean the LoRA rings?"]),
            ("gpt-image-1", []),
            ("shapes", []),
            ("rings", []),
            ("x:rings", []),
        ):
            answered = await app.post(**{**BODY, "model": model}).done()
            assert answered.status == 200, answered.content
            assert answered.json()["warnings"] == warnings, model
        inputs = [{"name": "prompt", "datatype": "BYTES", "shape": [1], "data": [PROMPT]}]
        message = json.dumps({"inputs": inputs, "parameters": {"num_inference_steps": STEPS}})
        inferred = await app.send("POST", "/v2/models/ringz/infer", message.encode(), JSON).done()
        (told,) = (json.loads(one) for one in inferred.json()["outputs"][1]["data"])
        assert "did you mean the LoRA rings?" in told["warnings"][0]


@pytest.mark.full
async def test_names_of_star_take_any_model_but_no_unknown_lora(files: dict[str, Path]) -> None:
    async with server(files["rings"].parent, model_names=("*",)) as app:
        for model, status in (
            ("gpt-image-1", 200),
            ("rings", 200),
            ("gpt-image-1:rings", 200),
            ("gpt-image-1:ring", 404),
        ):
            answered = await app.post(**{**BODY, "model": model}).done()
            assert answered.status == status, answered.content
            if status == 200:
                assert ("lora" in answered.json()["parameters"]) == ("rings" in model)


async def test_they_are_listed_as_models_of_their_parent(
    files: dict[str, Path], tmp_path: Path
) -> None:
    async with server(tmp_path) as app:
        assert len((await app.get("/v1/models")).json()["data"]) == 1
        shutil.copy(files["rings"], tmp_path)  # found without a restart
        model, lora = (await app.get("/v1/models")).json()["data"]
        assert (lora["id"], lora["parent"], lora["loaded"]) == ("shapes:rings", model["id"], False)
        assert (await app.post(**{**BODY, "lora": "rings"}).done()).status == 200
        for id in ("rings", "shapes:rings"):
            found = (await app.get(f"/v1/models/{id}")).json()
            assert (found["root"], found["loaded"], found["rank"]) == ("rings", True, 4)
            assert found["bytes"] > 0 and found["components"] == ["transformer"]
        assert (await app.get("/v1/models/shapes:ring")).status == 404
        assert (await app.get("/v1/models/shapes")).json()["id"] == "shapes"
        assert app.metric("stepweave_loras_loaded") == 1
        assert app.metric("stepweave_lora_loads_total", result="ok") == 1


async def test_only_an_administrators_key_loads_and_removes(
    files: dict[str, Path], tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(KEYS)
    folder = tmp_path / "loras"
    folder.mkdir()
    shutil.copy(files["rings"], folder)
    admin, user = ({"Authorization": f"Bearer {key}"} for key in (ADMIN, USER))
    async with server(folder, api_keys_file=str(keys)) as app:

        async def load(name: str, headers: dict[str, str]) -> Exchange:
            return await app.send(
                "POST", "/v1/loras", json.dumps({"name": name}).encode(), {**JSON, **headers}
            ).done()

        async def ask() -> int:
            return (await app.post(headers=user, **{**BODY, "lora": "rings"}).done()).status

        assert (await load("rings", user)).status == 403
        assert (await app.delete("/v1/loras/rings", user)).status == 403
        assert (await load("rings", {})).status == 401
        loaded = await load("rings", admin)
        assert (loaded.status, loaded.json()["loaded"]) == (200, True)
        assert await ask() == 200
        assert (await load("shapes:rings", admin)).json()["root"] == "rings"
        assert (await load("other:rings", admin)).status == 404
        removed = await app.delete("/v1/loras/shapes:rings", admin)
        assert removed.json() == {"id": "rings", "object": "model", "deleted": True}
        assert await ask() == 404
        assert (await app.get("/v1/loras", user)).json()["data"] == []
        assert (await app.delete("/v1/loras/rings", admin)).status == 404
        assert (await load("rings", admin)).status == 200
        assert await ask() == 200
        for name in ("ring", "../keys", str(files["rings"]), "rings.safetensors"):
            assert (await load(name, admin)).status == 404


async def test_the_longest_names_that_there_are_may_be_sent() -> None:
    assert NAME.fullmatch("x" * MAX_LORA_NAME) and not NAME.fullmatch("x" * (MAX_LORA_NAME + 1))
    assert MAX_NAMED_LORA == len(f"{'x' * MAX_NAME}:{'x' * MAX_LORA_NAME}")


async def test_who_does_not_wait_is_answered_before_a_lora_is_read(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def slow(*args: Any, **kwargs: Any) -> Any:
        assert go_on.wait(SECONDS)
        return read(*args, **kwargs)

    read = loras.read_lora
    monkeypatch.setattr(loras, "read_lora", slow)
    body = {**BODY, "lora": "rings"}
    async with server(files["rings"].parent) as app:
        try:
            assert (await app.post(**BODY).done()).status == 200
            late = await app.post(**{**body, "deadline_ms": 3000}).done()
            assert (late.status, late.error["code"]) == (504, "deadline_exceeded"), late.content
            assert "LoRAs were not in memory yet" in late.error["message"]
            assert app.metric("stepweave_deadline_missed_total") == 1
            queued = await app.post(headers={"Prefer": "respond-async"}, **body).done()
            assert queued.status == 202, queued.content
            job = queued.json()
            assert (job["state"], job["position"]) == ("queued", 1)
            stream = app.post(stream=True, **body)
            assert (await stream.until(lambda exchange: exchange.messages)).status == 200
            keyed = app.post(headers={"Idempotency-Key": "one"}, **body)
            await app.until(lambda: len(app.server.active) == 3)
            await keyed.leave()
            await app.until(lambda: len(app.server.active) == 2)
        finally:
            go_on.set()
        assert (await stream.done()).status == 200
        done = await app.until_state(job["id"], "succeeded", "failed")
        assert done["state"] == "succeeded", done


async def test_without_keys_none_is_loaded_or_removed(files: dict[str, Path]) -> None:
    async with server(files["rings"].parent) as app:
        body = json.dumps({"name": "rings"}).encode()
        assert (await app.send("POST", "/v1/loras", body, JSON).done()).status == 404
        assert (await app.delete("/v1/loras/rings")).status == 404
        assert len((await app.get("/v1/loras")).json()["data"]) == 2


async def test_a_model_without_loras_says_so() -> None:
    async with serving() as app:
        refused = await app.post(lora="rings").done()
        assert (refused.status, refused.error["code"]) == (400, "unsupported")
        assert "STEPWEAVE_LORAS sets them" in refused.error["message"]
        assert (await app.get("/v1/loras")).json()["data"] == []
