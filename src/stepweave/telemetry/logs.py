"""The server's log lines, and what of other libraries is among them."""

from __future__ import annotations

import logging
import os
import sys
import warnings

# their warnings are for developers; what a user must know of a model, its loading checks and says
_LIBRARIES = (
    "accelerate", "diffusers", "huggingface_hub", "peft", "torch", "torchao", "transformers",
)  # fmt: skip
# what the libraries read when they are imported, and set their loggers by
_VERBOSITY = {
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "TORCH_LOGS": "-all",
}


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
    quiet_libraries()


def quiet_libraries() -> None:
    """Log only errors of torch, diffusers and what they bring, unless the variables that they read
    (`DIFFUSERS_VERBOSITY`, `HF_HUB_VERBOSITY`, `TRANSFORMERS_VERBOSITY`, `TORCH_LOGS`) or Python's
    `-W` say otherwise.
    Call it before these libraries are imported."""
    for name, value in _VERBOSITY.items():
        os.environ.setdefault(name, value)
    for library in _LIBRARIES:
        logging.getLogger(library).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=rf"({'|'.join(_LIBRARIES)})(\.|$)")
