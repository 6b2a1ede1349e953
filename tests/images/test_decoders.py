"""Processes that decode uploads: what they refuse, how they end, and that nothing of them is
left."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import pytest
from PIL import Image

from stepweave.errors import (
    InvalidRequestError,
    RequestCancelledError,
    StepweaveError,
    UnavailableError,
    UnsupportedMediaTypeError,
)
from stepweave.images import decoders, scan
from stepweave.images.decoders import DECODERS, Decoders
from tests.support.environment import clean_environment
from tests.support.uploads import files_of, read_sources, whatever_its_name
from tests.support.waiting import SECONDS, wait_until

pytestmark = pytest.mark.anyio

LIMIT = 256 * 256


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def file_of(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(side: int = 64) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def with_scans(count: int, side: int = 64) -> bytes:
    """A progressive JPEG that ends with so many more scans, all the same."""
    data = file_of(noise(side), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + b"\xff\xd9"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(*chunks: bytes) -> bytes:
    """A PNG with chunks after its header."""
    data = file_of(noise())
    return data[:33] + b"".join(chunks) + data[33:]


def webp_chunk(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def webp_of(*chunks: bytes) -> bytes:
    content = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(content)) + content


def canvas(width: int, height: int, flags: int = 0) -> bytes:
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return webp_chunk(b"VP8X", bytes([flags, 0, 0, 0]) + size)


BITMAP = file_of(noise(), "WEBP")[12:]
DENSE = zlib.compress(bytes(1 << 20))
SEGMENT = b"\xff\xfe\x00\x02"
JPEG = file_of(noise(), "JPEG")

COSTLY = {
    "scans": (with_scans(5000), r"image has 50\d\d scans; the limit is 100"),
    "scans that hide in a comment": (
        with_scans(200).replace(b"\xff\xda", b"\xff\xfe\x00\x04\xff\xd9\xff\xda"),
        "scans; the limit is 100",
    ),
    "segments": (
        JPEG[:2] + SEGMENT * 1001 + JPEG[2:],
        "image has 1001 or more segments; the limit is 1000",
    ),
    "restarts and segments": (
        JPEG[:-2] + b"\xff\xd0" * 9 + SEGMENT * 1001 + b"\xff\xd9",
        "limit is 1000",
    ),
    "fill bytes": (
        JPEG[:2] + b"\xff" * 5000 + JPEG[2:],
        "image has 5000 bytes between its segments; the limit is 4096",
    ),
    "stuffed bytes": (
        JPEG[:2] + b"\xff\x00" * 2100 + JPEG[2:],
        "image has 4200 bytes between its segments",
    ),
    "bytes between": (
        JPEG[:20] + bytes(4097) + JPEG[20:],
        "image has 4097 bytes between its segments",
    ),
    "an end of the image before it begins": (
        b"\xff\xd8\xff\xd9" + b"\xff" * 5000,
        "5000 bytes between its segments",
    ),
    "segments after such an end": (
        JPEG[:2] + b"\xff\xd9" + SEGMENT * 1001 + JPEG[2:],
        "or more segments; the limit is",
    ),
    "nothing but fill bytes": (
        b"\xff\xd8" + b"\xff" * 5000,
        "image has 5000 bytes between its segments",
    ),
    "frame headers": (
        JPEG[:2] + JPEG[JPEG.index(b"\xff\xc0") : JPEG.index(b"\xff\xc0") + 19] + JPEG[2:],
        "image has 2 or more frame headers; the limit is 1",
    ),
    "exif in parts": (
        JPEG[:2] + (b"\xff\xe1\xff\xffExif\0\0" + bytes(0xFFFF - 8)) * 5 + JPEG[2:],
        "bytes of EXIF data; the limit is 262144",
    ),
    "a profile in parts": (
        JPEG[:2] + (b"\xff\xe2\xff\xffICC_PROFILE\0\1\x46" + bytes(0xFFFF - 16)) * 70 + JPEG[2:],
        "bytes of colour profile; the limit is 4194304",
    ),
    "chunks": (
        png_with(*[chunk(b"gAMA", bytes(4))] * 1001),
        "chunks beside its data; the limit is 1000",
    ),
    "empty data": (png_with(*[chunk(b"IDAT", b"")] * 20_001), "or more chunks; the limit is 20000"),
    "text": (
        png_with(*[chunk(b"zTXt", b"a\0\0" + DENSE)] * 65),
        "has 65 or more compressed .* limit is 64",
    ),
    "profiles": (
        png_with(*[chunk(b"iCCP", b"a\0\0" + DENSE)] * 65),
        "has 65 or more compressed .* limit is 64",
    ),
    "chunks after the data": (
        file_of(noise())[:-12] + chunk(b"iTXt", b"a\0\1\0\0\0" + DENSE) * 65 + chunk(b"IEND", b""),
        "has 65 or more compressed .* limit is 64",
    ),
    "exif of a png": (
        png_with(chunk(b"eXIf", bytes(1 << 19))),
        "524288 bytes of EXIF data; the limit is 262144",
    ),
    "frames of a png": (
        png_with(chunk(b"acTL", struct.pack(">II", 9, 0))),
        "several frames .9 or more",
    ),
    "frames of a webp": (
        webp_of(canvas(64, 64, 2), *[webp_chunk(b"ANMF", bytes(16) + BITMAP)] * 3),
        "image has several frames .2 or more",
    ),
    "canvas": (
        webp_of(canvas(16_000, 16_000), BITMAP),
        "image is 16000x16000, 256000000 pixels; the limit is 65536",
    ),
    "canvas of a frame": (
        webp_of(canvas(1 << 24, 100, 2), webp_chunk(b"ANMF", bytes(16) + BITMAP)),
        "image is 16777216x100",
    ),
    "bitmap": (
        webp_of(webp_chunk(b"VP8L", b"\x2f" + b"\xff" * 20)),
        "image is 16384x16384, 268435456 pixels",
    ),
    "webp's chunks": (
        webp_of(canvas(64, 64), *[webp_chunk(b"ABCD", b"")] * 1001, BITMAP),
        "chunks; the limit is 1000",
    ),
    "profile of a webp": (
        webp_of(canvas(64, 64, 32), webp_chunk(b"ICCP", bytes(5 << 20)), BITMAP),
        "5242880 bytes of colour profile; the limit is",
    ),
    "exif of a webp": (
        webp_of(canvas(64, 64, 8), BITMAP, webp_chunk(b"EXIF", bytes(1 << 19))),
        "bytes of EXIF data; the limit is",
    ),
}


@pytest.mark.parametrize("kind", COSTLY)
def test_what_would_cost_more_than_its_pixels_is_refused_before_it_is_decoded(kind: str) -> None:
    data, says = COSTLY[kind]
    with (
        patch.object(Image, "open", side_effect=AssertionError("it was opened")),
        pytest.raises(InvalidRequestError, match=says) as caught,
    ):
        read_sources(data, None, max_pixels=LIMIT)
    assert caught.value.param == "image"
    assert (
        caught.value.code == scan.CODE or "pixels" in says or "frames" in says or "image is" in says
    )
    with pytest.raises(InvalidRequestError) as caught:
        read_sources(file_of(noise()), data, max_pixels=LIMIT)
    assert caught.value.param == "mask"


USUAL = {
    "progressive": with_scans(50),
    "tables and data": JPEG[:2] + b"\xff\xe2\xff\xff" + bytes(0xFFFF - 2) + JPEG[2:],
    "scans in a thumbnail and after the end": JPEG[:2]
    + b"\xff\xe1\x04\x00"
    + b"\xff\xda" * 511
    + JPEG[2:]
    + b"\xff\xda" * 999,
    "restarts": file_of(noise(), "JPEG", restart_marker_blocks=1),
    "fill bytes": JPEG[:-2] + b"\xff" * 2_000_000 + b"\xff\xd9",
    "many parts of data": png_with(chunk(b"IDAT", b"")),
    "text": png_with(*[chunk(b"tEXt", b"a\0b")] * 100),
    "webp with exif": file_of(noise(), "WEBP", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0"),
    "one frame": png_with(
        chunk(b"acTL", struct.pack(">II", 1, 0)),
        chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 64, 64, 0, 0, 1, 1, 0, 0)),
    ),
}


@pytest.mark.parametrize("kind", USUAL)
def test_what_is_usual_is_decoded(kind: str) -> None:
    assert read_sources(USUAL[kind], None, max_pixels=LIMIT).image.size == (64, 64)


def test_a_png_of_many_small_parts_is_decoded() -> None:
    """As encoders with a small buffer write it."""
    whole = file_of(noise(256))
    begin = whole.index(b"IDAT") - 4
    data = zlib.compress(zlib.decompress(b"".join(parts_of(whole))))
    small = b"".join(chunk(b"IDAT", data[at : at + 100]) for at in range(0, len(data), 100))
    assert read_sources(
        whole[:begin] + small + chunk(b"IEND", b""), None, max_pixels=LIMIT
    ).image.size == (256, 256)


def parts_of(png: bytes) -> list[bytes]:
    found, at = [], 8
    while at < len(png):
        length, kind = struct.unpack_from(">I4s", png, at)
        if kind == b"IDAT":
            found.append(png[at + 8 : at + 8 + length])
        at += 12 + length
    return found


# --- the processes ---


@contextlib.asynccontextmanager
async def decoding(max_pixels: int = LIMIT) -> AsyncIterator[Decoders]:
    pool = Decoders(max_pixels)
    try:
        yield pool
    finally:
        await asyncio.to_thread(pool.close)
        assert not processes()


def processes() -> list[psutil.Process]:
    """Those that decode, of this one."""
    found = []
    for one in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "stepweave.images.decoder_process" in " ".join(one.cmdline()):
                found.append(one)
    return found


async def read(pool: Decoders, image: bytes, mask: bytes | None = None) -> Any:
    return await asyncio.wait_for(pool.read_sources(files_of(image, mask)), SECONDS)


async def one_process() -> psutil.Process:
    async with asyncio.timeout(SECONDS):
        while not (found := processes()):  # noqa: ASYNC110
            await asyncio.sleep(0.002)
    return found[0]


async def test_a_process_gives_what_reading_here_does() -> None:
    white = Image.new("L", (64, 64), 255)
    async with decoding() as pool:
        for image, mask in (
            (file_of(noise()), None),
            (file_of(noise(), "WEBP"), file_of(white)),
            (JPEG, None),
        ):
            there, here = await read(pool, image, mask), read_sources(image, mask, max_pixels=LIMIT)
            for a, b in ((there.image, here.image), (there.mask, here.mask)):
                assert (a is None) == (b is None)
                assert a is None or (a.mode == b.mode and a.tobytes() == b.tobytes())
        assert len(processes()) == 1, "it is used again"
        for bad, param in (((b"x", None), "image"), ((file_of(noise()), b""), "mask")):
            with pytest.raises(InvalidRequestError) as caught:
                await read(pool, *bad)
            with pytest.raises(InvalidRequestError) as here_too:
                read_sources(*bad, max_pixels=LIMIT)
            told = caught.value
            assert (told.message, told.code, told.param) == (
                here_too.value.message, here_too.value.code, here_too.value.param,
            )  # fmt: skip
            assert told.param == param
        assert len(processes()) == 1


async def test_what_was_done_to_the_files_is_told() -> None:
    async with decoding() as pool:
        answered = await read(
            pool, file_of(noise().convert("CMYK"), "JPEG"), file_of(Image.new("L", (128, 128)))
        )
    assert [warning.split(":")[0] for warning in answered.warnings] == ["image", "mask", "mask"]


async def test_other_kinds_of_files_are_unsupported_media() -> None:
    async with decoding() as pool:
        for _ in range(2):
            with pytest.raises(UnsupportedMediaTypeError, match="a GIF image") as caught:
                await read(pool, file_of(noise(), "GIF"))
            assert (caught.value.code, caught.value.param) == ("unsupported_image", "image")
        assert len(processes()) == 1


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
async def test_only_the_size_that_is_wanted_comes_back(format: str) -> None:
    asked = []

    def fit(size: tuple[int, int], masked: bool) -> tuple[int, int]:
        asked.append((size, masked, threading.current_thread().name.startswith("stepweave-decode")))
        return 32, 16

    async with decoding() as pool:
        mask = file_of(Image.new("L", (80, 80), 255))
        sources = await asyncio.wait_for(
            pool.read_sources(files_of(file_of(noise(), format), mask), fit=whatever_its_name(fit)),
            SECONDS,
        )
        assert sources.image.size == sources.mask.size == (32, 16)
        assert asked == [((64, 64), True, True)]
        here = read_sources(file_of(noise(), format), mask, max_pixels=LIMIT, fit=fit)
        assert sources.image.tobytes() == here.image.tobytes() and sources.warnings == here.warnings


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
async def test_a_size_that_is_refused_is_raised_and_the_process_used_again(format: str) -> None:
    def fit(size: tuple[int, int], masked: bool) -> tuple[int, int]:
        raise error

    async with decoding() as pool:
        for error in (
            InvalidRequestError("no such size", param="size"),
            ZeroDivisionError("a fault of ours"),
        ):
            with pytest.raises(type(error)):
                await asyncio.wait_for(
                    pool.read_sources(
                        files_of(file_of(noise(), format)), fit=whatever_its_name(fit)
                    ),
                    SECONDS,
                )
            assert (await read(pool, JPEG)).image.size == (64, 64)
        assert len(processes()) == 1


async def test_a_process_that_dies_before_it_is_told_the_size_fails_its_request_alone() -> None:
    async with decoding() as pool:

        def fit(size: tuple[int, int], masked: bool) -> tuple[int, int]:
            (process,) = processes()
            process.kill()
            wait_until(lambda: process.status() == psutil.STATUS_ZOMBIE)
            return size

        with pytest.raises(StepweaveError, match="SIGKILL") as caught:
            await asyncio.wait_for(
                pool.read_sources(files_of(JPEG), fit=whatever_its_name(fit)), SECONDS
            )
        assert caught.value.code == "decoder_failed"
        assert (await read(pool, JPEG)).image.size == (64, 64)


async def test_no_process_before_the_first_upload_and_a_few_for_many() -> None:
    async with decoding() as pool:
        assert not processes()
        answers = await asyncio.gather(*(read(pool, file_of(noise())) for _ in range(20)))
        assert all(one.image.size == (64, 64) for one in answers)
        assert 1 <= len(processes()) <= DECODERS


async def test_it_imports_neither_torch_nor_bentoml_nor_the_main_module() -> None:
    code = (
        "import sys, stepweave.images.decoder_process; print({'torch', 'bentoml', 'service'} & "
        "set(sys.modules))"
    )
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=True,
    )
    assert done.stdout.strip() == "set()"


async def test_its_environment_has_no_secrets() -> None:
    secrets = {
        "STEPWEAVE_API_KEYS": "secret",
        "HF_TOKEN": "secret",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    with patch.dict(os.environ, secrets):
        async with decoding() as pool:
            await read(pool, file_of(noise()))
            assert "secret" not in (await one_process()).environ().values()


async def test_one_that_tells_too_much_is_ended() -> None:
    async with decoding() as pool:
        await read(pool, JPEG)
        process = await one_process()
        with patch.object(decoders, "ANSWER_BYTES", 8), pytest.raises(StepweaveError) as caught:
            await read(pool, JPEG)
        assert caught.value.code == "decoder_failed"
        await asyncio.to_thread(wait_until, lambda: not process.is_running())
        assert (await read(pool, JPEG)).image.size == (64, 64)


async def test_what_takes_too_long_is_refused_and_its_process_replaced() -> None:
    async with decoding() as pool:
        await read(pool, JPEG)
        process = await one_process()
        with patch.object(decoders, "SECONDS", 0.2):
            process.suspend()
            with pytest.raises(
                InvalidRequestError, match=r"image took more than 0.2 s .*the limit is 0.2 s"
            ) as caught:
                await read(pool, JPEG)
        assert (caught.value.code, caught.value.param) == ("image_too_slow", "image")
        await asyncio.to_thread(wait_until, lambda: not process.is_running())
        assert (await read(pool, JPEG)).image.size == (64, 64)
        assert [one.pid for one in processes()] != [process.pid]


async def test_a_process_ends_with_the_task_that_waits_for_it() -> None:
    async with decoding() as pool:
        await read(pool, JPEG)
        process = await one_process()
        process.suspend()
        waiting = [
            asyncio.ensure_future(pool.read_sources(files_of(JPEG))) for _ in range(2 * DECODERS)
        ]
        await asyncio.to_thread(wait_until, lambda: len(processes()) == DECODERS)
        for one in waiting:
            one.cancel()
        ended = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), SECONDS)
        assert any(isinstance(one, asyncio.CancelledError) for one in ended)
        await asyncio.to_thread(wait_until, lambda: not process.is_running())
        assert (await read(pool, JPEG)).image.size == (64, 64)


async def test_closing_leaves_a_busy_connection_to_the_thread_that_reads_it() -> None:
    """Closed twice, its number may be another file's by then."""
    closed_by = []
    close = decoders._Process.close

    def closing(process: decoders._Process) -> None:
        closed_by.append(threading.current_thread().name)
        close(process)

    with patch.object(decoders._Process, "close", closing):
        async with decoding() as pool:
            await read(pool, JPEG)
            (await one_process()).suspend()
            failing = asyncio.ensure_future(pool.read_sources(files_of(JPEG)))
            await asyncio.to_thread(wait_until, lambda: not pool._idle)
            await asyncio.to_thread(pool.close)
            with pytest.raises(StepweaveError) as caught:
                await asyncio.wait_for(failing, SECONDS)
    assert caught.value.code == "decoder_failed"
    assert len(closed_by) == 1
    assert closed_by[0].startswith("stepweave-decode")


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
async def test_a_process_that_dies_fails_its_request_alone(number: signal.Signals) -> None:
    async with decoding() as pool:
        await read(pool, JPEG)
        process = await one_process()
        process.suspend()
        failing = asyncio.ensure_future(pool.read_sources(files_of(JPEG)))
        await asyncio.to_thread(wait_until, lambda: not pool._idle)
        process.send_signal(number)
        with contextlib.suppress(psutil.NoSuchProcess):  # SIGKILL ends it although it is suspended
            process.resume()
        with pytest.raises(StepweaveError, match=number.name) as caught:
            await asyncio.wait_for(failing, SECONDS)
        assert (caught.value.status, caught.value.code) == (500, "decoder_failed")
        assert (await read(pool, JPEG)).image.size == (64, 64)


