"""Bodies as clients and browsers send them: compressed, with a byte order mark, of content types
and forms that hardly differ."""

from __future__ import annotations

import gzip
import json
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from starlette.types import Message

from stepweave.api.bodies import SPOOLED, decoded
from stepweave.errors import BodyTooLargeError, InvalidRequestError, UnsupportedEncodingError
from tests.support.asgi import GENERATIONS, App, serving
from tests.support.bodies import EDITS, FORM, INFER, JSON, LEGACY, natively, png
from tests.support.fake_pipeline import FakePipeline

pytestmark = pytest.mark.anyio

MARK = b"\xef\xbb\xbf"
TENSORS = {"inputs": [{"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["a"]}]}
BODIES: dict[str, Any] = {
    GENERATIONS: {"prompt": "a"},
    "/generate": {"prompt": "a"},
    "/generate_stream": {"prompt": "a"},
    LEGACY: {"prompt": "a"},
    INFER: TENSORS,
}
FORMS = (EDITS, "/edit")
PATHS = (*BODIES, *FORMS)
PACKS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "X-GZIP": gzip.compress,
    "deflate": zlib.compress,
    "identity": bytes,
    "identity, gzip": gzip.compress,
}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def part(name: str, content: bytes, filename: str | None = None) -> bytes:
    """As a browser writes it: a file always has a name, if only an empty one, and a type."""
    file = (
        ""
        if filename is None
        else f'; filename="{filename}"\r\nContent-Type: application/octet-stream'
    )
    return (
        f'--x\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode()
        + content
        + b"\r\n"
    )


def form(*parts: bytes) -> bytes:
    return b"".join([part("num_inference_steps", b"4"), part("seed", b"1"), *parts, b"--x--\r\n"])


PROMPT, IMAGE = part("prompt", b"a"), part("image", png(), "a.png")


def request(path: str) -> tuple[bytes, dict[str, str]]:
    if path in FORMS:
        return form(PROMPT, IMAGE), FORM
    return json.dumps(BODIES[path]).encode(), JSON


async def post(app: App, path: str, body: bytes, headers: dict[str, str]) -> Any:
    before = app.asgi
    if path in ("/generate", "/generate_stream", "/edit"):
        natively(app)
    try:
        return await app.send("POST", path, body, headers).done()
    finally:
        app.asgi = before


# --- content encodings ---


@pytest.mark.parametrize("encoding", PACKS)
@pytest.mark.parametrize("path", PATHS)
async def test_a_compressed_body_is_read_on_every_route(path: str, encoding: str) -> None:
    async with serving(FakePipeline(edits=True)) as app:
        body, headers = request(path)
        answer = await post(
            app, path, PACKS[encoding](body), {**headers, "Content-Encoding": encoding}
        )
        assert answer.status == 200, answer.content
        assert app.record.calls[-1]["prompt"] == "a"


@pytest.mark.parametrize("path", PATHS)
async def test_an_encoding_that_is_not_undone_is_named_and_those_that_are(path: str) -> None:
    async with serving(FakePipeline(edits=True)) as app:
        body, headers = request(path)
        for encoding in ("br", "zstd", "gzip, gzip", "gzip, deflate", "'"):
            refused = await post(app, path, body, {**headers, "Content-Encoding": encoding})
            assert (refused.status, refused.error["code"]) == (415, "unsupported_media_type")
            assert refused.error["message"].endswith("send gzip, deflate or none.")
            assert encoding in refused.error["message"]
            assert refused.headers["accept-encoding"] == "gzip, deflate, identity"
        assert app.record.calls == []


@pytest.mark.parametrize("path", PATHS)
async def test_what_is_not_compressed_as_it_says_is_refused(path: str) -> None:
    async with serving(FakePipeline(edits=True)) as app:
        body, headers = request(path)
        packed = gzip.compress(body)
        for wrong, told in (
            (body, "is not gzip"),
            (zlib.compress(body), "is not gzip"),
            (packed[:-1], "is cut short"),
            (b"", "is cut short"),
            (packed + b"xyz", "is not gzip"),
        ):
            refused = await post(app, path, wrong, {**headers, "Content-Encoding": "gzip"})
            assert (refused.status, refused.error["code"]) == (400, "invalid_encoding"), (
                refused.content,
                told,
            )
            assert told in refused.error["message"]
        assert app.record.calls == []


@pytest.mark.parametrize("path", PATHS)
async def test_a_bomb_is_refused_before_it_is_inflated(path: str) -> None:
    bomb, (_, headers) = gzip.compress(bytes(200_000_000), 9), request(path)
    assert len(bomb) < 250_000
    async with serving(FakePipeline(edits=True), max_upload_bytes=1_000_000) as app:
        tracemalloc.start()
        try:
            refused = await post(app, path, bomb, {**headers, "Content-Encoding": "gzip"})
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert (refused.status, refused.error["code"]) == (
            (413, "body_too_large") if path not in FORMS else (400, "invalid_form")
        )
        assert peak < 8_000_000
        assert app.record.calls == []


@pytest.mark.parametrize("path", FORMS)
async def test_an_uploads_bound_is_of_what_comes_out(path: str) -> None:
    body = form(PROMPT, part("image", png() + bytes(200_000), "a.png"))
    async with serving(FakePipeline(edits=True), max_upload_bytes=100_000) as app:
        refused = await post(app, path, gzip.compress(body), {**FORM, "Content-Encoding": "gzip"})
        assert (refused.status, refused.error["code"]) == (413, "body_too_large")
        assert "decoded from gzip, is over the limit of 100000 bytes" in refused.error["message"]


@pytest.mark.parametrize("cut", [1, 7, 10_000_000])
@pytest.mark.parametrize("size", [0, 1, SPOOLED - 1, SPOOLED, SPOOLED + 1, 2 * SPOOLED])
async def test_however_a_compressed_body_is_cut_it_comes_whole(size: int, cut: int) -> None:
    for encoding, pack in (("gzip", gzip.compress), ("deflate", zlib.compress)):
        data = bytes(i % 251 for i in range(size))
        packed = pack(data)
        pieces = [packed[i : i + cut] for i in range(0, len(packed), cut)]
        assert await inflated(pieces, encoding, size) == data
        assert await inflated([*pieces, b""], encoding, size) == data
        if size:
            with pytest.raises(BodyTooLargeError, match=f"decoded from {encoding}"):
                await inflated(pieces, encoding, size - 1)
        with pytest.raises(InvalidRequestError, match="goes on after its end|is not gzip"):
            await inflated([*pieces, b"xyz"], encoding, size)
        with pytest.raises(InvalidRequestError, match="is cut short"):
            await inflated([packed[:-1]], encoding, size)


@pytest.mark.parametrize("cut", [2, 7, 10_000_000])
async def test_gzip_may_have_several_members_and_deflate_no_header(cut: int) -> None:
    data = bytes(i % 251 for i in range(2 * SPOOLED + 3))
    raw = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    for encoding, packed in (
        (
            "gzip",
            b"".join(gzip.compress(data[i : i + 50_000]) for i in range(0, len(data), 50_000)),
        ),
        ("deflate", raw.compress(data) + raw.flush()),
    ):
        pieces = [packed[i : i + cut] for i in range(0, len(packed), cut)]
        assert await inflated(pieces, encoding, len(data)) == data
        with pytest.raises(BodyTooLargeError):
            await inflated(pieces, encoding, len(data) - 1)
        with pytest.raises(InvalidRequestError, match="is cut short"):
            await inflated([packed[:-1]], encoding, len(data))


async def inflated(pieces: list[bytes], encoding: str, limit: int) -> bytes:
    """What comes out of a body that comes in pieces."""
    messages: Iterator[Message] = iter(
        {"type": "http.request", "body": piece, "more_body": i < len(pieces) - 1}
        for i, piece in enumerate(pieces)
    )

    async def receive() -> Message:
        return next(messages, {"type": "http.disconnect"})

    scope: dict[str, Any] = {
        "headers": [(b"content-encoding", encoding.encode()), (b"x-other", b"1")]
    }
    reading, found = decoded(receive, scope, limit), []
    assert scope["headers"] == [(b"x-other", b"1")]
    more = True
    while more:
        message = await reading()
        assert len(message["body"]) <= SPOOLED
        found.append(message["body"])
        more = message["more_body"]
    assert (await reading())["type"] == "http.disconnect"
    return b"".join(found)


async def test_a_client_that_leaves_within_a_compressed_body_is_told_of() -> None:
    async def receive() -> Message:
        return {"type": "http.disconnect"}

    reading = decoded(receive, {"headers": [(b"content-encoding", b"gzip")]}, 100)
    assert (await reading())["type"] == "http.disconnect"


def test_encodings_of_several_headers_are_one_list() -> None:
    async def receive() -> Message:
        raise AssertionError

    twice = {"headers": [(b"content-encoding", b"gzip"), (b"content-encoding", b"deflate")]}
    with pytest.raises(UnsupportedEncodingError, match="'gzip, deflate'"):
        decoded(receive, twice, 100)
    assert decoded(receive, {"headers": [(b"content-encoding", b"identity")]}, 100) is receive


# --- texts ---


@pytest.mark.parametrize("path", BODIES)
async def test_json_may_begin_with_a_byte_order_mark(path: str) -> None:
    async with serving(FakePipeline(edits=True)) as app:
        body, headers = request(path)
        for text in (MARK + body, MARK + body + b"\r\n \n", gzip.compress(MARK + body)):
            compressed = {"Content-Encoding": "gzip"} if text.startswith(b"\x1f") else {}
            answer = await post(app, path, text, {**headers, **compressed})
            assert answer.status == 200, answer.content
        for text in (MARK, MARK + MARK + body):
            assert (await post(app, path, text, headers)).status == 400


@pytest.mark.parametrize("path", BODIES)
async def test_long_json_may_begin_with_a_byte_order_mark(path: str) -> None:
    async with serving(FakePipeline(edits=True)) as app:
        body, headers = request(path)
        answer = await post(app, path, MARK + body + b" " * 2 * SPOOLED, headers)
        assert answer.status == 200, answer.content


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 200),
        ("Application/JSON ; Charset=UTF-8", 200),
        ('application/json; charset="utf-8"', 200),
        ("application/json; charset=us-ascii", 200),
        ("application/json;charset=", 200),
        ("application/ld+json", 200),
        ("application/json; charset=utf-16", 415),
        ("application/json; charset=iso-8859-1", 415),
        ("application/json; charset=undefined", 415),
        ("application/jsonp", 415),
        ("application/x-www-form-urlencoded", 415),
        ("text/plain", 415),
        ("text/json", 415),
    ],
)
@pytest.mark.parametrize("path", BODIES)
async def test_content_types_of_json(path: str, content_type: str, status: int) -> None:
    async with serving(FakePipeline(edits=True)) as app:
        answer = await post(app, path, request(path)[0], {"Content-Type": content_type})
        assert answer.status == status, answer.content
        if status == 415:
            told = answer.error["message"]
            assert content_type.rpartition("=")[2] in told
            assert (
                "utf-8" in told
                if "charset" in content_type
                else "`Content-Type: application/json" in told
            )
            assert ("curl -d" in told) == ("urlencoded" in content_type)


