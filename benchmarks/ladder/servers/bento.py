"""BentoML as its documents show it, one request at a time and with its adaptive batches:
`bentoml serve benchmarks.ladder.servers.bento:Plain` and `...:Adaptive`."""

import bentoml
from pydantic import BaseModel

from benchmarks.ladder.servers.model import (
    MAX_BATCH,
    PATH,
    Asked,
    answer,
    call_each_kind,
    load,
)

SECONDS = 3600  # timeout: the benchmark's clients decide how long they wait


class Body(BaseModel):
    """A request."""

    prompt: str
    size: str
    num_inference_steps: int
    guidance_scale: float
    seed: int


@bentoml.service(workers=1, traffic={"timeout": SECONDS})
class Plain:
    """One call of the pipeline for each request, one at a time."""

    def __init__(self) -> None:
        self.pipeline = load()

    @bentoml.api(route=PATH)
    def generate(
        self, prompt: str, size: str, num_inference_steps: int, guidance_scale: float, seed: int
    ) -> dict:
        body = {
            "prompt": prompt,
            "size": size,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "seed": seed,
        }
        return answer(call_each_kind(self.pipeline, [Asked.of(body)])[0])


@bentoml.service(workers=1, traffic={"timeout": SECONDS})
class Adaptive:
    """One call of the pipeline for each kind of request in a batch."""

    def __init__(self) -> None:
        self.pipeline = load()

    @bentoml.api(route=PATH, batchable=True, max_batch_size=MAX_BATCH)
    def generate(self, requests: list[Body]) -> list[str]:
        return call_each_kind(self.pipeline, [Asked.of(body.model_dump()) for body in requests])
