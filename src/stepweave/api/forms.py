"""Multipart forms (RFC 7578): the fields and images of an edit."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, BinaryIO

from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from stepweave.api.auth import asker_of
from stepweave.api.bodies import SPOOLED
from stepweave.api.idempotency import joins
from stepweave.api.schemas import CHARSETS, NULL, BentoMLEditRequest, EditRequest, refused_field
from stepweave.errors import SHOWN, InvalidRequestError, RequestCancelledError, shown
from stepweave.parameters import Sources
from stepweave.serving.admission import Reservation
from stepweave.serving.server import Server
from stepweave.threads import on_thread

IMAGE_FILES = ("image", "mask")
REQUIRED = ("image",)
MAX_FIELDS = 64
MAX_FIELD_BYTES = 64 * 1024
MAX_TEXT_BYTES = 128 * 1024  # of all fields of a form, which are in memory
# including empty ones, which browsers send if no file was chosen
MAX_FILES = 8
BYTE_ORDER_MARK = "\ufeff"


class Form(contextlib.AbstractContextManager["Form"]):
    """A multipart form. Long files are on disk until `close`."""

    def __init__(
        self, texts: dict[str, str], files: dict[str, BinaryIO], warnings: Sequence[str] = ()
    ) -> None:
        self.texts = texts
        self.files = files
        self.warnings = warnings  # about files that count as absent
        self._users = 0
        self._closed = False

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Within the block its files stay open."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if self._closed:
                self.close()

    def close(self) -> None:
        self._closed = True
        if not self._users:
            for file in self.files.values():
                file.close()

    def __exit__(self, *_: object) -> None:
        self.close()


class _Parser(MultiPartParser):
    """Starlette's parser accepts a form that is cut short, and reads all files of one name."""

    spool_max_size = SPOOLED
    ended = False
    _texts = 0  # bytes

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._current_part.file is None:
            self._texts += end - start
            if self._texts > MAX_TEXT_BYTES:
                raise MultiPartException(
                    f"Fields exceeded the maximum size of {MAX_TEXT_BYTES // 1024}KB in all."
                )
        super().on_part_data(data, start, end)

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        part = self._current_part
        if part.file is not None and part.file.filename:
            name = _name(part.field_name)
            if any(
                isinstance(item, UploadFile) and item.filename and _name(other) == name
                for other, item in self.items
            ):
                raise _twice(name)

    def on_end(self) -> None:
        self.ended = True


async def read_form(request: Request, files: Sequence[str] = IMAGE_FILES) -> Form:
    """A multipart form. `image[]`, as OpenAI's clients name several, may hold one. What is empty
    counts as absent: a text, and a file without a name, as browsers send what was not filled in.

    Raises InvalidRequestError for a form that cannot be read, a name that comes twice, a field that
    is a file or the other way round.
    """
    _check_charset(request.headers.get("content-type", ""))
    limits = {"max_files": MAX_FILES, "max_fields": MAX_FIELDS, "max_part_size": MAX_FIELD_BYTES}
    parser = _Parser(request.headers, request.stream(), **limits)
    try:
        data = await parser.parse()
    except ClientDisconnect:
        raise RequestCancelledError("The client left while it sent the body.") from None
    except MultiPartException as error:
        raise InvalidRequestError(
            f"The form cannot be read: {error.message}", code="invalid_form"
        ) from None
    try:
        if not parser.ended:
            raise InvalidRequestError(
                "The form is cut short: its closing boundary is missing.", code="invalid_form"
            )
        return _sorted(data, files)
    except BaseException:
        await data.close()
        raise


def _sorted(data: FormData, files: Sequence[str]) -> Form:
    texts: dict[str, str] = {}
    found: dict[str, BinaryIO] = {}
    warnings: list[str] = []
    for given, value in data.multi_items():
        name = _name(given)
        if isinstance(value, str):
            value = value.removeprefix(BYTE_ORDER_MARK)
            if not value or (name in files and value == NULL):
                continue
        elif not value.size and (not value.filename or name not in REQUIRED):
            value.file.close()
            if value.filename and name in files:
                warnings.append(f"{name}: the file is empty, which counts as none.")
            continue
        if name in texts or name in found:
            raise _twice(name)
        if isinstance(value, str):
            if name in files:
                raise InvalidRequestError(
                    f"{name} is {shown(value)}; it must be a file.", param=name
                )
            texts[name] = value
        elif name in files:
            found[name] = value.file
        else:
            raise refused_field(name, EditRequest) or InvalidRequestError(
                f"{shown(name)} is a file; only {' and '.join(files)} may be.", param=name
            )
    return Form(texts, found, warnings)


def _name(given: str) -> str:
    return given.removesuffix("[]")


def _twice(name: str) -> InvalidRequestError:
    more = (
        "; an edit starts from one image: send that, or put them together into one"
        if name == "image"
        else ""
    )
    return InvalidRequestError(
        f"{name[:SHOWN]} is given more than once; the limit is one{more}.", param=name[:SHOWN]
    )


def _check_charset(content_type: str) -> None:
    """The form's parser accepts any of Python's codecs, also those that are not for text, as
    `undefined`."""
    charset = parse_options_header(content_type)[1].get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in CHARSETS:
        raise InvalidRequestError(
            f"The form's charset is {shown(charset)}; send utf-8.", code="invalid_form"
        )


async def reserve(request: Request, server: Server) -> Reservation:
    """A place for an edit, before its body is read. An edit whose key has a job already needs none,
    if few such edits are being read.

    Raises AdmissionError if there is no place, and reserves one for a retry with the same client,
    key and length.
    """
    told = tuple(request.headers.get(name) for name in ("content-length", "idempotency-key"))
    token = (request.url.path, *told)
    return server.reserve(token, asker_of(request), joins=await joins(request, server))


async def digest_of(form: Form) -> bytes:
    """A digest of an edit's files. Raises InvalidRequestError if the image is missing."""
    if "image" not in form.files:
        raise InvalidRequestError(
            "image is missing: send it as a file of the form.", code="missing_field", param="image"
        )

    def digest() -> bytes:
        digests = {name: hashlib.sha256() for name in IMAGE_FILES}
        for name, file in form.files.items():
            while chunk := file.read(SPOOLED):
                digests[name].update(chunk)
        return b"".join(digest.digest() for digest in digests.values())

    with form.used():
        return await on_thread(None, digest)


async def edit_of(
    form: Form, server: Server, body: EditRequest | BentoMLEditRequest, place: Reservation | None
) -> dict[str, Any]:
    """An edit's part of a submission. Its images are only decoded once they are needed: not for an
    edit that joins another, or is refused for its key. Raises as `digest_of` does."""
    return {
        "files": await digest_of(form),
        "sources": partial(read_images, form, server, body.size, place),
        "strength": body.strength,
        "reservation": place,
    }


async def read_images(
    form: Form, server: Server, size: str | None, place: Reservation | None
) -> Sources:
    """An edit's images, scaled to the size of the result: `size`, or the nearest to the image's
    own. A few are decoded at a time, in processes of their own that end if the awaiting task is
    cancelled. `place` is the edit's.

    Raises InvalidRequestError or UnsupportedMediaTypeError naming the one that cannot be read, and
    what `ServedModel.size_of_edit` does.
    """
    served, _ = server.ready(place)

    def fit(source: tuple[int, int], masked: bool) -> tuple[int, int]:
        return served.size_of_edit(source, size, masked=masked)

    with form.used():
        return await server.decoders.read_sources(form.files["image"], form.files.get("mask"), fit)
