"""Contains errors of side work."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def contained(what: str) -> Iterator[None]:
    """Log an exception of side work (`could not {what}`) instead of raising it, to fail no job."""
    try:
        yield
    except Exception:
        logger.exception("could not %s", what)
