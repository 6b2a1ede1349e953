"""The images of a request: files of a form (RFC 7578), or data URLs in JSON (RFC 2397)."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from tempfile import SpooledTemporaryFile
from typing import Any, BinaryIO, TypeVar

from pydantic_core import from_json, to_json
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from stepweave.api.auth import asker_of
from stepweave.api.bodies import SPOOLED, whole_body
from stepweave.api.idempotency import joins
from stepweave.api.model_fields import with_fields
from stepweave.api.schemas import (
    CHARSETS,
    MAX_SAME,
    NULL,
    EditRequest,
    ImageReference,
    parse_off_loop,
    refused_field,
)
from stepweave.calls import RequestFields, has_scalar, takes_lists
from stepweave.errors import SHOWN, InvalidRequestError, RequestCancelledError, did_you_mean, shown
from stepweave.images.decoders import UploadedFile
from stepweave.parameters import ImageRequest, Sources
from stepweave.serving.admission import Reservation
from stepweave.serving.kinds import OF_COMPONENTS
from stepweave.serving.server import Server
from stepweave.threads import on_thread

RequestT = TypeVar("RequestT", bound=ImageRequest)

IMAGE, MASK = "image", "mask"
REQUIRED = (IMAGE,)
MAX_FIELDS = 256  # lists may come element by element
MAX_FIELD_BYTES = 64 * 1024
MAX_TEXT_BYTES = 128 * 1024  # of all fields of a form, which are in memory
# including empty ones, which browsers send if no file was chosen
MAX_FILES = 24
_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)
BYTE_ORDER_MARK = "\ufeff"


class Form(contextlib.AbstractContextManager["Form"]):
    """The texts and files of a request. Long files are on disk until `close`."""

    def __init__(
        self, texts: dict[str, str], files: Sequence[UploadedFile], warnings: Sequence[str] = ()
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
            for file in self.files:
                if not isinstance(file.content, bytes):
                    file.content.close()

    def __exit__(self, *_: object) -> None:
        self.close()


class _Parser(MultiPartParser):
    """Starlette's parser accepts a form that is cut short, and reads any number of files of one
    name."""

    spool_max_size = SPOOLED
    ended = False
    several: Collection[str] = (IMAGE,)  # names of which there may be several
    same: Mapping[str, str]  # names that mean others
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
            name = _name(part.field_name, self.same)
            same = sum(
                isinstance(item, UploadFile)
                and bool(item.filename)
                and _name(other, self.same) == name
                for other, item in self.items
            )
            if same and (name not in self.several or same >= MAX_SAME):
                raise _too_many(name, MAX_SAME if name in self.several else 1)

    def on_end(self) -> None:
        self.ended = True


async def read_form(request: Request, fields: RequestFields) -> Form:
    """A multipart form, whose files are the images and tensors of `fields`; a tensor becomes a text
    in base64, as JSON has it. Several of one name may be named as in `image[]`. What is empty
    counts as absent: a text, and a file without a name, as browsers send what was not filled in.

    Raises InvalidRequestError for a form that cannot be read, a name that comes too often, a field
    that is a file or the other way round.
    """
    _check_charset(request.headers.get("content-type", ""))
    limits = {"max_files": MAX_FILES, "max_fields": MAX_FIELDS, "max_part_size": MAX_FIELD_BYTES}
    parser = _Parser(request.headers, request.stream(), **limits)
    parser.same = fields.same
    known = _files_of(fields)
    parser.several = [name for name, is_mask in known.items() if not is_mask]
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
        lists = {"lora": True} | {
            name: has_scalar(field.argument.value, str)
            for name, field in fields.arguments.items()
            if takes_lists(field.argument.value)
        }
        return _sorted(await _with_tensors(data, fields.tensors), known, fields.same, lists)
    except BaseException:
        await data.close()
        raise


async def _with_tensors(data: FormData, names: Collection[str]) -> list[tuple[str, Any]]:
    """A form's fields, of which files of these names are texts in base64."""

    def text_of(file: UploadFile) -> str:
        with file.file:
            return base64.b64encode(file.file.read()).decode()

    return [
        (
            name,
            await on_thread(None, text_of, value)
            if isinstance(value, UploadFile) and (name.removesuffix("[]") or name) in names
            else value,
        )
        for name, value in data.multi_items()
    ]


