"""Runs diffusers' own example servers from a checkout of its repository, on the embedded model:
`python -m benchmarks.ladder.servers.diffusers_examples --folder CHECKOUT/examples/server --port
3001`.

The examples take a prompt, and draw the seed themselves; `examples/server` takes nothing else. So
the whole request is sent as JSON in the prompt, and the pipeline that the examples call reads it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import diffusers
import uvicorn

from benchmarks.ladder.servers.model import Asked, load

DEVICE = "cpu"  # the examples know CUDA and MPS only


class Pipeline(diffusers.StableDiffusion3Pipeline):  # type: ignore[misc]
    """The embedded model's pipeline, whose prompt is a whole request."""

    def __call__(self, prompt: str, **_: Any) -> Any:
        asked = Asked.of(json.loads(prompt))
        return super().__call__(prompt=asked.prompt, generator=asked.generator, **asked.arguments)


class Initializer:
    """Loads the embedded model where `examples/server-async` loads its own."""

    device = DEVICE

    def __init__(self, **_: Any) -> None:
        self.pipeline: Any = None

    def initialize_pipeline(self) -> Initializer:
        return self

    def start(self) -> None:
        self.pipeline = load(Pipeline)


def threads(port: int) -> Any:
    """The app of `examples/server`: each request's call runs on a thread."""
    os.environ["SERVICE_URL"] = f"http://127.0.0.1:{port}"
    server = _module("server")

    def start() -> None:
        server.shared_pipeline.pipeline = load(Pipeline)
        server.shared_pipeline.device = DEVICE

    server.shared_pipeline.start = start
    server.StableDiffusion3Pipeline = Pipeline
    return server.app


def scoped(port: int) -> Any:
    """The app of `examples/server-async`: each request has its own view of the pipeline."""
    _module("Pipelines").ModelPipelineInitializer = Initializer
    server = _module("serverasync")
    server.server_config.host, server.server_config.port = "127.0.0.1", port
    return server.app


def _module(name: str) -> Any:
    """A module of the example's folder."""
    return importlib.import_module(name)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ladder.servers.diffusers_examples")
    parser.add_argument("--folder", type=Path, required=True, help="of the example")
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.folder))
    make = threads if (arguments.folder / "server.py").exists() else scoped
    uvicorn.run(make(arguments.port), host="127.0.0.1", port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
