"""Runs the processes that decode uploads, so that decoding can be ended and does not block the
server's threads.

The process pools of the standard library and anyio do not fit: they run the server's main module in
each process, and the former cannot end one call.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

import stepweave
from stepweave.errors import (
    InvalidRequestError,
    RequestCancelledError,
    StepweaveError,
    UnavailableError,
    UnsupportedMediaTypeError,
)
from stepweave.images.decoder_process import READY
from stepweave.images.uploads import Fit, Size
from stepweave.parameters import Sources
from stepweave.threads import DaemonExecutor, on_thread

DECODERS = 2  # processes
SECONDS = 10.0  # limit of decoding the files of a request
START_SECONDS = 60.0  # limit of the start of a process, on a busy machine
ANSWER_BYTES = 1 << 20  # limit of a process's answer without images
# environment variables that processes get
KEPT = re.compile(r"PATH|HOME|LANG|LC_\w+|TZ|TMPDIR|LD_LIBRARY_PATH|PYTHON\w+")
_COMMAND = (sys.executable, "-P", "-W", "ignore", "-m", "stepweave.images.decoder_process")


def as_it_is(name: str, size: Size, masked: bool) -> Size:
    """Keep an image's size."""
    return size


@dataclass(frozen=True)
class UploadedFile:
    """A file of a request, not decoded yet, by the request's name."""

    name: str
    content: bytes | BinaryIO
    is_mask: bool = False
    is_hint: bool = False  # guides a component, and has a black background


class Decoders:
    """At most `DECODERS` processes, started when needed and reused. For any event loop.
    `max_pixels` is the limit of each uploaded image."""

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._idle: list[_Process] = []  # the last used one last
        self._all: set[_Process] = set()
        self._closed = False
        self._lock = threading.Lock()
        self._threads = DaemonExecutor(DECODERS, "stepweave-decode")  # each waits for one process
        self.waiting = 0  # requests whose files are being decoded or wait for it

    async def read_sources(
        self,
        files: Sequence[UploadedFile],
        leading: str = "image",
        fit: Fit = as_it_is,
        *,
        alpha: bool = False,
        stencils: bool = True,
    ) -> Sources:
        """Call `uploads.read_sources` in a process, which is ended if the awaiting task is
        cancelled. Files are read only when a process is free, to save memory. `fit` is called on
        another thread.

        Also raises InvalidRequestError, code `image_too_slow`, after `SECONDS`; StepweaveError,
        code `decoder_failed`, if the process dies or cannot be started; UnavailableError after
        `close`.
        """
        with self._lock:
            self._check_open()
        task = _Task(files, leading, fit, alpha=alpha, stencils=stencils)
        self.waiting += 1
        try:
            return await on_thread(self._threads, self._run, task)
        except asyncio.CancelledError:
            task.end("cancelled")
            raise
        finally:
            self.waiting -= 1

    def close(self) -> None:
        """End all processes. A busy one's connection is closed by the thread that reads it, since
        the number of a closed one may already be another file's."""
        with self._lock:
            self._closed = True
            processes, idle, self._idle = list(self._all), self._idle, []
        self._threads.shutdown(wait=False)
        for process in processes:
            process.kill()
        for process in idle:
            self._end(process)
        for process in processes:
            process.wait()

    def _run(self, task: _Task) -> Sources:
        if task.ended is not None:
            raise RequestCancelledError()
        process = self._take()
        try:
            return task.run(process)
        finally:
            with self._lock:
                kept = process.usable and not self._closed
                if kept:
                    self._idle.append(process)
            if not kept:
                self._end(process)

    def _take(self) -> _Process:
        with self._lock:
            self._check_open()
            idle = self._idle.pop() if self._idle else None
        if idle is not None:
            if idle.alive:
                return idle
            self._end(idle)  # it has died
        try:
            process = _Process(self._max_pixels)
        except OSError as error:
            message = f"The process that decodes images could not be started ({error.strerror})."
            raise StepweaveError(message, code="decoder_failed") from error
        try:
            with self._lock:
                self._all.add(process)
                self._check_open()
            process.wait_until_ready()
        except BaseException:
            self._end(process)
            raise
        return process

    def _check_open(self) -> None:
        if self._closed:
            raise UnavailableError("The server has shut down.", code="draining", retry_after=None)

    def _end(self, process: _Process) -> None:
        process.kill()
        process.wait()
        process.close()
        with self._lock:
            self._all.discard(process)