def _sorted(
    items: Iterable[tuple[str, Any]],
    known: dict[str, bool],
    same: Mapping[str, str],
    lists: Mapping[str, bool],
) -> Form:
    """`known` are the names of files, and whether each is a mask; `same` are names that mean
    others; `lists` are arguments whose elements may come one by one, and whether they are texts."""
    texts: dict[str, str] = {}
    elements: dict[str, list[str]] = {}
    found: list[UploadedFile] = []
    warnings: list[str] = []
    for given, value in items:
        name = _name(given, same)
        if isinstance(value, str):
            value = value.removeprefix(BYTE_ORDER_MARK)
            if not value or (name in known and value == NULL):
                continue
        elif not value.size and (not value.filename or name not in REQUIRED):
            value.file.close()
            if value.filename and name in known:
                warnings.append(f"{name}: the file is empty, which counts as none.")
            continue
        if isinstance(value, str) and name in lists:
            elements.setdefault(name, []).append(value)
            continue
        if name in texts or (isinstance(value, str) and any(name == one.name for one in found)):
            raise _too_many(name, 1)
        if isinstance(value, str):
            if name in known:
                raise InvalidRequestError(
                    f"{name} is {shown(value)}; it must be a file. JSON takes data URLs.",
                    param=name,
                )
            texts[name] = value
        elif name in known:
            found.append(UploadedFile(name, value.file, known[name]))
        else:
            raise refused_field(name, EditRequest) or InvalidRequestError(
                f"{shown(name)} is a file{did_you_mean(name, known)}; only "
                f"{' and '.join(known)} may be.",
                param=name,
            )
    for name, several in elements.items():
        texts[name] = several[0] if len(several) == 1 else _as_list(several, words=lists[name])
    return Form(texts, found, warnings)


def _as_list(several: list[str], *, words: bool) -> str:
    """The elements of a list that came one by one, as JSON."""
    values: list[Any] = []
    for text in several:
        try:
            values.append(text if words else from_json(text))
        except ValueError:
            values.append(text)
    return to_json(values).decode()


def _files_of(fields: RequestFields) -> dict[str, bool]:
    """The names of files, and whether each is a mask; `image` and `mask` are known to all models,
    which say themselves that they take none."""
    return {IMAGE: False, MASK: True} | {
        name: argument.type == "mask" for name, argument in fields.files.items()
    }


def _name(given: str, same: Mapping[str, str]) -> str:
    """A field's name, without the brackets of one that may come several times."""
    name = given.removesuffix("[]") or given
    return same.get(name, name)


def _too_many(name: str, limit: int) -> InvalidRequestError:
    often = "more than once" if limit == 1 else f"more than {limit} times"
    return InvalidRequestError(
        f"{name[:SHOWN]} is given {often}; the limit is {limit}.", param=name[:SHOWN]
    )


async def data_urls_of(body: RequestT, fields: RequestFields) -> tuple[RequestT, Form]:
    """The request without its images, and these. Raises InvalidRequestError for a URL that is no
    data URL, which this server does not fetch."""
    given = {
        name: value for name in body.IMAGES if (value := getattr(body, name, None)) is not None
    }
    if not given:
        return body, Form({}, ())
    files = await on_thread(None, _decoded, given, fields)
    return body.model_copy(update=dict.fromkeys(given)), Form({}, files)


async def read_json(
    request: Request, server: Server, schema: type[RequestT], place: Reservation | None = None
) -> tuple[RequestT, Form]:
    """The request of a JSON body with the fields of the model, and its images, for which alone
    memory is kept. Raises UnavailableError if the server is not ready, unless the request has a
    `place`."""
    async with whole_body(request) as content:
        if place is None:
            server.ready()
        fields = server.fields
        given = await parse_off_loop(content, with_fields(schema, fields))
    return await data_urls_of(given, fields)


async def place_for(
    request: Request, server: Server, form: Form
) -> contextlib.AbstractContextManager[Reservation | None]:
    """A place for a request with images that came without one, before they are decoded; none for
    one without images. Raises as `reserve` does."""
    if not form.files:
        return contextlib.nullcontext()
    place = await reserve(request, server)
    place.settle()
    return place


