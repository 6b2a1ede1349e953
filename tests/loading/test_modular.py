"""Modular pipelines are loaded from their own files, and from other repositories at a commit; what
is not pinned, not there, or code is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from stepweave.config import Settings
from stepweave.errors import LoadError
from stepweave.loading.hub import fetch
from stepweave.loading.loader import load_pipeline
from stepweave.loading.modular import MODULAR_INDEX
from tests.pipelines.modular import flux_modular
from tests.support.hub import COMMIT, hub

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("modular") / "flux"
    flux_modular().save_pretrained(str(folder), overwrite_modular_index=True)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "flux"))


def load(folder: Path, **settings: Any) -> Any:
    return load_pipeline(Settings(model=str(folder), **settings), CPU, torch.float32)[0]


def change_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / MODULAR_INDEX
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def from_repository(name: str, repository: str | None, revision: str | None, **more: Any) -> Any:
    def change(index: dict[str, Any]) -> None:
        spec = index[name][2]
        spec |= {"pretrained_model_name_or_path": repository, "revision": revision, **more}

    return change


def image(pipeline: Any) -> np.ndarray:
    """The image of a short call, by either kind of call."""
    arguments: dict[str, Any] = {
        "prompt": "a red ring", "width": 16, "height": 16, "num_inference_steps": 2,
        "max_sequence_length": 16, "output_type": "np",
        "generator": torch.Generator().manual_seed(0),
    }  # fmt: skip
    if hasattr(pipeline, "declared_blocks"):
        return np.asarray(pipeline(**arguments).images)
    return np.asarray(pipeline(output="images", **arguments))


# What is loaded


def test_its_own_files_are_read_wherever_they_were_saved(saved: Path, folder: Path) -> None:
    pipeline = load(folder)  # the index names the directory that it was copied from
    assert type(pipeline).__name__ == "FluxModularPipeline"
    assert isinstance(pipeline, diffusers.FluxModularPipeline)
    assert not pipeline.transformer.training
    plain = diffusers.ModularPipeline.from_pretrained(str(saved))
    plain.load_components()
    assert np.array_equal(image(pipeline), image(plain))


def test_a_folder_may_have_another_name_than_its_component(folder: Path) -> None:
    (folder / "text_encoder_2").rename(folder / "t5")
    with pytest.raises(LoadError, match="text_encoder_2/ is missing"):
        load(folder)
    change_index(folder, from_repository("text_encoder_2", str(folder), None, subfolder="t5"))
    assert image(load(folder)).shape == (1, 16, 16, 3)


def test_settings_of_the_blocks_are_read(tmp_path: Path) -> None:
    from tests.pipelines.modular import stable_diffusion_xl_modular

    made = stable_diffusion_xl_modular()
    made.update_components(force_zeros_for_empty_prompt=False)
    made.save_pretrained(str(tmp_path / "xl"), overwrite_modular_index=True)
    pipeline = load(tmp_path / "xl")
    assert pipeline.config.force_zeros_for_empty_prompt is False
    assert pipeline.controlnet is None
    assert pipeline.guider.guidance_scale == 7.5


def test_a_variant_is_read_where_a_component_has_it(folder: Path) -> None:
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert image(load(folder)).shape == (1, 16, 16, 3)
    with pytest.raises(LoadError, match="STEPWEAVE_VARIANT='int8'"):
        load(folder, variant="int8")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture
def parts(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that a hub serves as owner/parts."""
    shared = tmp_path / "parts"
    shared.mkdir()
    with hub(shared, "owner/parts") as served:
        served.let_go.set()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", served.url)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            served.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", served.url)
        yield shared


def test_components_at_a_commit_are_downloaded(saved: Path, folder: Path, parts: Path) -> None:
    (folder / "transformer").rename(parts / "denoiser")
    (parts / "denoiser" / "other.bin").write_bytes(b"0")  # which is not downloaded
    change_index(
        folder, from_repository("transformer", "owner/parts", COMMIT, subfolder="denoiser")
    )
    told: list[str] = []
    settings = Settings(model=str(folder))
    pipeline, _ = load_pipeline(
        settings, CPU, torch.float32, lambda stage, done, message: told.append(message)
    )
    assert np.array_equal(image(pipeline), image(load(saved)))
    assert any(message.startswith("transformer, ") for message in told)
    cached = {file.name for file in (parts.parent / "hub").rglob("*") if file.is_file()}
    assert "diffusion_pytorch_model.safetensors" in cached
    assert "other.bin" not in cached
    shutil.rmtree(parts / "denoiser")  # now it is in the cache
    assert np.array_equal(image(load(folder)), image(pipeline))


def test_a_repository_is_loaded_at_its_commit(saved: Path, parts: Path) -> None:
    shutil.copytree(saved, parts, dirs_exist_ok=True)
    (parts / "README.md").write_text("no part of the pipeline")
    change_index(parts, from_repository("vae", "owner/parts", None))
    place, variant = fetch("owner/parts", COMMIT, None)
    assert variant is None
    assert not (place / "README.md").exists()
    settings = Settings(model="owner/parts", revision=COMMIT)
    pipeline, _ = load_pipeline(settings, CPU, torch.float32)
    assert np.array_equal(image(pipeline), image(load(saved)))
    for name in ("vae", "scheduler"):
        shutil.rmtree(parts / name)
    shutil.rmtree(parts.parent / "hub")
    with pytest.raises(LoadError, match=r"'owner/parts' cannot be loaded: scheduler/ is missing"):
        load_pipeline(settings, CPU, torch.float32)


# What is refused


