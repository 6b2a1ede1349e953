"""Whether the device still works: some errors of a GPU stay, and no operation of the process
succeeds after them.

An illegal memory access, an assertion in a kernel or a launch that failed leaves the process's
context on the device broken for good; only another process can use the device again. So the engine
ends all jobs, and whoever watches it restarts the process.
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

LONGEST = 200  # characters of an error that are told
DEEPEST = 16  # causes of an error that are looked at

# what torch, its libraries and compiled kernels say of a device; a plain RuntimeError before torch
# 2.8
_WORDS = re.compile(
    r"\b(CUDA|HIP|XPU|cuDNN|cuFFT|MIOpen)( driver)? "
    r"error\b|\b(CU|HIP|ROC)[A-Z]+_STATUS_|\b(CUDA|HIP)_ERROR_"
    r"|Triton Error \[|device-side assert|unspecified launch failure|illegal memory access",
    re.IGNORECASE,
)


class DeviceHealth:
    """What is known of one engine's device. `examine` is the one place that tells an error that
    stays from any other.

    `probe` raises if the device does not work; None where there is no device to ask, and what an
    error says is believed.
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
        """What ends a job once the device has failed: one of its own, which its traceback does not
        tie to others."""
        return None if self.failure is None else DeviceFailedError(self.failure.reason)

    def examine(self, error: BaseException) -> DeviceFailedError | None:
        """What ends all jobs, if this error shows that the device has failed for good, or if that
        is known already.

        An error of the device is held against the device: it is asked to compute something, which
        waits for it.
        """
        root = None if self.failure is not None else _of_the_device(error)
        if root is not None:
            with self._examining:
                if self.failure is None and self._stays():
                    self.failure = DeviceFailedError(f"{self.device}: {_in_short(root)}")
                    logger.critical(
                        "the device has failed, and so do all jobs: %s",
                        self.failure.reason,
                        exc_info=error,
                    )
        return self.error()

    def told(self, error: BaseException | None) -> Exception:
        """What the caller of a job is told of the error that its call raised."""
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
        logger.warning("an operation failed on %s, which goes on working", self.device)
        return False

    def guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, which is not called once the device has failed; what shows that it has ends
        the caller."""

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
    """Have a device compute a product and a convolution, each by a library of its own, and wait for
    them. Raises what it does."""
    with on_device(device), torch.no_grad(), torch.autocast(device.type, enabled=False):
        ones = torch.ones(1, 8, 8, 8, device=device, dtype=torch.float32)
        product = ones @ ones
        folded = torch.nn.functional.conv2d(
            ones, torch.ones(1, 8, 3, 3, device=device, dtype=torch.float32)
        )
        found = float(product.sum()), float(folded.sum())
    if found != (8.0 * 8 * 8 * 8, 72.0 * 36):
        raise RuntimeError(f"{device} computes {found} where {(4096.0, 2592.0)} is right")


def _in_short(error: BaseException) -> str:
    """An error's first line, without paths of the server."""
    line = re.sub(r"\S*/\S+", "...", words_of(error).strip().partition("\n")[0])
    return line[:LONGEST] or type(error).__name__


def _of_the_device(error: BaseException) -> BaseException | None:
    """The first of an error's causes that a device's library raised, but for want of memory."""
    found = None
    for one in _causes(error):
        kind = isinstance(one, torch.AcceleratorError) or (
            isinstance(one, RuntimeError) and _WORDS.search(words_of(one))
        )
        if kind and not ran_out(one):
            found = one
    return found


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from or in the handling of, and so on."""
    one: BaseException | None = error
    for _ in range(DEEPEST):
        if one is None:
            return
        yield one
        cause = one.__cause__
        one = cause if cause is not None or one.__suppress_context__ else one.__context__
