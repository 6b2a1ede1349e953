from __future__ import annotations

import copy
import io
import json
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, UserCpuOffloadHook, add_hook_to_module
from diffusers import FirstBlockCacheConfig
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from PIL import Image
from torch import nn

from stepweave import StepEngine
from stepweave.config import Settings
from stepweave.errors import LoadError, UnavailableError
from stepweave.loading.loader import load_pipeline
from stepweave.loading.optimizations import apply_optimizations, check_optimizations
from stepweave.planning.stats import Forwards
from stepweave.serving.model import ServedModel
from stepweave.serving.server import Server
from tests.support.in_process import InProcess
from tests.support.resolving import resolve
from tests.support.served import serve
from tests.support.tiny import FAMILIES, Family
from tests.support.together import submit_together
from tests.support.waiting import SECONDS

pytestmark = pytest.mark.usefixtures("every_row_pays")

CPU = torch.device("cpu")
TOLERANCE = 1e-4
PROMPTS = ("a red circle", "ring", "a large blue star on a white background", "cross")
SD = FAMILIES["stable_diffusion"]
FLUX = FAMILIES["flux"]
INT8 = {
    "quant_backend": "torchao",
    "quant_kwargs": {
        "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}}
    },
    "components_to_quantize": ["transformer"],
}


def calls(family: Family) -> list[dict[str, Any]]:
    return [family.arguments(prompt, seed=i, steps=3 + i % 3) for i, prompt in enumerate(PROMPTS)]


def alone(pipeline: Any, family: Family) -> list[np.ndarray]:
    return [pipeline(**call).images for call in calls(family)]


def assert_company_agrees(
    pipeline: Any, family: Family, expected: list[np.ndarray], rounds: int = 2
) -> None:
    """Jobs in company draw the expected images, and share the denoiser's forwards in the last
    round."""
    denoiser = "unet" if hasattr(pipeline, "unet") else "transformer"
    with StepEngine(pipeline) as engine:
        for _ in range(rounds):  # the first while certificates are granted
            before = copy.copy(engine.stats().forwards.get(denoiser, Forwards()))
            jobs = submit_together(engine, [partial(dict, call) for call in calls(family)])
            for job, images in zip(jobs, expected, strict=True):
                assert np.abs(job.result(SECONDS).images - images).max() < TOLERANCE
        stats = engine.stats()
    assert (stats.errors, stats.retried) == (0, 0)
    forwards = stats.forwards[denoiser]
    assert forwards.merged_calls - before.merged_calls > 0.5 * (forwards.calls - before.calls), (
        stats
    )
    states = {one["call"]: one["state"] for one in stats.certificates}
    assert states[denoiser] == "certified"


# Compiling


# torch 2.13 itself calls what it deprecates, when its compiler is imported
@pytest.mark.full
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_compiled_unet_merges_and_draws_the_same() -> None:
    """For real, with inductor: some 20 s of compiling on two cores, unless torch has it in its
    cache."""
    pipeline = SD.build()
    expected = alone(pipeline, SD)
    apply_optimizations(pipeline, Settings(compile=True), CPU)
    compiled = [part for part in pipeline.unet.modules() if part._compiled_call_impl is not None]
    assert {type(part).__name__ for part in compiled} == {"BasicTransformerBlock"}
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    assert_company_agrees(pipeline, SD, expected)
    seen = graphs["unique_graphs"]
    assert 0 < seen < len(compiled)
    pipeline(**SD.arguments("a red circle", num_images_per_prompt=7))
    assert graphs["unique_graphs"] == seen  # no other number of rows starts it again


def test_what_cannot_be_compiled_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        LoadError,
        match=r"STEPWEAVE_COMPILE=True .*SD3Transformer2DModel declares no repeated blocks",
    ):
        apply_optimizations(FAMILIES["stable_diffusion_3"].build(), Settings(compile=True), CPU)
    monkeypatch.setattr("shutil.which", lambda program: None)
    with pytest.raises(LoadError, match=r"STEPWEAVE_COMPILE needs a compiler, g\+\+ or clang\+\+"):
        check_optimizations(Settings(compile=True), CPU)


