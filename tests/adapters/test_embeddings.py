"""Textual inversions: words of a directory's files, which prompts use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from stepweave import StepEngine
from stepweave.adapters.embeddings import Embedding, load_embeddings
from stepweave.config import Settings
from stepweave.errors import ConfigError, LoadError
from tests.support.in_process import InProcess
from tests.support.tiny import FAMILIES, WIDTH
from tests.support.waiting import SECONDS

SD, XL = "stable_diffusion", "stable_diffusion_xl"
PROMPT = "a red circle Zork"

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def vectors(count: int, width: int = WIDTH, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "embeddings"
    place.mkdir()
    return place


def write(folder: Path, token: str = "Zork", **tensors: torch.Tensor) -> Path:
    save_file(tensors or {"emb_params": vectors(3)}, folder / f"{token}.safetensors")
    return folder


def refused(folder: Path, family: str = SD) -> str:
    with pytest.raises(LoadError) as caught:
        load_embeddings(FAMILIES[family].build(), str(folder))
    assert str(folder) not in caught.value.message
    assert caught.value.message.startswith("STEPWEAVE_EMBEDDINGS: ")
    return caught.value.message


def image(pipeline: Any, family: str, prompt: str) -> Any:
    return pipeline(**FAMILIES[family].arguments(prompt, seed=3)).images


TENSORS: dict[str, dict[str, torch.Tensor]] = {
    SD: {"emb_params": vectors(3)},
    XL: {"clip_l": vectors(3), "clip_g": vectors(3, seed=1)},
}


def in_diffusers(family: str, token: str) -> Any:
    pipeline: Any = FAMILIES[family].build()
    for suffix, tensor in zip(("", "_2"), TENSORS[family].values(), strict=False):
        pipeline.load_textual_inversion(
            {token: tensor},
            token=token,
            tokenizer=getattr(pipeline, f"tokenizer{suffix}"),
            text_encoder=getattr(pipeline, f"text_encoder{suffix}"),
        )
    return pipeline


@pytest.mark.parametrize("token", ["zork", pytest.param("Zork", marks=pytest.mark.full)])
@pytest.mark.parametrize("family", [SD, XL])
def test_the_engine_gives_the_image_of_diffusers_own_call(
    folder: Path, family: str, token: str
) -> None:
    """In capital letters, diffusers itself would use the first vector only."""
    pipeline: Any = FAMILIES[family].build()
    write(folder, token, **TENSORS[family])
    assert load_embeddings(pipeline, str(folder)) == (Embedding(token, 3),)
    plain = in_diffusers(family, "zork")
    expected = image(plain, family, "a red zork circle")
    without = image(plain, family, "a red circle")
    assert np.abs(expected - without).max() > 1e-3
    asked = FAMILIES[family].arguments(f"a red {token} circle", seed=3)
    with StepEngine(pipeline, "step") as engine:
        other = engine.submit(**FAMILIES[family].arguments("a red circle", seed=3))
        job = engine.submit(reproducible=True, **asked)
        again = engine.submit(**asked | {"generator": torch.Generator().manual_seed(3)})
        results = [one.result(SECONDS).images for one in (other, job, again)]
    assert np.array_equal(results[1], expected)
    assert np.abs(results[2] - expected).max() < 1e-4
    assert np.abs(results[0] - without).max() < 1e-4


def test_every_vector_counts_as_a_token_and_may_be_cut(folder: Path) -> None:
    pipeline: Any = FAMILIES[SD].build()
    load_embeddings(pipeline, str(write(folder)))
    with StepEngine(pipeline, "step") as engine:
        plain = engine.submit(**FAMILIES[SD].arguments("a red circle"))
        job = engine.submit(**FAMILIES[SD].arguments(PROMPT))
        long = "a large red circle on a blue background, a large red star Zork"
        cut = engine.submit(**FAMILIES[SD].arguments(long))
        for one in (plain, job, cut):
            one.result(SECONDS)
    assert (job.warnings, job.tokens - plain.tokens) == ([], 3)
    (warning,) = cut.warnings
    assert "reads 16 tokens" in warning and "Zork_2" in warning


def test_a_file_of_one_vector_may_have_any_name_inside(folder: Path) -> None:
    pipeline: Any = FAMILIES[SD].build()
    write(folder, "one", **{"<cat-toy>": vectors(1)[0]})
    write(folder, "two", whatever=vectors(2))
    assert load_embeddings(pipeline, str(folder)) == (Embedding("one", 1), Embedding("two", 2))
    numbers = pipeline.tokenizer(
        pipeline.maybe_convert_prompt("one two", pipeline.tokenizer)
    ).input_ids
    table = pipeline.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[numbers[1]], vectors(1)[0])
    assert torch.equal(table[numbers[2:4]], vectors(2))


def test_old_configurations_still_find_the_end_of_a_prompt(folder: Path) -> None:
    """CLIP with end token 2, as in the published models, takes the highest token for the end."""

    def encode(old: bool) -> tuple[Any, Any]:
        pipeline: Any = FAMILIES[XL].build()
        if old:
            config = pipeline.text_encoder_2.config
            config.eos_token_id = 2
            encoder = transformers.CLIPTextModelWithProjection(config).eval()
            encoder.load_state_dict(pipeline.text_encoder_2.state_dict())
            pipeline.text_encoder_2 = encoder
        before = image(pipeline, XL, "a red circle")
        load_embeddings(pipeline, str(folder))
        assert np.array_equal(image(pipeline, XL, "a red circle"), before)
        return image(pipeline, XL, PROMPT), before

    write(folder, **TENSORS[XL])
    with_old, with_new = encode(True), encode(False)
    assert np.array_equal(with_old[1], with_new[1])
    assert np.array_equal(with_old[0], with_new[0])


def test_files_that_cannot_be_used_are_refused_by_name(folder: Path) -> None:
    def message(token: str = "Zork", family: str = SD, **tensors: torch.Tensor) -> str:
        for file in folder.iterdir():
            file.unlink()
        return refused(write(folder, token, **tensors), family)

    assert (
        "Zork.safetensors has the tensors clip_g, clip_l; a textual inversion for this model"
        in (message(**TENSORS[XL]))
    )
    assert "has the tensors emb_params; a textual inversion for this model has the tensors" in (
        message(family=XL)
    )
    assert "has vectors of shape (3, 8) in torch.float32" in message(emb_params=vectors(3, 8))
    assert "for another model" in message(emb_params=vectors(3, 8))
    assert "in torch.int64" in message(emb_params=torch.ones(1, WIDTH, dtype=torch.int64))
    assert "not finite" in message(emb_params=vectors(1) * float("nan"))
    assert "has 76 vectors" in message(emb_params=vectors(76))
    assert "has 2 and 3 vectors" in message(family=XL, clip_l=vectors(2), clip_g=vectors(3))
    assert "circle.safetensors: the tokenizer has the token 'circle' already" in message("circle")
    assert "the file's name is the token in prompts" in message("two words")
    (folder / "two words.safetensors").unlink()
    (folder / "Zork.safetensors").write_bytes(b"no tensors")
    assert "Zork.safetensors: damaged or cut off at 10 bytes" in refused(folder)
    (folder / "Zork.safetensors").unlink()
    (folder / "old.pt").touch()
    assert "old.pt is not a .safetensors file" in refused(folder)


@pytest.mark.parametrize(("first", "second"), [("zork", "zork_1"), ("ork", "zork")])
def test_tokens_that_cannot_be_told_apart_are_refused(
    folder: Path, first: str, second: str
) -> None:
    write(folder, first)
    assert "cannot be told apart" in refused(write(folder, second))


@pytest.mark.parametrize(
    ("family", "what"),
    [
        ("stable_diffusion_3", "StableDiffusion3Pipeline has no textual inversions"),
        ("flux", "text_encoder_2 of FluxPipeline is T5EncoderModel"),
    ],
)
def test_pipelines_without_textual_inversions_are_refused(
    folder: Path, family: str, what: str
) -> None:
    assert what in refused(write(folder), family)


def test_a_directory_without_files_or_none_changes_nothing(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline: Any = FAMILIES[SD].build()
    assert load_embeddings(pipeline, None) == load_embeddings(pipeline, str(folder)) == ()
    assert "has no .safetensors files" in caplog.text
    monkeypatch.setenv("STEPWEAVE_EMBEDDINGS", str(folder / "none"))
    with pytest.raises(ConfigError, match="STEPWEAVE_EMBEDDINGS=.*: it is not an existing dir"):
        Settings.load()


@pytest.mark.full
def test_the_server_lists_them_and_warns_of_other_spellings(
    folder: Path, in_process: Callable[..., InProcess]
) -> None:
    app = in_process(
        FAMILIES[SD].build(),
        embeddings=str(write(folder)),
        preset=json.dumps({"width": 16, "height": 16, "num_inference_steps": 2}),
        batching="step",
    )
    (model,) = app.client.get("/v1/models").json()["data"]
    assert model["stepweave"]["embeddings"] == [{"token": "Zork", "vectors": 3}]
    answers = [app.post(prompt=text, seed=1).json() for text in ("a Zork", "a zork", "a circle")]
    assert [len(answer.get("warnings", [])) for answer in answers] == [0, 1, 0]
    assert "the textual inversion 'Zork' is not used" in answers[1]["warnings"][0]
    assert len({answer["data"][0]["b64_json"] for answer in answers}) == 3
