"""Errors of what is not the work itself."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def contained(what: str) -> Iterator[None]:
    """An error in what is not the work itself is logged, and costs no job."""
    try:
        yield
    except Exception:
        logger.exception("could not %s", what)