# Attention


@pytest.fixture
def native_again() -> Iterator[None]:
    """diffusers sets the backend for the whole process, too."""
    before, _ = _AttentionBackendRegistry.get_active_backend()
    yield
    _AttentionBackendRegistry.set_active_backend(before)


@pytest.mark.usefixtures("native_again")
def test_an_attention_backend_computes_the_denoisers_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline = FLUX.build()
    expected = alone(pipeline, FLUX)
    backend = AttentionBackendName._NATIVE_MATH
    used = []
    compute = _AttentionBackendRegistry._backends[backend]

    def counted(*args: Any, **kwargs: Any) -> Any:
        used.append(1)
        return compute(*args, **kwargs)

    apply_optimizations(pipeline, Settings(attention_backend=backend.value), CPU)
    monkeypatch.setitem(_AttentionBackendRegistry._backends, backend, counted)
    assert_company_agrees(pipeline, FLUX, expected)
    assert used


@pytest.mark.usefixtures("native_again")
@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        (
            "flash",
            r"STEPWEAVE_ATTENTION_BACKEND='flash' could not be enabled: .*install `flash-attn",
        ),
        (
            "_native_cudnn",
            r"STEPWEAVE_ATTENTION_BACKEND='_native_cudnn' could not be enabled: No viable backend",
        ),
    ],
)
def test_an_attention_backend_that_cannot_run_here_is_refused(backend: str, reason: str) -> None:
    with pytest.raises(LoadError, match=reason):
        apply_optimizations(FLUX.build(), Settings(attention_backend=backend), CPU)


def test_an_attention_backend_that_does_not_exist_is_refused() -> None:
    with pytest.raises(
        LoadError,
        match=r"STEPWEAVE_ATTENTION_BACKEND='flush' is not one of flash, .*native, .*xformers",
    ):
        check_optimizations(Settings(attention_backend="flush"), CPU)


@pytest.mark.parametrize(
    ("family", "model"),
    [("stable_diffusion", "UNet2DConditionModel"), ("stable_diffusion_3", "SD3Transformer2DModel")],
)
def test_models_that_no_attention_backend_reaches_are_refused(family: str, model: str) -> None:
    before = _AttentionBackendRegistry.get_active_backend()
    with pytest.raises(
        LoadError, match=f"the attention of {model} does not go through diffusers' dispatcher"
    ):
        apply_optimizations(FAMILIES[family].build(), Settings(attention_backend="native"), CPU)
    assert _AttentionBackendRegistry.get_active_backend() == before


# The autoencoder


def test_slicing_and_tiling_reach_the_autoencoder() -> None:
    pipeline = SD.build()
    expected = alone(pipeline, SD)
    apply_optimizations(pipeline, Settings(vae_slicing=True, vae_tiling=True), CPU)
    assert (pipeline.vae.use_slicing, pipeline.vae.use_tiling) == (True, True)
    assert_company_agrees(pipeline, SD, expected)  # of one tile


def test_an_autoencoder_without_slicing_is_refused_by_name() -> None:
    pipeline = FAMILIES["stable_cascade"].build()
    with pytest.raises(
        LoadError,
        match=r"STEPWEAVE_VAE_SLICING=True could not be enabled: PaellaVQModel has no enable_slic",
    ):
        apply_optimizations(pipeline, Settings(vae_slicing=True), CPU)
    with pytest.raises(LoadError, match=r"STEPWEAVE_VAE_TILING=True .*has no autoencoder"):
        apply_optimizations(type("P", (), {"components": {}})(), Settings(vae_tiling=True), CPU)


# Channels last


def test_channels_last_reaches_unet_and_autoencoder_and_changes_nothing() -> None:
    pipeline = SD.build()
    expected = alone(pipeline, SD)
    apply_optimizations(pipeline, Settings(channels_last=True), CPU)
    for model in (pipeline.unet, pipeline.vae):
        weights = [one for one in model.parameters() if one.ndim == 4]
        assert weights
        assert all(one.is_contiguous(memory_format=torch.channels_last) for one in weights)
    assert_company_agrees(pipeline, SD, expected)


