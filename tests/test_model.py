from __future__ import annotations

import pytest

from stepweave.config import Settings
from stepweave.errors import InvalidRequest, LoadError
from stepweave.loading.preset import Preset
from stepweave.model import ServedModel
from tests.fake import FakePipeline


def test_a_preset_overrides_the_pipelines_defaults() -> None:
    preset = Preset(id="tiny", width=32, height=48, num_inference_steps=3, guidance_scale=1.5)
    model = ServedModel(FakePipeline(), preset, Settings())
    resolved = model.resolve(prompt="x", seed=1)
    assert model.id == "tiny"
    assert (resolved.width, resolved.height) == (32, 48)
    assert (resolved.num_inference_steps, resolved.guidance_scale) == (3, 1.5)


def test_a_presets_call_arguments_reach_the_call_and_must_exist() -> None:
    pipeline = FakePipeline()
    model = ServedModel(pipeline, Preset(call={"negative_prompt": "blue"}), Settings())
    pipeline(**model.call(model.resolve(prompt="x")))
    assert pipeline.record.calls[0]["negative_prompt"] == "blue"
    with pytest.raises(LoadError, match="takes no argument 'max_sequence_length'"):
        ServedModel(pipeline, Preset(call={"max_sequence_length": 1}), Settings())


def test_what_a_pipeline_lacks_is_refused_not_dropped() -> None:
    class Plain(FakePipeline):
        def __call__(self, prompt, num_inference_steps=4, generator=None, height=64, width=64, output_type="pil"):  # type: ignore[no-untyped-def,override]
            return super().__call__(
                prompt, num_inference_steps=num_inference_steps, generator=generator, height=height, width=width
            )

    model = ServedModel(Plain(), Preset(), Settings())
    assert model.resolve(prompt="x").guidance_scale is None
    assert len(Plain()(**model.call(model.resolve(prompt="x"))).images) == 1
    for name, value in (("guidance_scale", 3.0), ("negative_prompt", "blue")):
        with pytest.raises(InvalidRequest, match=f"Plain has no {name}"):
            model.resolve(prompt="x", **{name: value})  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="n is 2"):
        model.resolve(prompt="x", n=2)
