"""What one client may cost: time on the event loop, threads, memory, and connections that it leaves lying."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from pydantic import ValidationError

from stepweave.api import schemas, tensors
from stepweave.store import DirectoryFileStore
from tests.asgi import GENERATIONS, serving

pytestmark = pytest.mark.anyio

JSON = {"Content-Type": "application/json"}
INFER = "/v2/models/shapes/infer"
EDITS = "/v1/images/edits"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


# --- bodies ---


def members(count: int) -> dict[str, int]:
    return {f"x{i}": 1 for i in range(count)}


PROMPT = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["a"]}
WIDE: dict[str, tuple[str, Any, str]] = {
    "fields": (GENERATIONS, {"prompt": "a", **members(60_000)}, "Unknown field 'x0'."),
    "nested": (GENERATIONS, {"prompt": {"a": members(60_000)}}, "prompt is "),
    "tensors": (INFER, {"inputs": [{}] * 100_000}, "inputs"),
    "members of a tensor": (INFER, {"inputs": [{**PROMPT, **members(60_000)}]}, "Unknown field 'x0'."),
    "shape": (INFER, {"inputs": [{**PROMPT, "shape": ["a"] * 100_000}]}, "Tensor 'prompt': inputs.0.shape.0 is 'a'"),
    "outputs": (INFER, {"inputs": [PROMPT], "outputs": [{}] * 100_000}, "outputs"),
}  # fmt: skip


@pytest.mark.parametrize("case", WIDE)
async def test_a_body_that_is_wrong_everywhere_is_told_of_one_problem(case: str) -> None:
    path, body, message = WIDE[case]
    async with serving() as app:
        built: list[int] = []

        def explain(error: ValidationError, real: Any = schemas.explain) -> Any:
            built.append(error.error_count())
            return real(error)

        with patch.object(schemas, "explain", explain), patch.object(tensors, "explain", explain):
            answer = await app.send("POST", path, json.dumps(body).encode(), JSON).done()
    assert answer.status == 400
    assert answer.error["message"].startswith(message)
    assert sum(built) <= 100, "errors that were made to tell of one"


async def test_a_long_body_is_not_read_on_the_event_loop() -> None:
    async with serving(max_body_bytes=2_000_000) as app:
        threads = set()

        def parse(*args: Any, real: Any = schemas.parse) -> Any:
            threads.add(threading.current_thread() is threading.main_thread())
            return real(*args)

        with patch.object(schemas, "parse", parse):
            long = app.post(prompt="a" * 100_000)
            assert (await long.done()).error["param"] == "prompt"
            assert threads == {False}
            assert (await app.post().done()).status == 200
            assert threads == {False, True}


@pytest.mark.parametrize("datatype", ["FP32", "FP64"])
async def test_a_number_beyond_any_float(datatype: str) -> None:
    scale = {"name": "guidance_scale", "datatype": datatype, "shape": [1], "data": [10**400]}
    async with serving() as app:
        body = json.dumps({"inputs": [PROMPT, scale]}).encode()
        answer = await app.send("POST", INFER, body, JSON).done()
        assert (answer.status, answer.error["param"]) == (400, "guidance_scale")
        assert answer.error["message"].endswith(f"is out of the range of {datatype}.")


@pytest.mark.parametrize("charset", ["undefined", "utf-16", "idna", "rot13", "no-such", '"\xff"'])
async def test_forms_of_other_charsets(charset: str) -> None:
    form = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--x--\r\n'
    async with serving() as app:
        kind = f"multipart/form-data; boundary=x; charset={charset}"
        answer = await app.send("POST", EDITS, form, {"Content-Type": kind}).done()
        assert (answer.status, answer.error["code"]) == (400, "invalid_form")
        assert "charset" in answer.error["message"]
        for charset in ("utf-8", "UTF-8", '"us-ascii"'):
            kind = f"multipart/form-data; boundary=x; charset={charset}"
            answer = await app.send("POST", EDITS, form, {"Content-Type": kind}).done()
            assert answer.error["code"] == "missing_field"


# --- the store ---


async def test_whether_a_file_is_there_is_told_without_reading_it(tmp_path: Path) -> None:
    now = 1000.0
    store = DirectoryFileStore(tmp_path, 60, 10_000, clock=lambda: now)
    name = await store.put(b"x", "png")
    (tmp_path / name).unlink()
    assert store.has(name)
    assert not store.has("../" + name)
    now += 60
    assert not store.has(name)
    now -= 60
    await store.delete([name])
    assert not store.has(name)
    await store.close()
