"""The server's log lines."""

from __future__ import annotations

import logging


def configure_logs() -> None:
    """Log the package to standard error; BentoML only configures its own loggers."""
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
