"""A finished job, read from the stores."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from stepweave.errors import NotFoundError, RequestError, StepweaveError
from stepweave.parameters import ImageFile, ResponseFormat
from stepweave.serving.request import Update
from stepweave.serving.resources import RECORDED, Answer, ErrorDetail, GenerationDetails, JobView
from stepweave.store import FileStore, JobRecord

LOST = StepweaveError("The job's result could not be stored.", code="store_failed")
FLAGGED = "flagged"  # in a record's response: for each image, whether the pipeline flagged it


class StoredJob:
    """A finished job, with the interface of an ActiveRequest."""

    def __init__(self, record: JobRecord, files: FileStore) -> None:
        if not record.done:  # its end could not be stored
            record = replace(record, state="failed", error=ErrorDetail.of(LOST).model_dump())
        self.record = record
        self.id = record.id
        self.kind = record.kind
        self.response_format: ResponseFormat = record.request["response_format"]
        self._files = files

    def view(self) -> JobView:
        """The job without its result."""
        recorded = {name: getattr(self.record, name) for name in RECORDED}
        return JobView(parameters=self.record.request["parameters"], **recorded)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """No effect: there is nothing to cancel."""
        yield

    async def updates(self, *, progress: bool = True) -> AsyncIterator[Update | None]:
        """No updates."""
        return
        yield

    async def result(self) -> Answer:
        """The answer. Raises the job's error, and NotFoundError once its images have expired."""
        record = self.record
        if record.error is not None:
            raise _StoredError(record.error)
        response = dict(record.response or {})
        # records of older servers do not have it
        flagged = response.pop(FLAGGED, [False] * len(record.files))
        output_format = record.request["parameters"]["output_format"]
        # a pipeline may make several for each requested one, as a stack of layers
        each = max(1, len(record.files) // record.request["parameters"].get("n", 1))
        files = []
        for i, name in enumerate(record.files):
            file = await self._files.get(name)
            if file is None:
                raise NotFoundError(f"The images of job {self.id} have expired.", code="expired")
            seed = record.request["values"]["seed"] + i // each
            values = {**record.request["values"], "seed": seed}
            files.append(ImageFile(file.data, seed, values, output_format, name, flagged[i]))
        try:
            return Answer(GenerationDetails(**response), files)
        except ValidationError:
            raise NotFoundError(
                f"The result of job {self.id} was stored by another version of the server and "
                "cannot be read.",
                code="expired",
            ) from None


class _StoredError(RequestError):
    """A stored error, whatever its status was; a RequestError, as it has been logged before."""

    def __init__(self, error: Mapping[str, Any]) -> None:
        super().__init__(error["message"], param=error["param"])
        self.code = error["code"]
        vars(self)["type"] = error["type"]  # a class variable of all other errors
