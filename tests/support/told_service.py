"""The real service around a fake pipeline that does what its prompts say: `bentoml serve
tests.support.told_service:Stepweave`."""

from __future__ import annotations

import time
from typing import Any
from unittest.mock import patch

from stepweave.config.preset import Preset
from stepweave.engine import StepEngine
from stepweave.serving import jobs
from stepweave.serving.server import Server
from tests.support.fake_pipeline import FakePipeline, Record


class ToldRecord(Record):
    """A step fails if the prompt contains `fails`, and takes long if it contains `lasts`."""

    def step(self) -> None:
        prompt = self.calls[-1]["prompt"]
        if "fails" in prompt:
            raise RuntimeError("as the prompt says")
        if "lasts" in prompt:
            time.sleep(0.02)
        super().step()


def told_pipeline() -> FakePipeline:
    pipeline = FakePipeline(edits=True)
    for one in (pipeline, pipeline.image_to_image, pipeline.inpaint):
        one.record = ToldRecord() if one is pipeline else pipeline.record
    return pipeline


def _server(*args: Any, **options: Any) -> Server:
    return Server(*args, load=lambda *_: (told_pipeline(), Preset()), **options)


# the effect of prompts cannot be predicted, so deadlines are missed instead of refused
StepEngine.estimate = lambda *_, **__: None  # type: ignore[method-assign,assignment,return-value]
StepEngine.alone = lambda *_, **__: None  # type: ignore[method-assign,assignment,return-value]
jobs.KEEP_AGAIN_SECONDS = (0.2, 0.2, 0.2, 0.2)
with patch("stepweave.serving.server.Server", _server):
    from service import Stepweave

__all__ = ["Stepweave"]