async def test_a_process_that_died_while_it_was_idle_is_replaced() -> None:
    async with decoding() as pool:
        await read(pool, JPEG)
        process = await one_process()
        process.kill()
        await asyncio.to_thread(wait_until, lambda: process.status() == psutil.STATUS_ZOMBIE)
        assert (await read(pool, JPEG)).image.size == (64, 64)


@pytest.mark.parametrize(
    "command", [["no such file"], [sys.executable, "-c", "raise SystemExit(3)"]]
)
async def test_a_process_that_cannot_be_started_fails_the_request(command: list[str]) -> None:
    real = subprocess.Popen
    async with decoding() as pool:
        with (
            patch.object(subprocess, "Popen", lambda _, **options: real(command, **options)),
            pytest.raises(StepweaveError, match="start") as caught,
        ):
            await read(pool, JPEG)
        assert caught.value.code == "decoder_failed"
        assert (await read(pool, JPEG)).image.size == (64, 64)


def oom_score(process: psutil.Process) -> int:
    return int(Path(f"/proc/{process.pid}/oom_score_adj").read_text())


async def test_its_memory_is_bounded() -> None:
    """What needs more than it may have is refused, and the process is used again."""
    big = file_of(Image.new("RGB", (2048, 2048)))
    async with decoding(2048 * 2048) as pool:
        await read(pool, JPEG)
        process = await one_process()
        soft, hard = process.rlimit(psutil.RLIMIT_AS)
        assert 0 < soft == hard < 2**31
        process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms + (1 << 22), hard))
        with pytest.raises(
            InvalidRequestError, match="image takes more memory .* 4194304 pixels"
        ) as caught:
            await read(pool, big)
        assert (caught.value.code, caught.value.param) == (scan.CODE, "image")
        process.rlimit(psutil.RLIMIT_AS, (hard, hard))
        assert (await read(pool, big, big)).image.size == (2048, 2048)
        assert processes() == [process]
        assert oom_score(process) == 1000, "the kernel ends it before the server"


