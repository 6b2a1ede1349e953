"""Triton's extensions of the Open Inference Protocol, as far as they are supported, and why others
are not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from stepweave.api import answer_schemas as bodies
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
    """Why a path of Triton's is not supported; None for any other path."""
    for pattern, reason in _UNSUPPORTED:
        if pattern.fullmatch(path):
            return NotFoundError(f"{path[:200]}: {reason}.", code="unsupported")
    return None


def index(name: str, version: str, unready: str | None, only_ready: bool) -> bodies.RepositoryIndex:
    """The repository's index: the one model, and the reason if it is not ready. With `only_ready`,
    it is left out then."""
    state: bodies.ModelState = "READY" if unready is None else "UNAVAILABLE"
    model = bodies.IndexedModel(name=name, version=version, state=state, reason=unready or "")
    return bodies.RepositoryIndex([model] if unready is None or not only_ready else [])


def configuration(
    name: str,
    platform: str,
    inputs: Mapping[str, Sequence[str]],
    required: Sequence[str],
    outputs: Sequence[str],
) -> bodies.ModelConfiguration:
    """The model's configuration as Triton writes one. `inputs` maps names to datatypes, the usual
    one first.

    A maximum batch size of 0 says that tensors have no batch dimension: their elements are
    requests already.
    """
    return bodies.ModelConfiguration(
        name=name,
        platform=platform,
        input=[
            bodies.InputConfiguration(
                name=each, data_type=_type(kinds[0]), dims=[-1], optional=each not in required
            )
            for each, kinds in inputs.items()
        ],
        output=[
            bodies.TensorConfiguration(name=each, data_type=_type("BYTES"), dims=[-1])
            for each in outputs
        ],
    )


def _type(datatype: str) -> str:
    return TYPES.get(datatype, f"TYPE_{datatype}")