# --- forms ---


@pytest.mark.parametrize("path", FORMS)
async def test_what_is_not_filled_in_is_absent(path: str) -> None:
    async with serving(FakePipeline(edits=True)) as app:
        empty = [
            part(name, b"")
            for name in ("negative_prompt", "size", "guidance_scale", "strength", "output_format")
        ]
        body = form(
            PROMPT,
            IMAGE,
            part("mask", b"", ""),
            part("image", b"", ""),
            *empty,
            part("image[]", b""),
        )
        answer = await post(app, path, body, FORM)
        assert answer.status == 200, answer.content
        call = app.record.calls[-1]
        assert "mask_image" not in call or call["mask_image"] is None
        assert not call.get("negative_prompt")


@pytest.mark.parametrize("path", FORMS)
async def test_what_is_required_and_not_filled_in_is_missing(path: str) -> None:
    async with serving(FakePipeline(edits=True)) as app:
        for parts, param in (
            ((PROMPT, part("image", b"", "")), "image"),
            ((PROMPT, part("image", b"")), "image"),
            ((PROMPT, part("image[]", b"", "")), "image"),
            ((PROMPT,), "image"),
            ((part("prompt", b""), IMAGE), "prompt"),
            ((part("prompt", MARK), IMAGE), "prompt"),
        ):
            refused = await post(app, path, form(*parts), FORM)
            assert (refused.status, refused.error["code"], refused.error["param"]) == (
                400,
                "missing_field",
                param,
            )
            assert refused.error["message"].startswith(f"{param} is missing")
        refused = await post(app, path, form(PROMPT, part("image", b"", "empty.png")), FORM)
        assert (refused.status, refused.error["param"]) == (400, "image")
        assert "image is empty" in refused.error["message"], "a file that was chosen"