def test_models_without_2d_convolutions_are_left_alone() -> None:
    pipeline = FLUX.build()
    video = nn.Conv3d(2, 2, 3)
    pipeline.transformer.video = video
    apply_optimizations(pipeline, Settings(channels_last=True), CPU)
    assert all(one.is_contiguous() for one in pipeline.transformer.parameters())
    with pytest.raises(LoadError, match=r"STEPWEAVE_CHANNELS_LAST=True: P has no 2D convolutions"):
        apply_optimizations(type("P", (), {"components": {}})(), Settings(channels_last=True), CPU)


# Quantisation


@pytest.mark.full
def test_the_quantised_embedded_model_draws_nearly_the_same_and_merges() -> None:
    settings = Settings(quantization=INT8)
    exact, _ = load_pipeline(Settings(), CPU, torch.float32)
    pipeline, preset = load_pipeline(settings, CPU, torch.float32)
    apply_optimizations(pipeline, settings, CPU)
    block = pipeline.transformer.transformer_blocks[0]
    assert type(block.attn.to_q.weight).__name__ == "Int8Tensor"
    assert type(pipeline.text_encoder.get_input_embeddings().weight) is nn.Parameter

    def call(prompt: str, seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        common = {"num_inference_steps": 10, "height": 64, "width": 64, "output_type": "np"}
        return {**preset.call, **common, "prompt": prompt, "generator": generator}

    requests = [
        ("a large red circle on a blue background", 1),
        ("a small green star", 2),
        ("a yellow ring", 3),
    ]
    expected = [pipeline(**call(*request)).images for request in requests]
    for request, images in zip(requests, expected, strict=True):
        difference = np.abs(images - exact(**call(*request)).images)
        assert 0 < difference.mean() < 5e-3
    with StepEngine(pipeline) as engine:
        for _ in range(2):
            jobs = [engine.submit(**call(*request)) for request in requests]
            for job, images in zip(jobs, expected, strict=True):
                assert np.abs(job.result(SECONDS).images - images).max() < 1e-3
        stats = engine.stats()
    assert stats.forwards["transformer"].merged_share > 0.5
    assert stats.errors == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"quant_backend": "gguf", "quant_kwargs": {}},
            "gguf cannot quantise 'transformer': .*pip install gguf",
        ),
        ({"quant_backend": "int9"}, "quant_backend is 'int9'; diffusers has .*torchao"),
        (
            {"quant_kwargs": {"bits": 9}},
            "quant_kwargs has 'bits'; TorchAoConfig of diffusers takes quant_type, modules_",
        ),
        (
            {"quant_kwargs": {}},
            "quant_kwargs lacks 'quant_type', which TorchAoConfig of diffusers needs",
        ),
        (
            {"components_to_quantize": ["scheduler"]},
            "'scheduler'; the models of StableDiffusion3Pipeline are text_enc",
        ),
    ],
    ids=["package", "backend", "argument", "lacking", "component"],
)
def test_quantisation_that_cannot_be_is_refused_by_name(
    changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(LoadError, match=f"STEPWEAVE_QUANTIZATION: .*{reason}"):
        load_pipeline(Settings(quantization=INT8 | changes), CPU, torch.float32)


def test_all_models_are_quantised_where_none_is_named() -> None:
    pipeline, _ = load_pipeline(
        Settings(quantization=INT8 | {"components_to_quantize": None}), CPU, torch.float32
    )
    quantised = {
        name for name, one in pipeline.components.items() if getattr(one, "hf_quantizer", None)
    }
    assert quantised == {"transformer", "vae", "text_encoder", "text_encoder_2"}


def test_a_pipeline_made_in_code_is_not_quantised_behind_its_back() -> None:
    with pytest.raises(
        LoadError,
        match="STEPWEAVE_QUANTIZATION names 'transformer', which is not quantised in FluxPipeline",
    ):
        apply_optimizations(FLUX.build(), Settings(quantization=INT8), CPU)


# Offload


class Recorder:
    """Stands for a GPU: which models accelerate's hooks have brought, and what it held at most."""

    def __init__(self, pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names = {id(one): name for name, one in pipeline.components.items()}
        self.held: set[str] = set()
        self.seen: set[frozenset[str]] = set()
        for user in pipeline._all_hooks:
            monkeypatch.setattr(user.hook, "pre_forward", self._bring(user, user.hook.pre_forward))
            monkeypatch.setattr(user.hook, "init_hook", self._take(user.hook.init_hook))

    def _bring(self, user: UserCpuOffloadHook, function: Callable[..., Any]) -> Callable[..., Any]:
        def bring(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            before = user.hook.prev_module_hook
            if before is not None:
                self.held.discard(self.names[id(before.model)])
            self.held.add(self.names[id(module)])
            self.seen.add(frozenset(self.held))
            return function(module, *args, **kwargs)

        return bring

    def _take(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def take(module: nn.Module) -> Any:
            self.held.discard(self.names[id(module)])
            return function(module)

        return take


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("stable_diffusion_xl", marks=pytest.mark.full),
        pytest.param("controlnet_sd", marks=pytest.mark.full),
        "flux",
    ],
)
def test_jobs_merge_with_model_offload_and_no_more_is_on_the_gpu_than_with_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILIES[name]
    pipeline = family.build()
    expected = alone(pipeline, family)
    pipeline.enable_model_cpu_offload(device="cpu")  # all as on a GPU, but that moving is for free
    forwards = {
        key: one.forward for key, one in pipeline.components.items() if isinstance(one, nn.Module)
    }
    recorder = Recorder(pipeline, monkeypatch)
    alone(pipeline, family)  # and diffusers puts the hooks on anew after each call
    single = recorder.seen
    monkeypatch.undo()
    recorder = Recorder(pipeline, monkeypatch)
    forwards = {
        key: one.forward for key, one in pipeline.components.items() if isinstance(one, nn.Module)
    }
    assert_company_agrees(pipeline, family, expected)
    assert all(any(held <= one for one in single) for held in recorder.seen), (
        recorder.seen,
        single,
    )
    assert recorder.held == set()
    assert {key: pipeline.components[key].forward for key in forwards} == forwards
    assert all("_diffusers_hook" not in vars(pipeline.components[key]) for key in forwards)
    monkeypatch.undo()
    for images, one in zip(expected, alone(pipeline, family), strict=True):
        assert np.abs(images - one).max() < TOLERANCE


def test_what_keeps_a_calls_state_still_takes_turns_and_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sequential, grouped, cached = SD.build(), FLUX.build(), FLUX.build()
    # sequential offload's hook; to take weights off and bring them back, accelerate needs two kinds
    # of devices
    add_hook_to_module(sequential.unet.conv_in, AlignDevicesHook(CPU))
    grouped.enable_group_offload(CPU, CPU, offload_type="leaf_level")
    cached.enable_model_cpu_offload(device="cpu")
    cached.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.01))
    for pipeline, family, hook in (
        (sequential, SD, "AlignDevicesHook"),
        (grouped, FLUX, "group_offloading"),
        (cached, FLUX, "fbc_leader_block_hook"),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "stepweave"), StepEngine(pipeline) as engine:
            jobs = [engine.submit(**call) for call in calls(family)]
            assert all(np.isfinite(job.result(SECONDS).images).all() for job in jobs)
            assert sum(one.merged_calls for one in engine.stats().forwards.values()) == 0
        lines = [record.message for record in caplog.records if "one at a time" in record.message]
        assert len(lines) == 1
        assert hook in lines[0]


