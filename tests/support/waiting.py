"""Waits for conditions, on busy machines as long as it takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

SECONDS = 300.0  # timeout; on an idle machine nothing takes a tenth of it


def wait_until(condition: Callable[[], Any], seconds: float = SECONDS) -> None:
    """Poll until the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
