"""Pipelines that make no images, or need what requests cannot send, are refused before their weights
are read; and what is an image in a result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.kandinsky5 import pipeline_output as kandinsky5
from diffusers.pipelines.wan import pipeline_output as wan
from PIL import Image

from stepweave.config import Settings
from stepweave.config.preset import Preset
from stepweave.errors import LoadError, NoImagesError
from stepweave.images.outputs import images_of
from stepweave.loading.kinds import check_served
from stepweave.loading.loader import load_pipeline
from stepweave.serving.model import ServedModel
from tests.support.fake_pipeline import FakePipeline

CPU = torch.device("cpu")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("WanPipeline", "makes videos, not images (its results are frames)"),
        ("AudioLDM2Pipeline", "makes sound, not images (its results are audios)"),
        (
            "FluxPriorReduxPipeline",
            "makes no images (its results are prompt_embeds, pooled_prompt_embeds)",
        ),
        ("VersatileDiffusionPipeline", "makes no images (its class has no call)"),
    ],
)
def test_they_are_refused_before_anything_but_the_index_is_read(
    name: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = json.dumps({"_class_name": name})  # no component, no weights
    folder, snapshot = (
        tmp_path / "mine",
        tmp_path / "hub" / "models--owner--name" / "snapshots" / COMMIT,
    )
    for one in (folder, snapshot):
        one.mkdir(parents=True)
        (one / "model_index.json").write_text(index)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for model, settings in (
        ("mine", Settings(model=str(folder))),
        ("owner/name", Settings(model="owner/name", revision=COMMIT)),
    ):
        with pytest.raises(LoadError) as caught:
            load_pipeline(settings, CPU, torch.float32)
        assert caught.value.message == (
            f"the model {model!r} cannot be loaded: {name} {told}; this server serves "
            f"pipelines that make images"
        )


class Needing(FakePipeline):
    """Needs what no request has, and says nothing of its type."""

    def __call__(  # type: ignore[override]
        self, prompt: str, latents: Any, num_inference_steps: int = 4, generator: Any = None
    ) -> Any:
        raise AssertionError("never called")


def test_what_requests_cannot_send_may_come_from_a_preset() -> None:
    with pytest.raises(LoadError, match="Needing needs latents, which requests cannot send"):
        check_served(Needing())
    check_served(Needing(), {"latents"})


def test_tensors_that_requests_can_send_are_no_reason() -> None:
    for name in ("KandinskyV22ControlnetPipeline", "StableCascadeDecoderPipeline"):
        check_served(getattr(diffusers, name))


def test_pipelines_that_are_made_in_code_are_held_to_it_too() -> None:
    with pytest.raises(LoadError, match="Needing needs latents, which requests cannot send"):
        ServedModel(Needing(), Preset(), Settings())


def test_images_are_found_under_either_name_and_nothing_else_is_one() -> None:
    image = Image.new("RGB", (8, 8))
    outputs = kandinsky5.KandinskyImagePipelineOutput
    assert images_of(outputs(image=[image])) == [image]
    assert images_of(diffusers.ImagePipelineOutput(images=[image, image])) == [image, image]
    assert images_of(diffusers.ImagePipelineOutput(images=[])) == []
    films = wan.WanPipelineOutput(frames=[[image]])
    with pytest.raises(
        NoImagesError,
        match=r"Wan makes no images: it returned frames \(list\), and no list of",
    ):
        images_of(films, "Wan")
    layers = diffusers.ImagePipelineOutput(images=[[image, image], [image, image]])
    assert images_of(layers) == [image] * 4
    for wrong in (diffusers.ImagePipelineOutput(images=[[0]]), torch.zeros(1), (image,)):
        with pytest.raises(NoImagesError):
            images_of(wrong)


def test_depth_becomes_grey_and_normals_become_colours() -> None:
    outputs = diffusers.pipelines.marigold.MarigoldDepthOutput
    depth = np.array([[[[0.0], [0.5]], [[1.0], [0.25]]]])
    [grey] = images_of(outputs(prediction=depth, uncertainty=None, latent=None))
    assert grey.mode == "L" and list(grey.tobytes()) == [0, 128, 255, 64]
    normals = torch.tensor([[[[-1.0]], [[0.0]], [[1.0]]]])  # maps, channels, height, width
    [colours] = images_of(outputs(prediction=normals, uncertainty=None, latent=None))
    assert colours.getpixel((0, 0)) == (0, 128, 255)
