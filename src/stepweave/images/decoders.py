"""Processes that decode uploads: decoding can be ended, and takes no time of the server's own
threads.

The standard library's and anyio's pools of processes do not fit: they run the main module of the
server in each process, and the former cannot end one call.
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
SECONDS = 10.0  # that decoding the files of a request may take
START_SECONDS = 60.0  # that a process may take to start, on a busy machine
ANSWER_BYTES = 1 << 20  # of what a process may tell beside images
# environment variables
KEPT = re.compile(r"PATH|HOME|LANG|LC_\w+|TZ|TMPDIR|LD_LIBRARY_PATH|PYTHON\w+")


def as_it_is(size: Size, masked: bool) -> Size:
    """Keeps an image's size."""
    return size


class Decoders:
    """At most `DECODERS` processes, begun as they are needed and used again. Usable from any event
    loop.

    `max_pixels` is the limit of each image that is sent.
    """

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._idle: list[_Process] = []  # the one that was used last is last
        self._all: set[_Process] = set()
        self._closed = False
        self._lock = threading.Lock()
        self._threads = DaemonExecutor(DECODERS, "stepweave-decode")  # each waits for one process
        self.waiting = 0  # requests whose files are being decoded, or wait for that

    async def read_sources(
        self, image: bytes | BinaryIO, mask: bytes | BinaryIO | None, fit: Fit = as_it_is
    ) -> Sources:
        """As `uploads.read_sources`, in a process that is ended if the awaiting task is cancelled.

        Files are read once there is a process for them, so that those that wait are not in memory.
        `fit` is called on a thread.

        Raises also InvalidRequestError, code `image_too_slow`, for what is not decoded within
        `SECONDS`, StepweaveError, code `decoder_failed`, if the process dies or cannot be started,
        and UnavailableError once it is closed.
        """
        with self._lock:
            self._check_open()
        task = _Task(image, mask, fit)
        self.waiting += 1
        try:
            return await on_thread(self._threads, self._run, task)
        except asyncio.CancelledError:
            task.end("cancelled")
            raise
        finally:
            self.waiting -= 1

    def close(self) -> None:
        """End all processes, and what they do."""
        with self._lock:
            self._closed = True
            processes = list(self._all)
        self._threads.shutdown(wait=False)
        for process in processes:
            process.kill()
        for process in processes:
            process.reap()

    def _run(self, task: _Task) -> Sources:
        if task.ended is not None:
            raise RequestCancelledError()
        process = self._take()
        try:
            return task.run(process)
        finally:
            if process.usable:
                with self._lock:
                    self._idle.append(process)
            else:
                self._end(process)

    def _take(self) -> _Process:
        with self._lock:
            self._check_open()
            idle = self._idle.pop() if self._idle else None
        if idle is not None:
            if idle.alive:
                return idle
            self._end(idle)  # it died meanwhile
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
        process.reap()
        with self._lock:
            self._all.discard(process)


class _Task:
    """The files of a request. It may be ended from any thread."""

    def __init__(
        self, image: bytes | BinaryIO, mask: bytes | BinaryIO | None, fit: Fit = as_it_is
    ) -> None:
        self._image = image
        self._mask = mask
        self._fit = fit
        self.ended: str | None = None  # why, if it was: cancelled or slow
        self._process: _Process | None = None  # that runs it
        self._lock = threading.Lock()

    def end(self, reason: str) -> None:
        """Kill the process that runs it."""
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
            return process.decode(self._image, self._mask, self._fit)
        except (EOFError, OSError):
            raise self._died(process) from None
        finally:
            timer.cancel()
            with self._lock:  # from here on nobody kills the process
                self._process = None

    def _died(self, process: _Process) -> StepweaveError:
        if self.ended == "cancelled":
            return RequestCancelledError()
        if self.ended == "slow":
            files = "image" if self._mask is None else "image and mask"
            message = f"{files} took more than {SECONDS:g} s to decode; the limit is {SECONDS:g} s."
            return InvalidRequestError(message, code="image_too_slow", param="image")
        status = process.kill_and_wait()
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        return StepweaveError(
            f"The process that decodes images ended with {how}.", code="decoder_failed"
        )


class _Process:
    """One decoder process, and the connection to it. `decode` is for one thread at a time, `kill`
    for any."""

    def __init__(self, max_pixels: int) -> None:
        ours, its = socket.socketpair()
        with its:
            try:
                self._process = subprocess.Popen(
                    [
                        sys.executable,
                        "-P",
                        "-W",
                        "ignore",
                        "-m",
                        "stepweave.images.decoder_process",
                        str(its.fileno()),
                        str(max_pixels),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[its.fileno()],
                    env=_environment(),
                    # Ctrl-C in a terminal is the server's, which lets work finish
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
        """Raises StepweaveError if it does not come up."""
        with contextlib.suppress(EOFError, OSError):
            if self._connection.poll(START_SECONDS) and self._connection.recv_bytes() == READY:
                self.usable = True
                return
        raise StepweaveError(
            "The process that decodes images did not start.", code="decoder_failed"
        )

    def decode(self, image: bytes | BinaryIO, mask: bytes | BinaryIO | None, fit: Fit) -> Sources:
        """Raises what the process tells of, and what `fit` does; EOFError or OSError if it dies."""
        self.usable = False
        connection = self._connection
        connection.send_bytes(json.dumps({"mask": mask is not None}).encode())
        for file in (image, mask):
            if file is not None:
                connection.send_bytes(file if isinstance(file, bytes) else _whole(file))
        answer = json.loads(connection.recv_bytes(ANSWER_BYTES))
        if "size" in answer:
            self._tell_size(answer, fit)
            answer = json.loads(connection.recv_bytes(ANSWER_BYTES))
        # bounded, as is what it may tell: a file that has taken the process over must not fill the
        # server's memory
        most = len("RGBA") * self._max_pixels
        images = [
            _image(image["mode"], image["size"], connection.recv_bytes(most))
            for image in answer.get("images", ())
        ]
        self.usable = True
        if "error" in answer:
            error = answer["error"]
            kind = (
                UnsupportedMediaTypeError
                if answer["status"] == UnsupportedMediaTypeError.status
                else InvalidRequestError
            )
            raise kind(error["message"], code=error["code"], param=error["param"])
        image_read, mask_read = images if len(images) == 2 else (images[0], None)
        return Sources(image_read, mask_read, tuple(answer["warnings"]))

    def _tell_size(self, asked: dict[str, Any], fit: Fit) -> None:
        width, height = asked["size"]
        try:
            wanted = fit((width, height), asked["masked"])
        except BaseException:
            self._connection.send_bytes(json.dumps({"size": None}).encode())
            self.usable = True  # it answers nothing more
            raise
        self._connection.send_bytes(json.dumps({"size": wanted}).encode())

    def kill(self) -> None:
        self._process.kill()

    def kill_and_wait(self) -> int:
        """Its exit status, negative for a signal."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(1)  # it has closed its connection, so it is about to end
        self._process.kill()
        return self._process.wait()

    def reap(self) -> None:
        """Wait for one that was killed, so that no zombie is left."""
        self._process.wait()
        self._connection.close()


def _whole(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read()


def _image(mode: str, size: list[int], data: bytes) -> Image.Image:
    return Image.frombytes(mode, (size[0], size[1]), data)


def _environment() -> dict[str, str]:
    """What Python needs of the server's, with its modules; the rest may be secret. One thread for
    numpy."""
    root = str(Path(stepweave.__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, sys.path)])
    kept = {name: value for name, value in os.environ.items() if KEPT.fullmatch(name)}
    return kept | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
