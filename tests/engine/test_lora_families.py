"""Jobs of different LoRAs in shared forwards, in the families of pipelines that people use most."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from stepweave import Loras, StepEngine
from tests.pipelines.transformers_qwen import z_image
from tests.pipelines.video import wan
from tests.support.loras import plain, save_lora
from tests.support.tiny import FAMILIES
from tests.support.together import SECONDS, TOLERANCE, difference, numbers

pytestmark = pytest.mark.usefixtures("one_torch_thread", "every_row_pays")

Named = Sequence[tuple[str, float]]
Targets = Mapping[str, Sequence[str]]

EFFECT = 0.01  # of each adapter, on a pixel
SHARED = 0.5  # of the denoiser's calls that may share forwards; measured: 0.64 to 0.85
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CLIP = ("q_proj", "v_proj", "out_proj")
PROMPTS = ("a red circle", "a large green square and a blue ring below it", "x")
NAMED: list[Named] = [
    [("rings", 0.8)],
    [],
    [("chalk", 1.2)],
    [("rings", 0.3)],
    [("rings", 0.5), ("chalk", 0.7)],
    [("chalk", -0.6)],
]
LATER = 3  # the jobs from here on join at a step of the first


@dataclass(frozen=True)
class Case:
    """A pipeline, the layers of two adapters, and how a call says the guidance."""

    build: Callable[[], Any]
    call: Mapping[str, Any]
    rings: Targets
    chalk: Targets
    guidance: tuple[str, tuple[float, ...]] = ("guidance_scale", (4.0, 1.0))
    denoiser: str = "transformer"

    def request(self, seed: int) -> dict[str, Any]:
        name, scales = self.guidance
        return {
            **self.call,
            "prompt": PROMPTS[seed % 3],
            "generator": torch.Generator().manual_seed(seed),
            "num_inference_steps": 5 + seed % 3,
            name: scales[seed // 2 % len(scales)],
        }


def tiny(name: str, *adapters: Targets, **others: Any) -> Case:
    family = FAMILIES[name]
    return Case(family.build, family.call, *adapters, **others)


SIZE = {"height": 16, "width": 16, "output_type": "np"}
CASES = {
    "stable_diffusion": tiny(
        "stable_diffusion",
        {"unet": (*ATTENTION, "conv1", "proj_in"), "text_encoder": CLIP},
        {"unet": ("conv2", "conv_in", "time_emb_proj", "to_q")},
        denoiser="unet",
    ),
    "stable_diffusion_xl": tiny(
        "stable_diffusion_xl",
        {"unet": (*ATTENTION, "conv1"), "text_encoder": CLIP, "text_encoder_2": CLIP},
        {"unet": ("ff.net.0.proj", "conv_out", "to_k"), "text_encoder_2": ("v_proj", "fc1")},
        denoiser="unet",
    ),
    "stable_diffusion_3": tiny(
        "stable_diffusion_3",
        {"transformer": ATTENTION, "text_encoder": CLIP, "text_encoder_2": ("q_proj", "fc2")},
        {"transformer": ("to_q", "add_k_proj", "ff.net.0.proj", "norm1.linear", "proj_out")},
    ),
    "flux": tiny(
        "flux",
        {"transformer": ATTENTION, "text_encoder": CLIP},
        {"transformer": ("proj_mlp", "x_embedder", "context_embedder", "norm.linear", "to_k")},
        guidance=("guidance_scale", (3.5, 1.0, 7.0)),
    ),
    "qwen_image": tiny(
        "qwen_image",
        {"transformer": ATTENTION},
        {"transformer": ("img_in", "txt_in", "img_mod.1", "add_q_proj", "img_mlp.net.2")},
        guidance=("true_cfg_scale", (4.0, 1.0)),
    ),
    "z_image": Case(
        z_image,
        {**SIZE, "max_sequence_length": 48},
        {"transformer": ATTENTION},
        {"transformer": ("w1", "to_v", "t_embedder.mlp.0")},
    ),
    "wan": Case(
        wan,
        {**SIZE, "max_sequence_length": 16, "num_frames": 5},
        {"transformer": ATTENTION},
        {"transformer": ("ffn.net.0.proj", "proj_out", "time_proj", "to_v")},
    ),
}
QUICK = ("stable_diffusion_3", "stable_diffusion_xl", "flux")


class Later:
    """An observer that calls a function when its job has done a step."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._called = False

    def progressed(self, job: Any) -> None:
        if job.progress.step and not self._called:
            self._called = True
            self._call()

    def wants(self, step: int, total: int) -> bool:
        return False

    def denoised(self, job: Any, latents: Any) -> None:
        pass


def staggered(engine: StepEngine, case: Case, **options: Any) -> list[torch.Tensor]:
    """Jobs of all of NAMED, of which some join while others run."""
    jobs: dict[int, Any] = {}
    joined = threading.Event()

    def submit(seeds: range) -> None:
        for seed in seeds:
            jobs[seed] = engine.submit(**case.request(seed), lora=NAMED[seed], **options)

    def join() -> None:
        submit(range(LATER, len(NAMED)))
        joined.set()

    jobs[0] = engine.submit(**case.request(0), lora=NAMED[0], observer=Later(join), **options)
    submit(range(1, LATER))
    assert joined.wait(SECONDS)
    return [numbers(jobs[seed].result(SECONDS)) for seed in range(len(NAMED))]


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in CASES],
)
def test_jobs_of_different_adapters_share_forwards_and_are_right(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    build = case.build
    files = {
        "rings": save_lora(tmp_path / "rings.safetensors", build, case.rings, rank=4, alpha=8),
        "chalk": save_lora(
            tmp_path / "chalk.safetensors", build, case.chalk, rank=3, alpha=5, seed=1
        ),
    }
    using = plain(build(), files)
    expected = [numbers(using(lora)(**case.request(seed))) for seed, lora in enumerate(NAMED)]
    for seed in (0, 2):
        effect = difference(numbers(using([])(**case.request(seed))), expected[seed])
        assert effect > EFFECT, f"{NAMED[seed]} changes pixels by {effect:.2g}"
    pipeline = build()
    loras = Loras(pipeline, tmp_path)
    loras.load("rings"), loras.load("chalk")
    with StepEngine(pipeline, loras=loras) as engine:
        for _ in range(2):
            results = staggered(engine, case)
            for seed, result in enumerate(results):
                worst = difference(result, expected[seed])
                assert worst <= TOLERANCE, f"job {seed} differs by {worst:.2g}"
        stats = engine.stats()
        results = staggered(engine, case, reproducible=True)
        for seed, result in enumerate(results):
            assert torch.equal(result, expected[seed]), f"job {seed}"
    shares = {part: forwards.merged_share for part, forwards in stats.forwards.items()}
    print(name, shares, stats.unshared)  # noqa: T201
    assert shares[case.denoiser] > SHARED, stats.certificates
    assert stats.errors == 0
