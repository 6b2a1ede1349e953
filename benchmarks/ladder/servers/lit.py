"""LitServe with its batches of requests: `python -m benchmarks.ladder.servers.lit --port 3001`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import litserve

from benchmarks.ladder.servers.model import MAX_BATCH, PATH, Asked, answer, call_each_kind, load

BATCH_TIMEOUT = 0.02  # seconds that a batch waits for more requests


class Api(litserve.LitAPI):
    """One call of the pipeline for each kind of request in a batch."""

    def setup(self, device: str) -> None:
        self.pipeline = load()

    # without annotations: LitServe would take what it cannot resolve as a query parameter
    def decode_request(self, request):  # type: ignore[no-untyped-def]
        return Asked.of(request)

    def batch(self, inputs: Sequence[Asked]) -> list[Asked]:
        return list(inputs)

    def predict(self, x: list[Asked]) -> list[str]:
        return call_each_kind(self.pipeline, x)

    def unbatch(self, output: list[str]) -> list[str]:
        return output

    def encode_response(self, output: str) -> dict[str, Any]:
        return answer(output)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ladder.servers.lit")
    parser.add_argument("--port", type=int, required=True)
    port = parser.parse_args().port
    api = Api(max_batch_size=MAX_BATCH, batch_timeout=BATCH_TIMEOUT, api_path=PATH)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=False)
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
