"""Jobs of different LoRAs beside what else jobs may differ in: a pipeline's own adapters, attention
of their own, ControlNets, other networks with the same layers, quantised weights, proofs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from stepweave import Loras, StepEngine
from stepweave.adapters.control_pipelines import control_pipeline
from stepweave.adapters.ip_adapters import adapted
from tests.pipelines.adapters_pag import stable_diffusion_pag_text
from tests.pipelines.parts import HINTS, diffusion, trained
from tests.pipelines.registry import ENTRIES, example_image
from tests.pipelines.transformers_qwen import z_image
from tests.support.loras import plain, save_lora
from tests.support.tiny import FAMILIES
from tests.support.together import SECONDS, TOLERANCE, difference, numbers, submit_together

pytestmark = [
    pytest.mark.full,
    pytest.mark.usefixtures("one_torch_thread", "every_row_pays"),
]

SD, SD3 = FAMILIES["stable_diffusion"], FAMILIES["stable_diffusion_3"]
EFFECT = 0.01
Call = tuple[dict[str, Any], Sequence[tuple[str, float]]]


def saved(folder: Path, build: Callable[[], Any], component: str) -> dict[str, Path]:
    """Two adapters for a denoiser."""
    return {
        "rings": save_lora(folder / "rings.safetensors", build, {component: ("to_q", "to_v")}),
        "chalk": save_lora(
            folder / "chalk.safetensors", build, {component: ("to_k", "to_out.0")}, rank=2, seed=1
        ),
    }


def run(
    engine: StepEngine, make: Callable[[int], Call], count: int, **options: Any
) -> list[torch.Tensor]:
    """The results of jobs that start together, in the second of two rounds."""

    def one(seed: int) -> Callable[[], dict[str, Any]]:
        def arguments() -> dict[str, Any]:
            given, lora = make(seed)
            return {**given, "lora": lora}

        return arguments

    for _ in range(2):
        jobs = submit_together(engine, [one(seed) for seed in range(count)], **options)
        results = [numbers(job.result(SECONDS)) for job in jobs]
    return results


def check(results: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    found = [difference(*pair) for pair in zip(results, expected, strict=True)]
    assert max(found) <= TOLERANCE, found


@pytest.mark.parametrize("encoder", [False, True], ids=["denoiser", "and encoder"])
def test_the_pipelines_own_adapters_count_for_all_jobs(encoder: bool, tmp_path: Path) -> None:
    """Those of a job are added to them."""
    texts = {"text_encoder": ("q_proj", "out_proj")} if encoder else {}
    own = save_lora(
        tmp_path / "own" / "own.safetensors",
        SD3.build,
        {"transformer": ("to_q", "to_k"), **texts},
        seed=2,
    )
    files = saved(tmp_path / "named", SD3.build, "transformer")
    files["words"] = save_lora(
        tmp_path / "named" / "words.safetensors", SD3.build,
        {"text_encoder": ("q_proj", "out_proj")}, seed=3, size=4,
    )  # fmt: skip
    named = [[("rings", 0.8)], [], [("chalk", -1.0), ("rings", 0.5)], [("words", 1.0)]]
    using = plain(SD3.build(), {"own": own, **files})
    expected = [
        numbers(using([("own", 0.6), *lora])(**SD3.arguments("a red circle", seed=seed)))
        for seed, lora in enumerate(named)
    ]
    pipeline = plain(SD3.build(), {"own": own})([("own", 0.6)])
    with StepEngine(pipeline, loras=Loras(pipeline, tmp_path / "named")) as engine:
        make = lambda seed: (SD3.arguments("a red circle", seed=seed), named[seed])  # noqa: E731
        check(run(engine, make, 4), expected)
        if not encoder:  # whose calls would change the encoder
            assert engine.stats().forwards["transformer"].merged_share > 0.5
        for result, wanted in zip(run(engine, make, 4, reproducible=True), expected, strict=True):
            assert torch.equal(result, wanted)
    assert torch.equal(numbers(pipeline(**SD3.arguments("a red circle", seed=1))), expected[1])


@pytest.mark.parametrize("own", [False, True], ids=["", "with the pipeline's own"])
def test_scales_among_the_arguments_for_attention_are_each_jobs_own(
    own: bool, tmp_path: Path
) -> None:
    files = saved(tmp_path / "named", SD3.build, "transformer")
    first = {}
    if own:
        first["own"] = save_lora(
            tmp_path / "own.safetensors", SD3.build, {"transformer": ("to_q", "to_k")}, seed=2
        )
    scales = [0.5, None, 2.0, 0.5, 0.0]
    named = [[("rings", 0.8)], [("rings", 0.8)], [("chalk", 0.4)], [], [("rings", 1.0)]]

    def call(seed: int) -> dict[str, Any]:
        scale = scales[seed]
        given = {} if scale is None else {"joint_attention_kwargs": {"scale": scale}}
        return SD3.arguments("a red circle", seed=seed, **given)

    always = [(name, 1.0) for name in first]
    using = plain(SD3.build(), {**first, **files})
    expected = [numbers(using([*always, *lora])(**call(seed))) for seed, lora in enumerate(named)]
    pipeline = plain(SD3.build(), first)(always) if own else SD3.build()
    with StepEngine(pipeline, loras=Loras(pipeline, tmp_path / "named")) as engine:
        check(run(engine, lambda seed: (call(seed), named[seed]), 5), expected)


def test_perturbed_attention_is_right_or_runs_alone(tmp_path: Path) -> None:
    """Its processors cut the batch in parts, whose rows an adapter cannot tell."""
    files = saved(tmp_path, stable_diffusion_pag_text, "unet")
    entry = ENTRIES["stable_diffusion_pag_text"]
    named = [[("rings", 0.8)], [], [("chalk", -1.0), ("rings", 0.5)], [("chalk", 1.0)]]
    using = plain(stable_diffusion_pag_text(), files)
    expected = [numbers(using(lora)(**entry.arguments(i))) for i, lora in enumerate(named)]
    pipeline = stable_diffusion_pag_text()
    with StepEngine(pipeline, loras=Loras(pipeline, tmp_path)) as engine:
        check(run(engine, lambda seed: (entry.arguments(seed), named[seed]), 4), expected)
        stats = engine.stats()
    assert stats.errors == 0
    if stats.forwards["unet"].merged_share == 0:
        assert any("adapters cannot be told by rows" in item["detail"] for item in stats.unshared)


def test_layers_that_get_rows_of_several_sizes_in_one_line_are_right(tmp_path: Path) -> None:
    """Z-Image embeds all captions in one tensor. Calls of the same adapter are proven with captions
    of two sizes, then those of two adapters with captions of one size; and neither tells what is
    right for two of each."""
    files = {
        name: save_lora(
            tmp_path / f"{name}.safetensors", z_image, {"transformer": ("cap_embedder.1",)},
            seed=seed,
        )
        for seed, name in enumerate(("rings", "chalk"))
    }  # fmt: skip
    short, long = "x", "a large green square and a blue ring below it, and two stars"
    rounds = [
        *[((short, "rings"), (long, "rings"))] * 3,
        *[((short, "rings"), (short, "chalk")), ((long, "rings"), (long, "chalk"))] * 3,
        *[((short, "rings"), (long, "chalk"))] * 3,
    ]

    def call(seed: int, prompt: str) -> dict[str, Any]:
        return {
            "prompt": prompt, "generator": torch.Generator().manual_seed(seed), "height": 16,
            "width": 16, "output_type": "np", "max_sequence_length": 64,
            "num_inference_steps": 3, "guidance_scale": 0.0,
        }  # fmt: skip

    using = plain(z_image(), files)
    expected = {
        (seed, prompt, name): numbers(using([(name, 1.0)])(**call(seed, prompt)))
        for seed in range(2)
        for prompt in (short, long)
        for name in files
    }
    pipeline = z_image()
    with StepEngine(pipeline, loras=Loras(pipeline, tmp_path)) as engine:
        for pair in rounds:
            found = [
                job.result(SECONDS)
                for job in submit_together(
                    engine,
                    [
                        lambda seed=seed, prompt=prompt, name=name: {  # type: ignore[misc]
                            **call(seed, prompt),
                            "lora": [(name, 1.0)],
                        }
                        for seed, (prompt, name) in enumerate(pair)
                    ],
                )
            ]
            check(
                [numbers(result) for result in found],
                [expected[seed, prompt, name] for seed, (prompt, name) in enumerate(pair)],
            )
        stats = engine.stats()
    assert stats.forwards["transformer"].merged_share > 0.3  # until then
    assert "a layer gets 96 entries, its call has 2 rows" in str(stats.unshared)


def base() -> Any:
    torch.manual_seed(0)
    pipeline = diffusers.StableDiffusionPipeline(**diffusion())
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipeline


def guided(seed: int, **others: Any) -> dict[str, Any]:
    return {
        "prompt": f"{seed} rings",
        "generator": torch.Generator().manual_seed(seed),
        "num_inference_steps": 3 + seed % 2,
        "guidance_scale": 5.0,
        "height": 16,
        "width": 16,
        "output_type": "np",
        **others,
    }


def test_pipelines_with_a_controlnet_have_the_adapters_too(tmp_path: Path) -> None:
    files = saved(tmp_path, base, "unet")
    named = [[("rings", 0.8)], [("chalk", 1.0)], [], [("rings", -0.5)]]

    def parts() -> tuple[Any, Any]:
        pipeline = base()
        torch.manual_seed(1)
        net = trained(diffusers.ControlNetModel.from_unet(pipeline.unet, **HINTS))
        return pipeline, net.eval().requires_grad_(False)

    def call(seed: int) -> dict[str, Any]:
        return guided(seed, **({"image": example_image(seed)} if seed < 3 else {}))

    pipeline, net = parts()
    using = plain(pipeline, files)
    controlled = control_pipeline(pipeline, [net])
    expected = []
    for seed, lora in enumerate(named):
        using(lora)
        expected.append(numbers((controlled if seed < 3 else pipeline)(**call(seed))))
    pipeline, net = parts()
    controlled = control_pipeline(pipeline, [net])
    loras = Loras(pipeline, tmp_path)
    with StepEngine(pipeline, loras=loras, beside={"controlnet.one": net}) as engine:

        def make(seed: int) -> Call:
            return {**call(seed), **({"pipeline": controlled} if seed < 3 else {})}, named[seed]

        check(run(engine, make, 4), expected)
        forwards = engine.stats().forwards
        assert forwards["unet"].merged_share > 0.4
        assert forwards["controlnet.one"].merged_share > 0.4


def test_a_twin_of_the_unet_has_the_adapters_too(tmp_path: Path) -> None:
    """One with an IP-Adapter shares the weights, but has other layers."""
    files = saved(tmp_path, base, "unet")
    named = [[("rings", 0.8)], [("chalk", 1.0)], [], [("rings", -0.5)]]
    seeing = [True, False, True, True]
    embeds = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(3))

    def weights(unet: Any) -> dict[str, dict[str, torch.Tensor]]:
        width = unet.config.cross_attention_dim
        torch.manual_seed(2)
        found = {
            "image_proj": {
                "proj.weight": torch.randn(4 * width, 8), "proj.bias": torch.randn(4 * width),
                "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width),
            },
            "ip_adapter": {},
        }  # fmt: skip
        layers = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
        for i, name in enumerate(layers):
            size = unet.get_submodule(name.removesuffix(".processor")).inner_dim
            for key in ("to_k_ip", "to_v_ip"):
                found["ip_adapter"][f"{2 * i + 1}.{key}.weight"] = torch.randn(size, width)
        return found

    def call(seed: int, here: bool) -> dict[str, Any]:
        given = {"ip_adapter_image_embeds": [embeds.clone()]} if seeing[seed] and here else {}
        return guided(seed, **given)

    def pipelines() -> tuple[Any, Any]:
        pipeline = base()
        twin = diffusers.StableDiffusionPipeline(
            **{**pipeline.components, "unet": adapted(pipeline.unet, weights(pipeline.unet))},
            requires_safety_checker=False,
        )
        twin.set_progress_bar_config(disable=True)
        return pipeline, twin

    pipeline, twin = pipelines()
    using, seen = plain(pipeline, files), plain(twin, files)
    expected = [
        numbers((seen if seeing[seed] else using)(lora)(**call(seed, True)))
        for seed, lora in enumerate(named)
    ]
    pipeline, twin = pipelines()
    loras = Loras(pipeline, tmp_path, twins={"unet": [twin.unet]})
    with StepEngine(pipeline, loras=loras, beside={"unet.ip": twin.unet}) as engine:

        def make(seed: int) -> Call:
            pipe = {"pipeline": twin} if seeing[seed] else {}
            return {**call(seed, True), **pipe}, named[seed]

        check(run(engine, make, 4), expected)
        assert engine.stats().forwards["unet.ip"].merged_share > 0.3


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_model_takes_adapters(tmp_path: Path) -> None:
    """diffusers cannot load any into such a model of this size here, so the same is compared with
    jobs that run alone, and with the model's image without."""
    quantization = pytest.importorskip("torchao.quantization")
    saved(tmp_path, SD3.build, "transformer")
    pipeline = SD3.build()
    quantization.quantize_(pipeline.transformer, quantization.Int8WeightOnlyConfig())
    named = [[("rings", 0.8)], [], [("chalk", -1.0), ("rings", 0.5)], [("chalk", 1.0)]]
    bare = [numbers(pipeline(**SD3.arguments("a ring", seed=seed))) for seed in range(4)]
    with StepEngine(pipeline, loras=Loras(pipeline, tmp_path)) as engine:
        make = lambda seed: (SD3.arguments("a ring", seed=seed), named[seed])  # noqa: E731
        alone = run(engine, make, 4, reproducible=True)
        check(run(engine, make, 4), alone)
        assert engine.stats().errors == 0
    for lora, result, without in zip(named, alone, bare, strict=True):
        assert (difference(result, without) > EFFECT) == bool(lora)


def test_audits_of_every_forward_find_nothing_wrong(tmp_path: Path) -> None:
    files = saved(tmp_path, SD3.build, "transformer")
    named = [[("rings", 0.8)], [], [("chalk", -1.0), ("rings", 0.5)], [("rings", 0.8)]]
    using = plain(SD3.build(), files)
    calls = [SD3.arguments("a ring", seed=seed) for seed in range(4)]
    expected = [numbers(using(lora)(**call)) for lora, call in zip(named, calls, strict=True)]
    pipeline = SD3.build()
    with StepEngine(pipeline, loras=Loras(pipeline, tmp_path), audit_every=1) as engine:
        make = lambda seed: (SD3.arguments("a ring", seed=seed), named[seed])  # noqa: E731
        check(run(engine, make, 4), expected)
        stats = engine.stats()
    assert {item["state"] for item in stats.certificates} == {"certified"}, stats.certificates
    assert stats.unshared == []
    assert stats.errors == 0