@pytest.mark.parametrize(
    ("settings", "device", "reason"),
    [
        (
            {"offload": "model"},
            "cpu",
            "STEPWEAVE_OFFLOAD='model' moves weights to a GPU, but the device is the CPU",
        ),
        (
            {"offload": "sequential", "compile": True},
            "cuda",
            "'sequential' excludes STEPWEAVE_COMPILE",
        ),
        (
            {"offload": "sequential", "quantization": INT8},
            "cuda",
            "'sequential' excludes STEPWEAVE_QUANTIZATION",
        ),
    ],
)
def test_offload_that_cannot_be_is_refused(
    settings: dict[str, Any], device: str, reason: str
) -> None:
    with pytest.raises(LoadError, match=reason):
        check_optimizations(Settings(**settings), torch.device(device))


def test_a_pipeline_that_knows_no_offload_is_refused() -> None:
    pipeline = SD.build()
    pipeline.model_cpu_offload_seq = None
    with pytest.raises(
        LoadError,
        match=r"STEPWEAVE_OFFLOAD='model' could not be enabled: Model CPU offload cannot be",
    ):
        apply_optimizations(pipeline, Settings(offload="model"), torch.device("cpu", 0))


@pytest.mark.usefixtures("native_again")
def test_switches_go_together(tmp_path: Path) -> None:
    """All but compiling, which would take minutes here."""
    FLUX.build().save_pretrained(tmp_path)
    switches = {
        "channels_last": True,
        "vae_slicing": True,
        "vae_tiling": True,
        "attention_backend": "native",
    }
    settings = Settings(model=str(tmp_path), quantization=INT8, offload="model", **switches)
    expected = alone(
        load_pipeline(Settings(model=str(tmp_path), quantization=INT8), CPU, torch.float32)[0], FLUX
    )
    pipeline, _ = load_pipeline(settings, CPU, torch.float32)
    apply_optimizations(pipeline, settings, torch.device("cpu", 0))
    assert len(pipeline._all_hooks) == 4
    assert_company_agrees(pipeline, FLUX, expected)


