"""A short body in place of a native API's own, for BentoML.

The body itself has been read by then. BentoML would decode an edit's images once more, by the types
that the client declares, and answer 500 for an `image/jpg`, which is none, or a PNG that is called
WebP.
"""

from __future__ import annotations

import functools
import io

from PIL import Image
from starlette.datastructures import MutableHeaders
from starlette.types import Message, Receive, Scope

BOUNDARY = "short-form"


@functools.cache
def _form() -> bytes:
    image = io.BytesIO()
    Image.new("L", (1, 1)).save(image, "PNG")
    return b"".join(
        [
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n-\r\n'.encode(),
            (
                f"--{BOUNDARY}\r\n"
                'Content-Disposition: form-data; name="image"; filename="-"\r\n\r\n'
            ).encode(),
            image.getvalue(),
            f"\r\n--{BOUNDARY}--\r\n".encode(),
        ]
    )


def short_form(scope: Scope, receive: Receive) -> Receive:
    """As `short_body`, with a form of a prompt and an image of one pixel."""
    return short_body(scope, receive, f"multipart/form-data; boundary={BOUNDARY}", _form())


def short_body(scope: Scope, receive: Receive, content_type: str, body: bytes) -> Receive:
    """A `receive` that gives the body, then what `receive` has; the scope's headers change to its
    own."""
    headers = MutableHeaders(raw=list(scope["headers"]))
    headers["Content-Type"] = content_type
    headers["Content-Length"] = str(len(body))
    del headers["Transfer-Encoding"]
    scope["headers"] = headers.raw
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