@pytest.mark.parametrize(
    ("repository", "revision"),
    [
        ("owner/parts", None),
        ("owner/parts", "main"),
        ("owner/parts", "0123456"),
        ("owner/parts", COMMIT.upper()),
        ("/etc", COMMIT),
        ("../parts", COMMIT),
        (["owner/parts"], COMMIT),
    ],
)
def test_components_without_files_or_a_commit_are_refused_by_name(
    folder: Path, repository: Any, revision: str | None
) -> None:
    shutil.rmtree(folder / "vae")
    change_index(folder, from_repository("vae", repository, revision))
    with pytest.raises(LoadError) as caught:
        load(folder)
    assert caught.value.message == (
        f"the model 'flux' cannot be loaded: vae/ is missing, and {MODULAR_INDEX} takes vae from "
        f"{repository!r} at the revision {revision!r}: put its files into vae/, or name a hub "
        "repository and a commit of 40 hex digits"
    )


def test_a_folder_outside_of_the_model_is_refused(folder: Path) -> None:
    change_index(folder, from_repository("vae", "owner/parts", COMMIT, subfolder="../../etc"))
    with pytest.raises(LoadError, match=r"vae: subfolder is '\.\./\.\./etc', not a name"):
        load(folder)


def test_what_the_blocks_need_must_be_named(folder: Path) -> None:
    change_index(folder, from_repository("transformer", None, None))
    with pytest.raises(LoadError, match="has no files for transformer, which FluxAutoBlocks needs"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"_blocks_class_name": "MyBlocks"}, "_blocks_class_name is 'MyBlocks'; only the blocks"),
        ({"_blocks_class_name": ["m", "B"]}, r"_blocks_class_name is \['m', 'B'\]; only the bl"),
        ({"_blocks_class_name": "SequentialPipelineBlocks"}, "or blocks composed by code"),
        ({"_blocks_class_name": "FluxPipeline"}, "'FluxPipeline'; only the blocks of diffusers"),
        ({"auto_map": {"ModularPipelineBlocks": "block.Mine"}}, "auto_map names code from the mo"),
        ({"_class_name": ["mine", "Mine"]}, "code from the model's files, which is not run"),
        ({"_class_name": "MyModularPipeline"}, "'MyModularPipeline', which diffusers .* not have"),
        ({"_class_name": "FluxPipeline"}, "'FluxPipeline', which is not a modular pipeline"),
        (
            {
                "_class_name": "StableDiffusion3ModularPipeline",
                "_blocks_class_name": "StableDiffusion3AutoBlocks",
            },
            "has no files for text_encoder_3, tokenizer_3, which StableDiffusion3AutoBlocks needs",
        ),
    ],
)
def test_code_and_unknown_classes_are_refused(
    folder: Path, changes: dict[str, Any], told: str
) -> None:
    change_index(folder, lambda index: index.update(changes))
    with pytest.raises(LoadError, match=told):
        load(folder)


def test_the_code_of_blocks_is_refused(folder: Path) -> None:
    (folder / "modular_config.json").write_text("{}")
    with pytest.raises(LoadError, match="modular_config.json names code from the model's files"):
        load(folder)


def test_pipelines_that_make_videos_are_refused(tmp_path: Path) -> None:
    names = ("text_encoder", "tokenizer", "transformer", "scheduler", "vae")
    kind = ["diffusers", "AutoencoderKLWan"]
    spec = {"pretrained_model_name_or_path": "owner/x", "revision": COMMIT, "type_hint": kind}
    index = {"_class_name": "WanModularPipeline", **{name: [*kind, spec] for name in names}}
    (tmp_path / MODULAR_INDEX).write_text(json.dumps(index))
    with pytest.raises(LoadError, match=r"WanModularPipeline makes videos, not images \(its resu"):
        load(tmp_path)


def test_classes_of_components_must_exist_and_be_named(folder: Path) -> None:
    change_index(folder, from_repository("vae", "x", None, type_hint=["diffusers", "MyVae"]))
    with pytest.raises(LoadError, match=r"vae is \['diffusers', 'MyVae'\], which diffusers .* not"):
        load(folder)
    change_index(folder, from_repository("vae", "x", None, type_hint=["mine", "MyVae"]))
    with pytest.raises(LoadError, match="mine is not one of the libraries Diffusers can load"):
        load(folder)
    change_index(folder, from_repository("vae", "x", None, type_hint=[None, None]))
    with pytest.raises(LoadError, match="vae has no class; its type is"):
        load(folder)


@pytest.mark.parametrize(
    "kind",
    [["diffusers", "FluxPipeline"], ["diffusers", "AutoModel"], ["transformers", "AutoModel"]],
)
def test_components_that_may_read_other_weights_are_refused(folder: Path, kind: list[str]) -> None:
    change_index(folder, from_repository("vae", "x", None, type_hint=kind))
    (folder / "vae" / "model_index.json").write_text("{}")
    with pytest.raises(LoadError, match=r"vae is \[.*\], which is neither a model, a sched"):
        load(folder)


def test_missing_and_damaged_files_are_named(folder: Path) -> None:
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(LoadError, match=r"transformer/diffusion_pytorch_model.safetensors: damag"):
        load(folder)
    weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
    with pytest.raises(LoadError, match="transformer/ has weights as diffusion_pytorch_model.bin"):
        load(folder)


def test_offloading_is_refused_before_weights_are_read(folder: Path) -> None:
    with pytest.raises(LoadError, match="STEPWEAVE_OFFLOAD='model': diffusers cannot offload Flux"):
        load(folder, offload="model")