@pytest.mark.parametrize("path", FORMS)
@pytest.mark.parametrize(
    "mask", [part("mask", b"", "empty.png"), part("mask", b"", "blob"), part("mask", b"null")]
)
async def test_an_optional_file_that_is_empty_is_absent(path: str, mask: bytes) -> None:
    async with serving(FakePipeline(edits=True)) as app:
        answer = await post(app, path, form(PROMPT, IMAGE, mask), FORM)
        assert answer.status == 200, answer.content
        told = (
            answer.headers.get("x-stepweave-warnings", "")
            if path == "/edit"
            else str(answer.json()["warnings"])
        )
        assert ("the file is empty, which counts as none" in told) == (b"filename" in mask)


@pytest.mark.parametrize("path", FORMS)
async def test_a_pipeline_of_one_image_takes_it_by_either_name_and_no_more(
    path: str,
) -> None:
    async with serving(FakePipeline(edits=True)) as app:
        assert (
            await post(app, path, form(PROMPT, part("image[]", png(), "a.png")), FORM)
        ).status == 200
        assert (
            await post(app, path, form(PROMPT, part("image", png(), "")), FORM)
        ).status == 200, "it has content"
        calls = len(app.record.calls)
        for names in (
            ["image[]"] * 2,
            ["image[]"] * 16,
            ["image", "image[]"],
            ["image", "mask", "image"],
        ):
            for filename in ("a.png", ""):
                if filename or len(names) < 16:
                    files = [part(name, png(), filename) for name in names]
                    refused = await post(app, path, form(PROMPT, *files), FORM)
                    assert (refused.status, refused.error["param"]) == (400, "image"), (
                        names,
                        refused.content,
                    )
                    times = sum(name.startswith("image") for name in names)
                    assert refused.error["message"] == (
                        f"image is given {times} times; FakePipeline takes one."
                    )
        twice = await post(app, path, form(PROMPT, IMAGE, part("seed", b"2")), FORM)
        assert (twice.status, twice.error["param"]) == (400, "seed")
        assert len(app.record.calls) == calls


@pytest.mark.parametrize("path", FORMS)
async def test_a_text_of_a_form_may_begin_with_a_byte_order_mark(path: str) -> None:
    async with serving(FakePipeline(edits=True)) as app:
        body = form(
            part("prompt", MARK + "ein grünes Dreieck".encode()),
            part("guidance_scale", MARK + b"2.5"),
            IMAGE,
        )
        answer = await post(app, path, body, FORM)
        assert answer.status == 200, answer.content
        call = app.record.calls[-1]
        assert (call["prompt"], call["guidance_scale"]) == ("ein grünes Dreieck", 2.5)


async def test_a_quoted_nothing_is_absent_as_bentomls_clients_send_it() -> None:
    async with serving(FakePipeline(edits=True)) as app:
        for nothing in (b'""', b"null"):
            answer = await post(app, "/edit", form(PROMPT, IMAGE, part("size", nothing)), FORM)
            assert answer.status == 200, answer.content
