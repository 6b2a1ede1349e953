from __future__ import annotations

import builtins
import io
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stepweave import StepEngine
from stepweave.config import EMBEDDED_MODEL, Settings
from stepweave.config.preset import read_preset
from stepweave.errors import LoadError
from stepweave.loading.device import choose_device, choose_dtype, set_cpu_threads
from stepweave.loading.loader import load_pipeline
from stepweave.serving.model import ServedModel
from tests.support.resolving import resolve
from tests.support.waiting import SECONDS

CPU = torch.device("cpu")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_auto_is_a_gpu_where_there_is_one() -> None:
    device = choose_device(Settings())
    dtype = choose_dtype(Settings(), device)
    if torch.cuda.is_available():
        assert device.type == "cuda"
        assert dtype in (torch.bfloat16, torch.float16)
    elif not torch.backends.mps.is_available():
        assert (device.type, dtype) == ("cpu", torch.float32)


def test_devices_and_dtypes_that_cannot_be_are_refused() -> None:
    with pytest.raises(
        LoadError, match=r"STEPWEAVE_DEVICE='cuda:99': this machine has \d+ CUDA devices"
    ):
        choose_device(Settings(device="cuda:99"))
    with pytest.raises(LoadError, match="float16"):
        choose_dtype(Settings(dtype="float16"), CPU)
    assert choose_dtype(Settings(dtype="bfloat16"), CPU) is torch.bfloat16


@pytest.mark.parametrize(("quota", "most"), [("50000 100000", 1), ("max 100000", None)])
def test_threads_follow_the_cgroups_quota(
    monkeypatch: pytest.MonkeyPatch, quota: str, most: int | None
) -> None:
    real_open = builtins.open

    def fake_open(file: Any, *arguments: Any, **options: Any) -> Any:
        return (
            io.StringIO(quota)
            if file == "/sys/fs/cgroup/cpu.max"
            else real_open(file, *arguments, **options)
        )

    monkeypatch.delenv("LOKY_MAX_CPU_COUNT", raising=False)
    before = torch.get_num_threads()
    try:
        unlimited = set_cpu_threads(Settings(cpu_threads=0))
        real_exists = os.path.exists
        monkeypatch.setattr(
            "os.path.exists", lambda path: path == "/sys/fs/cgroup/cpu.max" or real_exists(path)
        )
        monkeypatch.setattr(builtins, "open", fake_open)
        assert set_cpu_threads(Settings()) == torch.get_num_threads() == (most or unlimited)
        assert set_cpu_threads(Settings(cpu_threads=3)) == torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_the_embedded_model_loads_and_obeys_its_seed() -> None:
    settings = Settings()
    model = ServedModel(*load_pipeline(settings, CPU, torch.float32), settings)
    assert model.pipeline_class == "StableDiffusion3Pipeline"
    assert (model.id, model.width, model.height, model.limits.sizes.multiple) == (
        "shapes",
        64,
        64,
        8,
    )
    assert (model.default_steps, model.default_guidance) == (20, 2.0)
    assert all(
        parameter.dtype is torch.float32 for parameter in model.pipeline.transformer.parameters()
    )
    with StepEngine(model.pipeline, "off") as engine:

        def draw(seed: int) -> bytes:
            resolved = resolve(model, prompt="a red star", seed=seed, num_inference_steps=3)
            job = engine.submit(**model.call(resolved))
            image: bytes = job.result(SECONDS).images[0].tobytes()
            assert job.progress == (3, 3)
            return image

        assert draw(1) == draw(1) != draw(2)


def test_a_hub_repository_is_loaded_at_its_pinned_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real hub code path, answered from the hub's own cache layout, since no hub is in
    reach."""
    snapshot = tmp_path / "models--owner--shapes" / "snapshots" / COMMIT
    shutil.copytree(EMBEDDED_MODEL, snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("diffusers.configuration_utils.HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    settings = Settings(model="owner/shapes", revision=COMMIT)
    pipeline, _ = load_pipeline(settings, CPU, torch.float32)
    assert type(pipeline).__name__ == "StableDiffusion3Pipeline"
    assert pipeline.text_encoder_3 is None
    with pytest.raises(LoadError, match="owner/shapes"):
        load_pipeline(Settings(model="owner/shapes", revision="f" * 40), CPU, torch.float32)


def test_only_safetensors_are_read(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(EMBEDDED_MODEL, model)
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    # what would load, were pickles allowed
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(LoadError, match="cannot be loaded"):
        load_pipeline(Settings(model=str(model)), CPU, torch.float32)


def test_presets_are_read_strictly(tmp_path: Path) -> None:
    assert read_preset(tmp_path).id is None
    for content, told in (
        (
            '{"id": "mine", "stepz": 4}',
            "there is no member 'stepz' (allowed are id, width, height, num_inference_steps, ",
        ),
        ('{"guidance": 4}', "there is no member 'guidance' (did you mean 'guidance_scale'?)"),
        ('{"id": "mine",', "not JSON, EOF while parsing a value at line 1 column 14"),
        ("", "not JSON, EOF while parsing"),
        ("[]", "it is []: Input should be an object"),
        ('{"width": "wide"}', "width is 'wide': Input should be a valid integer"),
        (
            '{"width": 4, "height": 7}',
            "width is 4: Input should be greater than or equal to 8; height is 7: Input",
        ),
    ):
        (tmp_path / "stepweave.json").write_text(content)
        with pytest.raises(LoadError) as caught:
            read_preset(tmp_path)
        assert caught.value.message.startswith(f"stepweave.json: {told}"), caught.value.message
    (tmp_path / "stepweave.json").unlink()
    (tmp_path / "stepweave.json").mkdir()
    with pytest.raises(LoadError, match="stepweave.json: Is a directory"):
        read_preset(tmp_path)


def test_no_prompt_is_quoted_in_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, _ = load_pipeline(Settings(), CPU, torch.float32)
    [handler] = (
        one for one in logging.getLogger("diffusers").handlers if type(one) is logging.StreamHandler
    )
    monkeypatch.setattr(handler, "stream", io.StringIO())
    logging.getLogger("diffusers.pipelines").warning("something else")
    pipeline("a secret plan " * 20, num_inference_steps=1)
    printed = handler.stream.getvalue()
    assert "something else" in printed
    assert "secret" not in printed
