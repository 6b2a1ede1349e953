"""The process that decodes uploads: `python -m stepweave.images.decoder_process DESCRIPTOR
MAX_PIXELS`.

It imports Pillow and numpy, and answers over a socket: requests and answers are a message in JSON,
and one with the bytes of each file or image. Once it knows the size of an image, it asks for the
wanted one, so that no larger image is sent back. Nothing is unpickled, so a decoder that a
malicious file has taken over cannot attack the server that way. It ends when its socket is closed.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from stepweave.errors import InvalidRequestError, UnsupportedMediaTypeError
from stepweave.images.uploads import NotWanted, Size, Upload, read_sources

READY = b"ready"
MEMORY_BYTES = 1 << 30  # of address space, for the interpreter and its libraries
# more for each pixel of an image: planes, coefficients, copies in other modes
MEMORY_BYTES_OF_PIXEL = 32
LAST_SECONDS = 20  # after which it ends itself, if the server does not


def main(descriptor: int, max_pixels: int) -> None:
    """Answer until the other end closes the connection."""
    _confine(MEMORY_BYTES + MEMORY_BYTES_OF_PIXEL * max_pixels)
    connection = Connection(descriptor)
    connection.send_bytes(READY)
    # the server has ended, or has cancelled the request
    with contextlib.suppress(EOFError, OSError):
        while True:
            asked = json.loads(connection.recv_bytes())
            files = [
                Upload(file.pop("name"), connection.recv_bytes(), **file) for file in asked["files"]
            ]
            signal.alarm(LAST_SECONDS)
            for message in _answer(connection, files, asked["options"], max_pixels):
                connection.send_bytes(message)
            signal.alarm(0)


def _answer(
    connection: Connection, files: list[Upload], options: dict[str, Any], max_pixels: int
) -> list[bytes]:
    def fit(name: str, size: Size, masked: bool) -> Size:
        asked = {"name": name, "size": size, "masked": masked}
        connection.send_bytes(json.dumps(asked).encode())
        wanted = json.loads(connection.recv_bytes())["size"]
        if wanted is None:
            raise NotWanted
        return (wanted[0], wanted[1])

    try:
        sources = read_sources(files, max_pixels=max_pixels, fit=fit, **options)
    except NotWanted:  # the server refuses the size, or the kind of edit
        return []
    except (InvalidRequestError, UnsupportedMediaTypeError) as error:
        reason = {"message": error.message, "code": error.code, "param": error.param}
        return [json.dumps({"error": reason, "status": error.status}).encode()]
    named = [(name, image) for name, images in sources.images.items() for image in images]
    headers = [{"name": name, "mode": image.mode, "size": image.size} for name, image in named]
    answer = {"images": headers, "warnings": sources.warnings}
    return [json.dumps(answer).encode(), *(image.tobytes() for _, image in named)]


def _confine(memory: int) -> None:
    """Limit the address space, and have the kernel end this process before the server if memory
    runs out."""
    # there is no such limit, or a lower one
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
