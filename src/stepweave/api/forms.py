"""Multipart forms (RFC 7578): the fields and pictures of an edit."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import BinaryIO

from python_multipart.multipart import parse_options_header
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from stepweave.api.auth import asker_of
from stepweave.api.bodies import SPOOLED
from stepweave.api.disconnect import until_disconnect
from stepweave.api.idempotency import joins
from stepweave.errors import Cancelled, InvalidRequest, shown
from stepweave.generation import Sources
from stepweave.scheduling.admission import Reservation
from stepweave.server import Server
from stepweave.threads import on_thread

PICTURES = ("image", "mask")
MAX_FIELDS = 64
MAX_FIELD_BYTES = 64 * 1024
MultiPartParser.spool_max_size = SPOOLED  # of a file of a form, in bytes: the rest goes to disk
CHARSETS = ("utf-8", "utf8", "us-ascii", "ascii")


@contextlib.asynccontextmanager
async def read_form(
    request: Request, files: Sequence[str] = PICTURES
) -> AsyncIterator[tuple[dict[str, str], dict[str, BinaryIO]]]:
    """The fields and the files of a multipart form. `image[]`, as OpenAI's clients name several, may hold one. The files are on
    disk if they are long, and end with the block.

    Raises InvalidRequest for a form that cannot be read, a name that comes twice, a field that is a file or the other way round.
    """
    _check_charset(request.headers.get("content-type", ""))
    texts: dict[str, str] = {}
    found: dict[str, BinaryIO] = {}
    try:
        async with request.form(max_files=len(files), max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES) as form:
            for name, value in form.multi_items():
                name = name.removesuffix("[]")
                if name in texts or name in found:
                    raise InvalidRequest(f"{name} is given more than once; the limit is one.", param=name)
                if isinstance(value, str):
                    if name in files:
                        raise InvalidRequest(f"{name} is {shown(value)}; it must be a file.", param=name)
                    texts[name] = value
                elif name in files:
                    found[name] = value.file
                else:
                    raise InvalidRequest(f"{shown(name)} is a file; only {' and '.join(files)} may be.", param=name)
            yield texts, found
    except ClientDisconnect:
        raise Cancelled("The client left while it sent the body.") from None
    except (MultiPartException, HTTPException) as error:  # within an app Starlette makes the one into the other
        reason = error.message if isinstance(error, MultiPartException) else error.detail
        raise InvalidRequest(f"The form cannot be read: {reason}", code="invalid_form") from None


def _check_charset(content_type: str) -> None:
    """Python has codecs under names that are no text's, as `undefined`, and the form's reader takes whatever it finds."""
    charset = parse_options_header(content_type)[1].get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in CHARSETS:
        raise InvalidRequest(f"The form's charset is {shown(charset)}; send utf-8.", code="invalid_form")


async def reserve(request: Request, server: Server) -> Reservation:
    """A place for an edit, before its body is read. One that may join a job by its key has none.

    Raises Refused if there is no place; one is promised to a request of the same client, key and length.
    """
    if await joins(request, server):
        return Reservation()
    told = tuple(request.headers.get(name) for name in ("content-length", "idempotency-key"))
    return server.reserve((request.url.path, *told), asker_of(request))


async def read_pictures(
    request: Request, files: Mapping[str, BinaryIO], server: Server, place: Reservation
) -> tuple[Sources, bytes]:
    """An edit's images, and a digest of their files. The request's body must have been read.

    A few are decoded at a time, in processes of their own that end if the client leaves. Raises InvalidRequest naming the one
    that is missing, or cannot be read; Refused if the place has lapsed while the body was sent; Cancelled if the client leaves.
    """
    if "image" not in files:
        raise InvalidRequest("image is missing: send it as a file of the form.", code="missing_field", param="image")
    place.settle()
    digest = await on_thread(None, _digest, files)
    return await until_disconnect(request, server.decoders.read_sources(files["image"], files.get("mask"))), digest


def _digest(files: Mapping[str, BinaryIO]) -> bytes:
    digests = {name: hashlib.sha256() for name in PICTURES}
    for name, file in files.items():
        while chunk := file.read(SPOOLED):
            digests[name].update(chunk)
    return b"".join(one.digest() for one in digests.values())
