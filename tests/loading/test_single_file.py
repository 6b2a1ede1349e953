"""A model in a single file is the same as its directory; what is not a whole model is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from stepweave.config import Settings
from stepweave.errors import LoadError
from stepweave.loading.loader import load_pipeline
from tests.support.original_layout import save_as_one_file
from tests.support.tiny import FAMILIES, clip

CPU = torch.device("cpu")


def build(family: str) -> Any:
    pipeline = FAMILIES[family].build()
    if family == "stable_diffusion_xl":  # diffusers tells the encoders apart by their widths
        pass
    return pipeline


def load(file: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> DiffusionPipeline:
    return load_pipeline(Settings(model=str(file), **settings), CPU, dtype)[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a pipeline in `model`, and the same in `one.safetensors`; not to be
    changed."""
    place = tmp_path_factory.mktemp("saved")
    pipeline = build("stable_diffusion")
    pipeline.save_pretrained(place / "model")
    save_as_one_file(pipeline, place / "one.safetensors")
    return place


def images(pipeline: Any, family: str = "stable_diffusion") -> Any:
    return pipeline(**FAMILIES[family].arguments("a red circle", seed=3)).images


def test_a_file_with_the_configurations_of_its_directory_makes_the_same_image(saved: Path) -> None:
    pipeline = load(saved / "one.safetensors", config_from=str(saved / "model"))
    assert np.array_equal(images(pipeline), images(load(saved / "model")))
