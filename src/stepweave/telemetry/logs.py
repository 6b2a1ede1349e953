"""The server's log lines."""

from __future__ import annotations

import logging


def configure_logs() -> None:
    """Write the log of the package to standard error. BentoML configures its own loggers only."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        logging.Formatter(
            "%(asctime)s [%(levelname)s] [%(name)s] %(message)s", "%Y-%m-%dT%H:%M:%S%z"
        )
    )
    package = logging.getLogger("stepweave")
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    package.propagate = False
