"""What diffusers logs while a scheduler is rehearsed is of no use to anybody, and looks like
trouble."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

_here = threading.local()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what diffusers logs on this thread below the level of errors. What other threads log
    stays."""
    for handler in logging.getLogger("diffusers").handlers:
        handler.addFilter(_passes)  # once, however often
    before = getattr(_here, "quiet", False)
    _here.quiet = True
    try:
        yield
    finally:
        _here.quiet = before


def _passes(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or not getattr(_here, "quiet", False)
