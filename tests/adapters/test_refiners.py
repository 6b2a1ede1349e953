"""Refiners: one call makes what diffusers' two calls make, alone and among others; what they share
with the model; and how what is none is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from stepweave import StepEngine
from stepweave.adapters.beside import load_beside, look_at_source
from stepweave.adapters.refiners import load_refiner, refined
from stepweave.calls import described
from stepweave.config import Settings
from stepweave.config.components import ComponentSource
from stepweave.config.preset import Preset
from stepweave.errors import LoadError, RequestCancelledError
from stepweave.previews.latents import Latents
from tests.pipelines.parts import XL_BLOCKS, autoencoder, diffusion, unet
from tests.support.hub import COMMIT, hub, point_to
from tests.support.refiners import save_refiner, save_xl
from tests.support.tiny import DIFFUSION, SIDE
from tests.support.together import SECONDS, TOLERANCE, difference, numbers, submit_together

pytestmark = pytest.mark.usefixtures("one_torch_thread", "no_settings")

CPU = torch.device("cpu")
MODULE = "refiner.mine"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a model and of its refiner."""
    place = tmp_path_factory.mktemp("refiners")
    save_refiner(save_xl(place / "model"), place / "refiner")
    return place


@pytest.fixture
def base(folder: Path) -> Any:
    return quiet(diffusers.StableDiffusionXLPipeline.from_pretrained(folder / "model"))


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def plain(base: Any, second: Any, seed: int, steps: int, start: float | None) -> torch.Tensor:
    """The image by diffusers' own calls."""
    both = {"generator": torch.Generator().manual_seed(seed), **asked(seed, steps)}
    size = {"height": SIDE, "width": SIDE}
    if start is None:
        return numbers(base(**both, **size, output_type="np"))
    latents = base(**both, **size, denoising_end=start, output_type="latent").images
    return numbers(second(**both, image=latents, denoising_start=start, output_type="np"))


def asked(seed: int, steps: int) -> dict[str, Any]:
    return {
        "prompt": f"{seed} rings",
        "negative_prompt": "a square",
        "num_inference_steps": steps,
        "guidance_scale": 4.0 + seed,
    }


def request(seed: int, steps: int, start: float | None) -> dict[str, Any]:
    return {
        **asked(seed, steps),
        "height": SIDE,
        "width": SIDE,
        "output_type": "np",
        "generator": torch.Generator().manual_seed(seed),
        **({} if start is None else {"refiner_start": start}),
    }


# seed, steps, and where the refiner takes over
JOBS = [(1, 5, 0.8), (2, 6, 0.5), (3, 4, 0.5), (4, 8, 0.25), (5, 5, None), (6, 7, 0.8)]


def test_jobs_with_and_without_a_refiner_are_right_together(folder: Path, base: Any) -> None:
    second = quiet(load_refiner(folder / "refiner", base, torch.float32))
    reference = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(
        folder / "refiner", vae=base.vae, text_encoder_2=base.text_encoder_2
    )
    expected = [plain(base, quiet(reference), *job) for job in JOBS]
    assert len({image.numpy().tobytes() for image in expected}) == len(JOBS)
    pipeline = refined(base, second, {})
    with StepEngine(base, knee=False, beside={MODULE: second.unet}) as engine:
        for _ in range(2):
            requests = [
                lambda job=job: {
                    **request(*job),
                    **({} if job[2] is None else {"pipeline": pipeline}),
                }
                for job in JOBS
            ]
            done = submit_together(engine, requests)
            found = [numbers(job.result(SECONDS)) for job in done]
            assert max(map(difference, found, expected)) <= TOLERANCE
            assert [tuple(job.progress) for job in done] == [(job[1], job[1]) for job in JOBS]
        forwards = engine.stats().forwards
        assert forwards["unet"].merged_calls > 0, "of both kinds"
        assert forwards[MODULE].merged_calls > 0, "from different steps on"
        assert engine.stats().cache_hits > 0, "the refiner encodes what the model has encoded"
        exact = engine.submit(**request(*JOBS[0]), pipeline=pipeline, reproducible=True)
        assert torch.equal(numbers(exact.result(SECONDS)), expected[0])


class Watching:
    """Notes progress, and the steps whose latents it gets."""

    def __init__(self) -> None:
        self.totals: list[int] = []
        self.steps: list[int] = []
        self.cancel_at: int | None = None

    def progressed(self, job: Any) -> None:
        step, total = job.progress
        if total:
            self.totals.append(total)
        if step == self.cancel_at:
            job.cancel()

    def wants(self, step: int, total: int) -> bool:
        return True

    def denoised(self, job: Any, latents: Latents) -> None:
        assert latents.clean().isfinite().all()
        self.steps.append(job.progress.step)


