"""Hides diffusers' log messages during rehearsals of schedulers, which would look like errors."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

_here = threading.local()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within the block, drop diffusers' messages on this thread below the level ERROR."""
    for handler in logging.getLogger("diffusers").handlers:
        handler.addFilter(_passes)  # added only once
    before = getattr(_here, "quiet", False)
    _here.quiet = True
    try:
        yield
    finally:
        _here.quiet = before


def _passes(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or not getattr(_here, "quiet", False)
