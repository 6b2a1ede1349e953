"""Answers to a generation: JSON, the image itself, or a job to ask for later."""

from __future__ import annotations

import base64
import json
from typing import get_args

from starlette.requests import Request
from starlette.responses import Response

from stepweave.errors import InvalidRequestError, NotFoundError, StepweaveError, shown
from stepweave.parameters import (
    MEDIA_TYPES,
    ImageFile,
    OutputFormat,
    ResolvedParameters,
    component_texts,
    lora_text,
)
from stepweave.resource import without_del
from stepweave.serving.jobs import Followed
from stepweave.serving.resources import Answer, Generation, InlineImage, JobView, LinkedImage
from stepweave.store import FileStore
from stepweave.threads import on_thread

MAX_WARNINGS_HEADER = 4096  # bytes; proxies refuse headers of 8 KB
EVENT_STREAM = "text/event-stream"
IMAGE_TYPES: dict[str, OutputFormat] = {MEDIA_TYPES[name]: name for name in get_args(OutputFormat)}
PROFILE = "stepweave"  # of an event stream with all events


def accepted(request: Request) -> list[tuple[str, dict[str, str]]]:
    """The media types that the client accepts and their parameters, preferred ones first (RFC 9110,
    12.5.1)."""
    types: list[tuple[float, str, dict[str, str]]] = []
    for part in ",".join(request.headers.getlist("accept")).split(","):
        name, *rest = (piece.strip() for piece in part.split(";"))
        parameters = {
            key.strip().lower(): value.strip(' "')
            for key, _, value in (piece.partition("=") for piece in rest)
        }
        try:
            quality = float(parameters.pop("q", "1"))
        except ValueError:
            quality = 0.0
        if name and quality > 0:
            types.append((-quality, name.lower(), parameters))
    return [entry[1:] for entry in sorted(types, key=lambda entry: entry[0])]


def _preferred(request: Request) -> tuple[str, dict[str, str]]:
    """The type that the client prefers among those that a generation can be answered with; JSON if
    it names none."""
    offered = ("application/json", "*/*", "application/*", EVENT_STREAM, *IMAGE_TYPES)
    return next(
        (accept for accept in accepted(request) if accept[0] in offered), ("application/json", {})
    )


def wants_image(request: Request) -> OutputFormat | None:
    """The format of the image that the client prefers to JSON."""
    return IMAGE_TYPES.get(_preferred(request)[0])


def wants_stream(request: Request) -> dict[str, str] | None:
    """The parameters of the event stream that the client prefers to JSON."""
    name, parameters = _preferred(request)
    return parameters if name == EVENT_STREAM else None


def wants_to_come_back(request: Request) -> bool:
    """Whether the client prefers to ask for the result later (RFC 7240, 4.1)."""
    preferences = ",".join(request.headers.getlist("prefer")).lower().split(",")
    return "respond-async" in (each.partition(";")[0].strip() for each in preferences)


def check_one_image(
    n: int, chosen: OutputFormat, output_format: OutputFormat, format_given: bool
) -> None:
    """Raise InvalidRequestError if the client's `Accept` contradicts its body."""
    if n != 1:
        raise InvalidRequestError(
            f"n is {n}; an answer that is an image, as Accept asks for, takes n = 1.", param="n"
        )
    if format_given and output_format != chosen:
        raise InvalidRequestError(
            f"output_format is {shown(output_format)}, but Accept asks for {MEDIA_TYPES[chosen]}.",
            param="output_format",
        )


async def generation_of(answer: Answer, base: str | None, files: FileStore) -> Generation:
    """The answer with its images: as URLs that begin with `base`, each stored if it is not yet, or
    in base64 without one."""
    data: list[InlineImage | LinkedImage]
    if base is None:
        data = await on_thread(None, lambda: [_inline(file) for file in answer.images])
    else:
        data = [
            LinkedImage(url=await url_of(file, base, files), seed=file.seed, flagged=file.flagged)
            for file in answer.images
        ]
    return Generation(**dict(answer.details), data=data)


def _inline(file: ImageFile) -> InlineImage:
    return InlineImage(b64_json=in_base64(file.data), seed=file.seed, flagged=file.flagged)


async def job_of(job: Followed, files: FileStore, base: str | None) -> JobView:
    """The job, with its result once it has succeeded."""
    view = job.view()
    if view.state != "succeeded":
        return view
    try:
        result = await generation_of(await job.result(), base, files)
    except NotFoundError as error:  # it has expired
        return view.model_copy(update={"warnings": [*view.warnings, error.message]})
    return view.model_copy(update={"result": result})


async def job_accepted(job: Followed, files: FileStore, base: str | None) -> JobView:
    """The job, as it is told of at first: with its result if it has one already, and that can be
    stored. Whether it can be is not the request's fault, and the job itself tells later."""
    try:
        return await job_of(job, files, base)
    except StepweaveError:
        return job.view()


async def url_of(file: ImageFile, base: str, files: FileStore) -> str:
    """Where an image is; it is stored if it is not yet."""
    return f"{base}/images/{await file.stored(files)}"


def in_base64(data: bytes) -> str:
    """Not for the event loop's thread: images are large."""
    return base64.b64encode(data).decode()


def image_answer(answer: Answer) -> Response:
    """The first image's file.

    All parameters are in headers but prompts, and other texts and lists of the pipeline: proxies
    limit the length of a header, and the file has them. LoRAs are one text, and components too.
    `X-Stepweave-Flagged` is "true" for an image that the pipeline's safety checker flagged.
    Warnings, if there are any, are in `X-Stepweave-Warnings`.
    """
    file = answer.images[0]
    headers = {
        image_header(name): "true" if value is True else str(value)
        for name, value in file.values.items()
        if "prompt" not in name
        and not isinstance(value, list)
        and (name in ResolvedParameters.model_fields or isinstance(value, (int, float)))
    }
    for name, text in component_texts(file.values).items():
        headers[image_header(name)] = text
    if lora := lora_text(file.values):
        headers["X-Stepweave-Lora"] = lora
    if file.flagged:
        headers["X-Stepweave-Flagged"] = "true"
    if answer.details.warnings:
        headers["X-Stepweave-Warnings"] = warnings_header(answer.details.warnings)
    return Response(file.data, media_type=MEDIA_TYPES[file.output_format], headers=headers)


def image_header(name: str) -> str:
    """The header with a parameter of an image."""
    return f"X-Stepweave-{name.replace('_', '-').title()}"


def warnings_header(warnings: list[str]) -> str:
    """Warnings as a JSON list in ASCII (other characters are \\u escapes); those that do not fit
    are counted in a last one."""
    kept = list(warnings)
    while True:
        more = len(warnings) - len(kept)
        text = without_del(json.dumps([*kept, *([f"and {more} more"] if more else [])]))
        if len(text) <= MAX_WARNINGS_HEADER or not kept:
            return text
        kept.pop()