def test_progress_previews_and_cancelling_span_both_models(folder: Path, base: Any) -> None:
    second = load_refiner(folder / "refiner", base, torch.float32)
    pipeline = refined(base, second, {})
    with StepEngine(base, beside={MODULE: second.unet}) as engine:
        watching = Watching()
        engine.submit(**request(1, 8, 0.5), pipeline=pipeline, observer=watching).result(SECONDS)
        assert set(watching.totals) == {8}, "from the first step on"
        assert watching.steps == list(range(1, 9))
        cancelling = Watching()
        cancelling.cancel_at = 6
        job = engine.submit(**request(1, 8, 0.5), pipeline=pipeline, observer=cancelling)
        with pytest.raises(RequestCancelledError):
            job.result(SECONDS)
        assert job.progress.step == 6


@pytest.mark.parametrize(
    "scheduler",
    [name if name == "Heun" else pytest.param(name, marks=pytest.mark.full) for name in DIFFUSION],
)
def test_every_scheduler_runs_through_both_models(folder: Path, base: Any, scheduler: str) -> None:
    kind, changes = DIFFUSION[scheduler]
    own = kind.from_config(base.scheduler.config, **changes)
    second = load_refiner(folder / "refiner", base, torch.float32)
    reference = quiet(
        diffusers.StableDiffusionXLImg2ImgPipeline(
            **{**second.components, "scheduler": kind.from_config(own.config)},
            requires_aesthetics_score=True,
            add_watermarker=False,
        )
    )
    pipeline = refined(base, second, {})
    with StepEngine(base, beside={MODULE: second.unet}) as engine:
        job = engine.submit(**request(1, 7, 0.6), pipeline=pipeline, scheduler=own)
        found = numbers(job.result(SECONDS))
    base.scheduler = own
    assert difference(found, plain(base, reference, 1, 7, 0.6)) <= TOLERANCE
    assert job.progress.step == job.progress.total


def test_what_is_equal_is_shared_and_what_is_not_is_loaded(
    folder: Path, base: Any, tmp_path: Path
) -> None:
    second = load_refiner(folder / "refiner", base, torch.float32)
    for name in ("vae", "text_encoder_2", "tokenizer_2"):
        assert getattr(second, name) is getattr(base, name), name
    assert second.unet is not base.unet and second.text_encoder is None
    torch.manual_seed(9)
    save_refiner(base, tmp_path / "other", vae=autoencoder())
    other = load_refiner(tmp_path / "other", base, torch.float32)
    assert other.vae is not base.vae and other.text_encoder_2 is base.text_encoder_2
    base.vae.register_to_config(scaling_factor=0.5)
    assert load_refiner(folder / "refiner", base, torch.float32).vae is not base.vae


