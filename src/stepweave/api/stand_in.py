"""A small form in place of an edit's, for BentoML.

By then the edit's own has been read. BentoML would decode its pictures once more, by the types that the client declares, and
answer 500 for an `image/jpg`, which is none, or a PNG that is called WebP.
"""

from __future__ import annotations

import functools
import io

from PIL import Image
from starlette.datastructures import MutableHeaders
from starlette.types import Message, Receive, Scope

BOUNDARY = "stand-in"


@functools.cache
def _form() -> bytes:
    picture = io.BytesIO()
    Image.new("L", (1, 1)).save(picture, "PNG")
    return b"".join(
        [
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n-\r\n'.encode(),
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="-"\r\n\r\n'.encode(),
            picture.getvalue(),
            f"\r\n--{BOUNDARY}--\r\n".encode(),
        ]
    )


def stand_in(scope: Scope, receive: Receive) -> Receive:
    """A `receive` that gives the small form, then what `receive` has; the scope's headers change to its own."""
    headers = MutableHeaders(raw=list(scope["headers"]))
    headers["Content-Type"] = f"multipart/form-data; boundary={BOUNDARY}"
    headers["Content-Length"] = str(len(_form()))
    del headers["Transfer-Encoding"]
    scope["headers"] = headers.raw
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": _form(), "more_body": False}

    return again