# Through the server


def test_the_server_says_why_a_switch_is_refused(in_process: Callable[..., InProcess]) -> None:
    app = in_process(ready=False, offload="model", device="cpu")
    app.server.start()
    app.server._loader.join(SECONDS)
    assert app.server.status.stage == "failed"
    answer = app.client.get("/readyz")
    assert answer.status_code == 503
    assert "STEPWEAVE_OFFLOAD='model' moves weights to a GPU" in answer.text


def test_the_server_refuses_a_switch_that_its_model_does_not_have() -> None:
    server = Server(Settings(attention_backend="native", warmup=False, device="cpu"))
    server.start()
    server._loader.join(SECONDS)
    assert server.status.stage == "failed"
    with pytest.raises(
        UnavailableError, match=r"SD3Transformer2DModel does not go through diffusers' dispatcher"
    ):
        server.ready()
    server.close()


@pytest.mark.full
def test_a_server_with_switches_draws_what_a_plain_call_without_does(tmp_path: Path) -> None:
    model = tmp_path / "flux"
    FLUX.build().save_pretrained(model)
    (model / "stepweave.json").write_text(json.dumps({"id": "tiny", "width": 16, "height": 16}))
    settings = Settings(model=str(model))
    plain = ServedModel(*load_pipeline(settings, CPU, torch.float32), settings)
    switches = {
        "STEPWEAVE_ATTENTION_BACKEND": "_native_math",
        "STEPWEAVE_VAE_SLICING": "true",
        "STEPWEAVE_CHANNELS_LAST": "true",
    }
    with serve(
        tmp_path / "log.txt", **switches, STEPWEAVE_MODEL=str(model), STEPWEAVE_MAX_ROWS="4"
    ) as server:
        server.wait_until_ready()
        shown = httpx.get(f"{server.url}/v1/models", timeout=SECONDS).json()["data"][0][
            "stepweave"
        ]["switches"]
        on = {"attention_backend": "_native_math", "vae_slicing": True, "channels_last": True}
        assert shown == Settings().optimizations() | on
        for seed, prompt in enumerate(PROMPTS):
            body = {"prompt": prompt, "seed": seed, "num_inference_steps": 4}
            answer = httpx.post(f"{server.url}/generate", json=body, timeout=SECONDS)
            assert answer.status_code == 200, answer.text
            image = np.asarray(Image.open(io.BytesIO(answer.content)), dtype=np.float32)
            expected = plain.pipeline(**plain.call(resolve(plain, **body))).images[0]
            assert image.std() > 1
            assert np.abs(image - np.asarray(expected, dtype=np.float32)).max() <= 1
        assert server.stop() == 0