def test_what_is_null_is_the_models(folder: Path, base: Any, tmp_path: Path) -> None:
    save_refiner(base, tmp_path / "it", text_encoder_2=None, tokenizer_2=None)
    index = json.loads((tmp_path / "it" / "model_index.json").read_text())
    index["vae"] = [None, None]
    (tmp_path / "it" / "model_index.json").write_text(json.dumps(index))
    second = load_refiner(tmp_path / "it", base, torch.float32)
    assert second.text_encoder_2 is base.text_encoder_2 and second.vae is base.vae
    assert second.tokenizer_2 is base.tokenizer_2
    index["unet"] = [None, None]
    (tmp_path / "it" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(LoadError, match="it has no unet"):
        load_refiner(tmp_path / "it", base, torch.float32)


@pytest.mark.parametrize(
    "mode",
    ["off", *(pytest.param(mode, marks=pytest.mark.full) for mode in ("threads", "request"))],
)
def test_modes_without_shared_steps_refine_too(folder: Path, base: Any, mode: Any) -> None:
    second = load_refiner(folder / "refiner", base, torch.float32)
    pipeline = refined(base, second, {})
    expected = [numbers(pipeline(**request(seed, 5, 0.6))) for seed in (1, 2)]
    with StepEngine(base, mode, beside={MODULE: second.unet}) as engine:
        jobs = [engine.submit(**request(seed, 5, 0.6), pipeline=pipeline) for seed in (1, 2)]
        found = [numbers(job.result(SECONDS)) for job in jobs]
    assert max(map(difference, found, expected)) <= TOLERANCE
    assert [tuple(job.progress) for job in jobs] == [(5, 5)] * 2


def test_a_text_encoder_with_textual_inversions_is_shared(folder: Path, base: Any) -> None:
    base.tokenizer_2.add_tokens("<ring>")
    base.text_encoder_2.resize_token_embeddings(len(base.tokenizer_2), mean_resizing=False)
    second = load_refiner(folder / "refiner", base, torch.float32)
    assert second.text_encoder_2 is base.text_encoder_2
    assert second.tokenizer_2 is base.tokenizer_2


def test_a_default_autoencoder_decodes_what_refiners_make(
    folder: Path, base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(9)
    autoencoder().save_pretrained(tmp_path / "vae")
    torch.manual_seed(10)
    save_refiner(base, tmp_path / "own", vae=autoencoder())
    components = {
        "fine": str(tmp_path / "own"),
        "soft": {"source": str(tmp_path / "vae"), "default": True},
    }
    monkeypatch.setenv("STEPWEAVE_COMPONENTS", json.dumps(components))
    added = load_beside(Settings.load(), Preset(), base, CPU, torch.float32)
    assert base.vae is added["soft"].model is added["fine"].model.vae
    assert added["fine"].modules().keys() == {"refiner.fine.unet"}


def test_the_call_is_that_of_the_base_with_what_the_refiner_has(folder: Path, base: Any) -> None:
    call = described(refined(base, load_refiner(folder / "refiner", base, torch.float32), {}))
    assert {"refiner_start", "aesthetic_score", "prompt_2", "original_size"} <= set(call.arguments)
    assert call.kind == "image" and not call.needs and "denoising_end" not in call.takes
    assert call.arguments["refiner_start"].description.startswith("The share of the steps")


@pytest.mark.parametrize(
    ("start", "spacing", "message"),
    [
        (0.9, "trailing", "none is left for the refiner"),
        (0.01, "leading", "none is left for the model"),
        (1.0, "leading", "must be between 0 and 1"),
    ],
)
def test_both_models_must_have_a_step(
    folder: Path, base: Any, start: float, spacing: str, message: str
) -> None:
    base.scheduler.register_to_config(timestep_spacing=spacing)
    pipeline = refined(base, load_refiner(folder / "refiner", base, torch.float32), {})
    with pytest.raises(ValueError, match=message):
        pipeline(**request(1, 4, start))


def wrong(base: Any, folder: Path, what: str) -> Path:
    """A directory of a refiner with something wrong."""
    parts: dict[str, Any] = {}
    if what == "noise":
        config = {**base.scheduler.config, "prediction_type": "v_prediction"}
        parts["scheduler"] = type(base.scheduler).from_config(config)
    elif what == "latents":
        parts["unet"] = unet(**XL_BLOCKS, in_channels=9)
    elif what == "autoencoder":
        config = {**autoencoder().config, "latent_channels": 16}
        parts["vae"] = diffusers.AutoencoderKL(**config)
    save_refiner(base, folder, **parts)
    if what == "no weights":
        (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    elif what == "no tokenizer":
        shutil.rmtree(folder / "tokenizer_2")
    elif what == "base":
        shutil.rmtree(folder)
        base.save_pretrained(folder)
    return folder


WRONG = {
    "noise": "its scheduler's prediction_type is 'v_prediction'; that of the model's is 'epsilon'",
    "latents": "its unet's in_channels is 9; that of the model's is 4",
    "autoencoder": "its latent_channels is 16",
    "no weights": "unet",
    "no tokenizer": "tokenizer_2/ is missing",
    "base": "it is a StableDiffusionXLPipeline; of pipelines, only a StableDiffusionXLImg2Img",
}


@pytest.mark.parametrize(("what", "message"), WRONG.items(), ids=WRONG)
def test_what_is_no_refiner_of_the_model_is_refused(
    base: Any, tmp_path: Path, what: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = wrong(base, tmp_path / "it", what)
    monkeypatch.setenv("STEPWEAVE_COMPONENTS", json.dumps({"fine": str(place)}))
    with pytest.raises(LoadError, match="the component 'fine' cannot be loaded: ") as caught:
        load_beside(Settings.load(), Preset(), base, CPU, torch.float32)
    assert message in caught.value.message
    assert str(tmp_path) not in caught.value.message and "\n" not in caught.value.message


def test_a_refiner_of_another_family_is_refused(folder: Path) -> None:
    other = diffusers.StableDiffusionPipeline(**diffusion())
    with pytest.raises(LoadError, match="take over from StableDiffusionXLPipeline, which Stable"):
        load_refiner(folder / "refiner", other, torch.float32)


def test_a_refiner_is_looked_at_without_its_weights(folder: Path, tmp_path: Path) -> None:
    source = ComponentSource(source=str(folder / "refiner"))
    assert look_at_source(source) == "a refiner, StableDiffusionXLImg2ImgPipeline"
    shutil.copytree(folder / "refiner", tmp_path / "cut")
    (tmp_path / "cut" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(LoadError, match="unet"):
        look_at_source(ComponentSource(source=str(tmp_path / "cut")))
    with pytest.raises(LoadError, match="default is true, which only an autoencoder may be"):
        look_at_source(ComponentSource(source=str(folder / "refiner"), default=True))


def test_a_refiner_is_downloaded_of_a_commit(
    folder: Path, base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder / "refiner", tmp_path / "hub")
    (tmp_path / "hub" / "sd_xl_refiner_1.0.safetensors").write_bytes(b"no")
    monkeypatch.setenv("STEPWEAVE_COMPONENTS", json.dumps({"fine": f"owner/fine@{COMMIT}"}))
    with hub(tmp_path / "hub", "owner/fine") as served:
        served.let_go.set()
        point_to(served, monkeypatch)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        added = load_beside(Settings.load(), Preset(), base, CPU, torch.float32)
    assert added["fine"].model.text_encoder_2 is base.text_encoder_2
    assert not list((tmp_path / "cache").rglob("sd_xl_refiner_1.0.safetensors"))