async def test_closing_ends_what_is_being_decoded() -> None:
    pool = Decoders(LIMIT)
    await read(pool, JPEG)
    process = await one_process()
    process.suspend()
    failing = asyncio.ensure_future(pool.read_sources(files_of(JPEG)))
    await asyncio.to_thread(wait_until, lambda: not pool._idle)
    await asyncio.to_thread(pool.close)
    with pytest.raises(StepweaveError):
        await asyncio.wait_for(failing, SECONDS)
    assert not processes()
    with pytest.raises(UnavailableError):
        await read(pool, JPEG)


ORPHAN = """
import asyncio, sys, time
from stepweave.images.decoders import Decoders, UploadedFile
pool = Decoders(65536)
file = UploadedFile("image", open(sys.argv[1], "rb").read())
asyncio.run(pool.read_sources([file]))
print(next(iter(pool._all))._process.pid, flush=True)
time.sleep(3600)
"""


def test_a_process_ends_when_its_server_is_killed(tmp_path: Path) -> None:
    file = tmp_path / "image.jpg"
    file.write_bytes(JPEG)
    environment = clean_environment(PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    with subprocess.Popen(
        [sys.executable, "-c", ORPHAN, str(file)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as server:
        assert server.stdout is not None
        decoder = psutil.Process(int(server.stdout.readline()))
        assert decoder.is_running()
        server.kill()
    wait_until(lambda: not decoder.is_running() or decoder.status() == psutil.STATUS_ZOMBIE)


def test_cancelled_is_what_it_says() -> None:
    task = decoders._Task([])
    task.end("cancelled")
    with pytest.raises(RequestCancelledError):
        Decoders(LIMIT)._run(task)
