"""What Triton's and KServe's clients ask beside the Open Inference Protocol: Triton's extensions of
it, as far as they have an answer here, and a reason where they have none."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from stepweave.errors import NotFoundError

# names of Triton's model configuration, where not TYPE_ before the protocol's
TYPES = {"BYTES": "TYPE_STRING"}
EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository")
_MODEL = r"/v2(/models/.+)?"
_UNSUPPORTED = [
    (re.compile(pattern), reason)
    for pattern, reason in (
        (
            r"/v2/(system|cuda)sharedmemory(/.*)?",
            "there is no shared memory here; send the elements of tensors in the request",
        ),
        (
            r"/v2/repository/models/.+/(un)?load",
            "explicit model load / unload is not allowed: a server has the one model that it was "
            "started with (STEPWEAVE_MODEL)",
        ),
        (
            r"/v2/repository/.+/index",
            "there is one repository, which has no name; ask POST /v2/repository/index",
        ),
        (
            r"/v2/models(/.+)?/stats",
            "there are no statistics by model; GET /metrics has counts and times, for Prometheus",
        ),
        (rf"{_MODEL}/trace/setting", "there is no tracing; GET /metrics says what takes how long"),
        (r"/v2/logging", "the log cannot be changed while the server runs"),
        (
            r"/v2/models/.+/generate(_stream)?",
            "there is no generate extension; POST .../infer, or /generate_stream for events",
        ),
    )
]


def unsupported(path: str) -> NotFoundError | None:
    """Why there is nothing at a path that Triton has; None for any other path."""
    for pattern, reason in _UNSUPPORTED:
        if pattern.fullmatch(path):
            return NotFoundError(f"{path[:200]}: {reason}.", code="unsupported")
    return None


def index(name: str, version: str, unready: str | None, only_ready: bool) -> list[dict[str, str]]:
    """The repository's index: the one model, and the reason if it is not ready; then it is left out
    of those that are."""
    if unready is None:
        return [{"name": name, "version": version, "state": "READY", "reason": ""}]
    return (
        []
        if only_ready
        else [{"name": name, "version": version, "state": "UNAVAILABLE", "reason": unready}]
    )


def configuration(
    name: str,
    platform: str,
    inputs: Mapping[str, Sequence[str]],
    required: Sequence[str],
    outputs: Sequence[str],
) -> dict[str, Any]:
    """The model's configuration as Triton writes one. `inputs` maps names to datatypes, the usual
    one first.

    A batch size of 0 says that tensors have no dimension of a batch's own: the elements of one are
    requests already.
    """

    def tensor(tensor_name: str, datatype: str) -> dict[str, Any]:
        return {
            "name": tensor_name,
            "data_type": TYPES.get(datatype, f"TYPE_{datatype}"),
            "dims": [-1],
        }

    return {
        "name": name,
        "platform": platform,
        "backend": "stepweave",
        "max_batch_size": 0,
        "input": [
            {**tensor(input_name, kinds[0]), "optional": input_name not in required}
            for input_name, kinds in inputs.items()
        ],
        "output": [tensor(output_name, "BYTES") for output_name in outputs],
        "model_transaction_policy": {"decoupled": False},
    }
