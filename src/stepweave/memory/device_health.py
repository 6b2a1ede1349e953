"""Detects permanent failures of the device.

An illegal memory access, an assertion in a kernel or a failed launch breaks the process's context
on a GPU: all its later operations fail, and only another process can use the device. So the engine
ends all jobs, and the process must be restarted.
"""

from __future__ import annotations

import functools
import logging
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from stepweave.compat.out_of_memory import ran_out
from stepweave.compat.torch_state import on_device
from stepweave.errors import DeviceFailedError, OutOfMemoryError, RequestError
from stepweave.outcome import Ending, carried
from stepweave.reasons import words_of

logger = logging.getLogger(__name__)

LONGEST = 200  # characters of an error's message that are reported
DEEPEST = 16  # causes of an error that are examined

# messages of torch, its libraries and compiled kernels; the type is RuntimeError before torch 2.8
_WORDS = re.compile(
    r"\b(CUDA|HIP|XPU|cuDNN|cuFFT|MIOpen)( driver)? "
    r"error\b|\b(CU|HIP|ROC)[A-Z]+_STATUS_|\b(CUDA|HIP)_ERROR_"
    r"|Triton Error \[|device-side assert|unspecified launch failure|illegal memory access",
    re.IGNORECASE,
)


class DeviceHealth:
    """Whether one engine's device has failed; `examine` decides it for an error.

    `probe` raises if the device does not work. Without a probe, on the CPU, a device error always
    counts as a failure.
    """

    def __init__(self, device: torch.device, probe: Callable[[], None] | None = None) -> None:
        self.device = device
        self.failure: DeviceFailedError | None = None
        self._probe = probe or (
            None if device.type == "cpu" else functools.partial(probe_of, device)
        )
        self._examining = threading.Lock()

    def check(self) -> None:
        """Raise DeviceFailedError once the device has failed."""
        if (failed := self.error()) is not None:
            raise failed

    def error(self) -> DeviceFailedError | None:
        """A new error to end a job with, or None while the device works. New for each job, so that
        jobs share no traceback."""
        return None if self.failure is None else DeviceFailedError(self.failure.reason)

    def examine(self, error: BaseException) -> DeviceFailedError | None:
        """Check whether an error means that the device has failed, by the probe, which waits for
        the device. Returns the error to end all jobs with, also if it had failed before; else None.
        """
        root = None if self.failure is not None else _of_the_device(error)
        if root is not None:
            with self._examining:
                if self.failure is None and self._stays():
                    self.failure = DeviceFailedError(f"{self.device}: {_in_short(root)}")
                    reason = self.failure.reason
                    logger.critical(
                        "the device failed, ending all jobs: %s", reason, exc_info=error
                    )
        return self.error()

    def reported(self, error: BaseException | None) -> Exception:
        """The error that a job's caller gets for an error that its call raised."""
        assert error is not None
        if not isinstance(error, RequestError) and (failed := self.examine(error)) is not None:
            return failed
        if ran_out(error):
            too_little = OutOfMemoryError(
                "There is not enough memory for this job: ask for a smaller size, or fewer images."
            )
            too_little.__cause__ = error
            return too_little
        return carried(error, "The pipeline", TimeoutError)  # as `Job.result` raises when not done

    def _stays(self) -> bool:
        if self._probe is None:
            return True
        try:
            self._probe()
        except Exception as error:
            return not ran_out(error)
        logger.warning("an operation failed on %s, but the device still works", self.device)
        return False

    def guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `function` so that it raises Ending if the device fails or has failed."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.failure is None:
                try:
                    return function(*args, **kwargs)
                except Exception as error:
                    if self.examine(error) is None:
                        raise
            raise Ending

        return run


def probe_of(device: torch.device) -> None:
    """Compute a product and a convolution on a device, which use different libraries, and wait for
    them. Raises their errors, and RuntimeError for a wrong result."""
    with on_device(device), torch.no_grad(), torch.autocast(device.type, enabled=False):
        ones = torch.ones(1, 8, 8, 8, device=device, dtype=torch.float32)
        product = ones @ ones
        folded = torch.nn.functional.conv2d(
            ones, torch.ones(1, 8, 3, 3, device=device, dtype=torch.float32)
        )
        sums = float(product.sum()), float(folded.sum())
    if sums != (8.0 * 8 * 8 * 8, 72.0 * 36):
        raise RuntimeError(f"{device} computed {sums} instead of {(4096.0, 2592.0)}")


def _in_short(error: BaseException) -> str:
    """An error's first line, without paths of the server."""
    line = re.sub(r"\S*/\S+", "...", words_of(error).strip().partition("\n")[0])
    return line[:LONGEST] or type(error).__name__


def _of_the_device(error: BaseException) -> BaseException | None:
    """The first of an error's causes that a device's library raised, except out-of-memory ones."""
    root = None
    for cause in _causes(error):
        of_device = isinstance(cause, torch.AcceleratorError) or (
            isinstance(cause, RuntimeError) and _WORDS.search(words_of(cause))
        )
        if of_device and not ran_out(cause):
            root = cause
    return root


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, its cause or context, and so on."""
    current: BaseException | None = error
    for _ in range(DEEPEST):
        if current is None:
            return
        yield current
        explicit = current.__cause__ is not None or current.__suppress_context__
        current = current.__cause__ if explicit else current.__context__