class _Task:
    """The files of a request. `end` is for any thread."""

    def __init__(
        self,
        files: Sequence[UploadedFile],
        leading: str = "image",
        fit: Fit = as_it_is,
        *,
        alpha: bool = False,
        stencils: bool = True,
    ) -> None:
        self._files = files
        self._options = {"leading": leading, "alpha": alpha, "stencils": stencils}
        self._fit = fit
        self.ended: str | None = None  # the reason: cancelled or slow
        self._process: _Process | None = None  # runs the task
        self._lock = threading.Lock()

    def end(self, reason: str) -> None:
        """Kill the process that runs the task."""
        with self._lock:
            self.ended = self.ended or reason
            if self._process is not None:
                self._process.kill()

    def run(self, process: _Process) -> Sources:
        with self._lock:
            self._process = process
            if self.ended is not None:
                raise RequestCancelledError()
        timer = threading.Timer(SECONDS, self.end, ["slow"])
        timer.daemon = True
        timer.start()
        try:
            return process.decode(self._files, self._options, self._fit)
        except (EOFError, OSError):
            raise self._died(process) from None
        finally:
            timer.cancel()
            with self._lock:  # from now on the process is not killed
                self._process = None

    def _died(self, process: _Process) -> StepweaveError:
        if self.ended == "cancelled":
            return RequestCancelledError()
        if self.ended == "slow":
            files = " and ".join(dict.fromkeys(file.name for file in self._files))
            message = f"{files} took more than {SECONDS:g} s to decode; the limit is {SECONDS:g} s."
            param = self._files[0].name
            return InvalidRequestError(message, code="image_too_slow", param=param)
        status = process.kill_and_wait()
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        return StepweaveError(
            f"The process that decodes images ended with {how}.", code="decoder_failed"
        )


class _Process:
    """One decoder process, and the connection to it. `decode` and `close` are for one thread at a
    time, `kill` and `wait` for any."""

    def __init__(self, max_pixels: int) -> None:
        ours, its = socket.socketpair()
        with its:
            try:
                self._process = subprocess.Popen(
                    [*_COMMAND, str(its.fileno()), str(max_pixels)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[its.fileno()],
                    env=_environment(),
                    # Ctrl-C in a terminal must only reach the server, which finishes its work
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        self._max_pixels = max_pixels
        self._connection = Connection(ours.detach())
        self.usable = False  # for another task

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def wait_until_ready(self) -> None:
        """Wait for the process. Raises StepweaveError if it does not start."""
        with contextlib.suppress(EOFError, OSError):
            if self._connection.poll(START_SECONDS) and self._connection.recv_bytes() == READY:
                self.usable = True
                return
        raise StepweaveError(
            "The process that decodes images did not start.", code="decoder_failed"
        )

    def decode(self, files: Sequence[UploadedFile], options: dict[str, Any], fit: Fit) -> Sources:
        """Decode a request's files. Raises the process's error, that of `fit`, or EOFError or
        OSError if it dies."""
        self.usable = False
        connection = self._connection
        told = [
            {"name": file.name, "is_mask": file.is_mask, "is_hint": file.is_hint} for file in files
        ]
        connection.send_bytes(json.dumps({"files": told, "options": options}).encode())
        for file in files:
            content = file.content
            if isinstance(content, bytes):
                connection.send_bytes(content)
            else:
                content.seek(0)
                connection.send_bytes(content.read())
        answer = json.loads(connection.recv_bytes(ANSWER_BYTES))
        asked = 0
        # limited: a process that a malicious file has taken over must not ask for ever
        while "size" in answer and asked < len(files):
            asked += 1
            self._send_size(answer, fit)
            answer = json.loads(connection.recv_bytes(ANSWER_BYTES))
        # limited, like the answer: a process that a malicious file has taken over must not fill the
        # server's memory
        most = len("RGBA") * self._max_pixels
        found: dict[str, tuple[Image.Image, ...]] = {}
        for image in answer.get("images", ())[: len(files) + 1]:  # a mask may be added
            decoded = _image(image["mode"], image["size"], connection.recv_bytes(most))
            found[image["name"]] = (*found.get(image["name"], ()), decoded)
        self.usable = True
        if "error" in answer:
            error = answer["error"]
            unsupported = answer["status"] == UnsupportedMediaTypeError.status
            kind = UnsupportedMediaTypeError if unsupported else InvalidRequestError
            raise kind(error["message"], code=error["code"], param=error["param"])
        return Sources(found, tuple(answer["warnings"]))

    def _send_size(self, asked: dict[str, Any], fit: Fit) -> None:
        width, height = asked["size"]
        try:
            wanted = fit(asked["name"], (width, height), asked["masked"])
        except BaseException:
            self._connection.send_bytes(json.dumps({"size": None}).encode())
            self.usable = True  # it sends no answer
            raise
        self._connection.send_bytes(json.dumps({"size": wanted}).encode())

    def kill(self) -> None:
        self._process.kill()

    def kill_and_wait(self) -> int:
        """Return its exit status, negative for a signal."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(1)  # its connection is closed, so it is about to end
        self._process.kill()
        return self._process.wait()

    def wait(self) -> None:
        """Wait for the end of a killed process, so that no zombie remains. For any thread."""
        self._process.wait()

    def close(self) -> None:
        """Close the connection, once the process has ended."""
        self._connection.close()


def _image(mode: str, size: list[int], data: bytes) -> Image.Image:
    return Image.frombytes(mode, (size[0], size[1]), data)


def _environment() -> dict[str, str]:
    """The environment variables that Python needs, since others may be secret; numpy gets one
    thread."""
    root = str(Path(stepweave.__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, sys.path)])
    kept = {name: value for name, value in os.environ.items() if KEPT.fullmatch(name)}
    return kept | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