def form_of_bytes(files: Mapping[str, Sequence[bytes]], fields: RequestFields) -> Form:
    """The images of a request that has them as bytes, by name."""
    masks = _files_of(fields)
    found = [
        UploadedFile(name, content, masks[name])
        for name, contents in files.items()
        for content in contents
    ]
    return Form({}, found)


def _decoded(given: dict[str, Any], fields: RequestFields) -> list[UploadedFile]:
    files: list[UploadedFile] = []
    masks = _files_of(fields)
    with contextlib.ExitStack() as exits:  # closes them if one is refused
        for name, value in given.items():
            meant = _name(name, fields.same)
            if any(meant == file.name for file in files):
                raise _too_many(meant, 1)
            for one in value if isinstance(value, list) else [value]:
                url = one.image_url if isinstance(one, ImageReference) else one
                file = exits.enter_context(_spooled(_bytes_of(url, name)))
                files.append(UploadedFile(meant, file, masks[meant]))
        exits.pop_all()
    return files


def _spooled(content: bytes) -> BinaryIO:
    """A file in memory, or on disk if it is long, since requests wait with theirs."""
    file: Any = SpooledTemporaryFile(SPOOLED)
    file.write(content)
    return file  # type: ignore[no-any-return]


def _bytes_of(url: str, name: str) -> bytes:
    head = _DATA_URL.match(url)
    if head is None:
        raise InvalidRequestError(
            f"{name} is {shown(url)}; send the image itself, as a data URL "
            "(data:image/png;base64,...): this server fetches none.",
            param=name,
        )
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequestError(
            f"{name} is a data URL whose base64 cannot be read.", param=name
        ) from None


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
    """A digest of a request's files. Raises InvalidRequestError if there are none."""
    if not form.files:
        raise InvalidRequestError(
            "image is missing: send it as a file of the form, or as a data URL in JSON.",
            code="missing_field",
            param=IMAGE,
        )

    def digest() -> bytes:
        digests = []
        for file in form.files:
            content = file.content
            digest = hashlib.sha256(f"{file.name}\0".encode())
            if isinstance(content, bytes):
                digest.update(content)
            else:
                content.seek(0)
                while chunk := content.read(SPOOLED):
                    digest.update(chunk)
            digests.append(digest.digest())
        return b"".join(digests)

    with form.used():
        return await on_thread(None, digest)


async def edit_of(
    form: Form, server: Server, body: ImageRequest, place: Reservation | None
) -> dict[str, Any]:
    """An edit's part of a submission. Its images are only decoded once they are needed: not for an
    edit that joins another, or is refused for its key. Raises as `digest_of` does, and by
    its name for the image of a component."""
    if not form.files:
        server.ready(place)[0].check_shown(body)
    return {
        "files": await digest_of(form),
        "sources": partial(read_images, form, server, body.size, place),
        "reservation": place,
    }


async def read_images(
    form: Form, server: Server, size: str | None, place: Reservation | None
) -> Sources:
    """A request's images, as the model takes them: `ServedModel.size_of_edit`. A few are decoded at
    a time, in processes of their own that end if the awaiting task is cancelled. `place` is the
    edit's.

    Raises InvalidRequestError or UnsupportedMediaTypeError naming the one that cannot be read, and
    what `ServedModel.check_counts` and `size_of_edit` do.
    """
    served, _ = server.ready(place)
    counts = Counter(file.name for file in form.files)
    served.check_counts(counts)
    leading = served.leading(counts)
    hints = served.hints(counts)
    files = [replace(file, is_hint=file.name in hints) for file in form.files]

    def fit(name: str, source: tuple[int, int], masked: bool) -> tuple[int, int]:
        if name != leading or name in OF_COMPONENTS:
            return served.size_of_reference(source, len(form.files))
        return served.size_of_edit(source, size, masked=masked, count=len(form.files))

    with form.used():
        return await server.decoders.read_sources(
            files,
            leading,
            fit,
            alpha=served.takes_alpha,
            stencils=served.is_repainted(leading) and leading not in hints,
        )
