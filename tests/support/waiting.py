"""How tests wait: for what they wait for, and on a busy machine as long as it takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

SECONDS = 300.0  # after which something hangs; on a quiet machine nothing takes a tenth of it


def wait_until(condition: Callable[[], Any]) -> None:
    """Wait for something that another thread, or process, brings about and does not tell of."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
