"""The files of LoRAs: every format that diffusers reads gives what diffusers gives, and what is no
adapter of the model is refused by name."""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepweave import Loras, StepEngine
from stepweave.errors import LoadError, LoraError, LoraNotFoundError
from tests.pipelines.transformers_qwen import z_image
from tests.support.loras import plain, save_lora
from tests.support.tiny import FAMILIES
from tests.support.together import SECONDS, TOLERANCE, difference, numbers, submit_together

pytestmark = pytest.mark.usefixtures("one_torch_thread", "every_row_pays")

Tensors = dict[str, Tensor]
SD, XL, SD3, FLUX = (
    FAMILIES[name]
    for name in ("stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux")
)
EFFECT = 0.003  # of an adapter, on a pixel; rounding's is 1e-6
Z = {"height": 16, "width": 16, "output_type": "np", "max_sequence_length": 48}
CALLS: dict[Callable[[], Any], Mapping[str, Any]] = {
    **{family.build: family.call for family in (SD, XL, SD3, FLUX)},
    z_image: Z,
}


def request(build: Callable[[], Any], seed: int) -> dict[str, Any]:
    return {
        **CALLS[build],
        "prompt": ["a red circle", "a blue star"][seed % 2],
        "generator": torch.Generator().manual_seed(seed),
        "num_inference_steps": 3,
    }


# Formats


def pairs(module: nn.Module, ends: tuple[str, ...], rank: int = 4) -> dict[str, tuple[Tensor, ...]]:
    """Random factors, down and up, for the layers whose names end so."""
    torch.manual_seed(0)
    return {
        name: (torch.randn(rank, part.in_features) / 4, torch.randn(part.out_features, rank) / 4)
        for name, part in module.named_modules()
        if name.endswith(ends) and isinstance(part, nn.Linear)
    }


def kohya(pipeline: Any, prefixes: Mapping[str, str], alpha: float) -> Tensors:
    """As kohya's scripts save one: names with underscores, and an alpha for each layer."""
    tensors = {}
    for component, prefix in prefixes.items():
        ends = ("to_q", "to_k", "to_out.0", "q_proj", "out_proj", "ff.net.0.proj")
        for name, (down, up) in pairs(getattr(pipeline, component), ends).items():
            within = (
                name if component in ("unet",) or "text_model" in name else f"text_model.{name}"
            )
            key = f"{prefix}_{within.replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"] = down
            tensors[f"{key}.lora_up.weight"] = up
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


def xlabs(pipeline: Any) -> Tensors:
    width = pipeline.transformer.inner_dim
    torch.manual_seed(0)
    tensors = {}
    for layer, out in (("qkv_lora1", 3 * width), ("proj_lora1", width), ("qkv_lora2", 3 * width)):
        key = f"double_blocks.0.processor.{layer}"
        tensors[f"{key}.down.weight"] = torch.randn(4, width) / 4
        tensors[f"{key}.up.weight"] = torch.randn(out, 4) / 4
    return tensors


def bfl(pipeline: Any) -> Tensors:
    """As kohya's scripts save one for Flux: with the names of its authors."""
    width = pipeline.transformer.inner_dim
    torch.manual_seed(0)
    tensors = {}
    for layer, out in (
        ("img_attn_qkv", 3 * width),
        ("txt_attn_proj", width),
        ("img_mod_lin", 6 * width),
    ):
        key = f"lora_unet_double_blocks_0_{layer}"
        tensors[f"{key}.lora_down.weight"] = torch.randn(4, width) / 4
        tensors[f"{key}.lora_up.weight"] = torch.randn(out, 4) / 4
        tensors[f"{key}.alpha"] = torch.tensor(2.0)
    return tensors


def lokr(pipeline: Any) -> Tensors:
    """Of the largest factors, without metadata."""
    torch.manual_seed(0)
    config = peft.LoKrConfig(
        r=64, alpha=64, target_modules=["to_q", "to_v", "w1"], init_weights=False
    )
    peft.inject_adapter_in_model(config, pipeline.transformer, "made")
    found = peft.get_peft_model_state_dict(pipeline.transformer, adapter_name="made")
    return {f"transformer.{name}": value.contiguous() / 8 for name, value in found.items()}


def of(build: Callable[[], Any], make: Callable[[Any], Tensors]) -> Callable[[Path], Any]:
    def write(file: Path) -> Any:
        save_file(make(build()), file)
        return build

    return write


def saved(family: Any, *, cast: torch.dtype | None = None, **options: Any) -> Callable[[Path], Any]:
    targets = options.pop("targets", {"transformer": ("to_q", "to_v", "ff.net.0.proj")})

    def write(file: Path) -> Any:
        save_lora(file, family.build, targets, **options)
        if cast is not None:
            save_file({key: value.to(cast) for key, value in load_file(file).items()}, file)
        return family.build

    return write


UNET = {"unet": ("to_q", "to_v", "conv1")}
QUICK = ("kohya", "dora")
FORMATS: dict[str, Callable[[Path], Any]] = {
    "kohya": of(
        SD.build, lambda it: kohya(it, {"unet": "lora_unet", "text_encoder": "lora_te"}, 2)
    ),
    "kohya_xl": of(
        XL.build,
        lambda it: kohya(
            it,
            {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
            3,
        ),
    ),  # fmt: skip
    "xlabs": of(FLUX.build, xlabs),
    "bfl": of(FLUX.build, bfl),
    "dora": saved(SD3, use_dora=True, told=True),
    "dora_untold": saved(SD3, use_dora=True),
    "dora_convolution": saved(SD, targets=UNET, use_dora=True, told=True),
    "lokr": of(z_image, lokr),
    "rslora": saved(SD3, use_rslora=True, told=True, size=0.3),
    "patterns": saved(SD3, told=True, rank_pattern={"to_v": 2}, alpha_pattern={"to_q": 12}),
    "float16": saved(SD3, cast=torch.float16),
    "bfloat16": saved(SD3, cast=torch.bfloat16),
    "text_encoder": saved(XL, targets={"text_encoder_2": ("q_proj", "v_proj", "out_proj")}, size=4),
}


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in FORMATS],
)
def test_a_file_gives_what_diffusers_makes_of_it(name: str, tmp_path: Path) -> None:
    """Two scales at once, since some kinds of adapters are not proportional to theirs."""
    file = tmp_path / "made.safetensors"
    build = FORMATS[name](file)
    using, named = plain(build(), {"made": file}), [[("made", 0.7)], [("made", -0.4)], []]
    expected = [numbers(using(lora)(**request(build, seed))) for seed, lora in enumerate(named)]
    effect = difference(numbers(using([])(**request(build, 0))), expected[0])
    assert effect > EFFECT, f"it changes pixels by {effect:.2g}"
    pipeline = build()
    with StepEngine(pipeline, loras=Loras(pipeline, tmp_path)) as engine:
        for reproducible in (False, True):
            requests = [
                lambda seed=seed, lora=lora: {**request(build, seed), "lora": lora}  # type: ignore[misc]
                for seed, lora in enumerate(named)
            ]
            jobs = submit_together(engine, requests, reproducible=reproducible)
            for job, wanted in zip(jobs, expected, strict=True):
                result = numbers(job.result(SECONDS))
                if reproducible:
                    assert torch.equal(result, wanted)
                else:
                    assert difference(result, wanted) <= TOLERANCE
        assert engine.stats().errors == 0


# Refused


@dataclass
class Good:
    """A pipeline with a directory of adapters, of which one, `good`, can be used."""

    folder: Path
    loras: Loras
    engine: StepEngine
    expected: Tensor

    def run(self, name: str) -> Tensor:
        job = self.engine.submit(**request(SD3.build, 1), lora=[(name, 1.0)])
        return numbers(job.result(SECONDS))

    def refuses(self, name: str, reason: str) -> None:
        """Assert that an adapter is refused, twice, and that `good` is right all the same."""
        for _ in range(2):
            with pytest.raises(LoraError, match=f"'{name}' cannot be used: .*{reason}") as error:
                self.run(name)
            message = str(error.value)
            assert "\n" not in message
            assert str(self.folder.parent) not in message
            assert "/tmp" not in message
        assert difference(self.run("good"), self.expected) <= TOLERANCE


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Good]:
    folder = tmp_path_factory.mktemp("loras")
    file = save_lora(folder / "good.safetensors", SD3.build, {"transformer": ("to_q", "to_v")})
    expected = numbers(plain(SD3.build(), {"good": file})([("good", 1.0)])(**request(SD3.build, 1)))
    pipeline = SD3.build()
    loras = Loras(pipeline, folder)
    with StepEngine(pipeline, loras=loras) as engine:
        yield Good(folder, loras, engine, expected)


def changed(tensors: Tensors, change: Callable[[str, Tensor], Tensor]) -> Tensors:
    return {key: change(key, value).contiguous() for key, value in tensors.items()}


def with_first(tensors: Tensors, number: float) -> Tensors:
    key = sorted(tensors)[0]
    return {**tensors, key: torch.full_like(tensors[key], number)}


def with_layer(tensors: Tensors, path: str) -> Tensors:
    """A file that also adapts a layer."""
    return {
        **tensors,
        f"{path}.lora_A.weight": torch.ones(4, 32),
        f"{path}.lora_B.weight": torch.ones(32, 4),
    }


REFUSED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "nan": (lambda it: with_first(it, float("nan")), "has numbers that are not finite"),
    "infinite": (lambda it: with_first(it, float("inf")), "has numbers that are not finite"),
    "shapes": (
        lambda it: changed(it, lambda key, value: value[:, :-1] if "lora_A" in key else value),
        "size mismatch|in_features|shape",
    ),
    "half": (lambda it: {key: it[key] for key in it if "lora_A" in key}, "lora_A, but no lora_B"),
    "other_half": (
        lambda it: {key: it[key] for key in sorted(it)[:-1]},
        "lora_A, but no lora_B",
    ),
    "unknown": (
        lambda it: {key.replace("transformer_blocks.0", "blocks.7"): it[key] for key in it},
        "transformer has no layer 'blocks.7",
    ),
    "deeper": (
        lambda it: with_layer(it, "transformer.transformer_blocks.99.attn.to_q"),
        "no layer",
    ),
    "deeper_half": (
        lambda it: {
            **it,
            "transformer.transformer_blocks.9.attn.to_q.lora_A.weight": torch.ones(4, 32),
        },
        "no layer",
    ),
    "stray": (lambda it: with_layer(it, "foo"), "the model has no layer 'foo"),
    "stray_part": (lambda it: with_layer(it, "decoder.blocks.0.to_q"), "the model has no layer"),
    "numbers": (
        lambda it: {key: value.double() * 1e300 for key, value in it.items()},
        "has numbers beyond torch.float32",
    ),
    "whole_numbers": (
        lambda it: {key: value.to(torch.int8) for key, value in it.items()},
        "is of torch.int8",
    ),
    "one_unknown": (
        lambda it: {
            **it,
            "transformer.blocks.7.to_q.lora_A.weight": torch.ones(4, 32),
            "transformer.blocks.7.to_q.lora_B.weight": torch.ones(32, 4),
        },
        "transformer has no layer 'blocks.7.to_q'",
    ),
    "rank": (
        lambda it: changed(
            it,
            lambda key, value: (
                torch.ones(1025, value.shape[1])
                if "lora_A" in key
                else torch.ones(value.shape[0], 1025)
            ),
        ),
        "its rank is 1025; the limit is 1024",
    ),
    "no_lora": (lambda it: {"transformer.pos_embed.proj.weight": torch.ones(2, 2)}, "."),
    "embedding": (
        lambda it: {
            **it,
            "text_encoder.text_model.embeddings.token_embedding.lora_embedding_A": torch.ones(
                2, 99
            ),
            "text_encoder.text_model.embeddings.token_embedding.lora_embedding_B": torch.ones(
                16, 2
            ),
        },
        ".",
    ),
    "magnitudes": (  # of kohya's DoRA, which diffusers leaves out
        lambda it: {**it, "transformer.transformer_blocks.0.attn.to_q.dora_scale": torch.ones(1)},
        "not compatible|does not fit",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_adapter_of_the_model_is_refused_by_name(name: str, good: Good) -> None:
    change, reason = REFUSED[name]
    tensors = load_file(good.folder / "good.safetensors")
    save_file(change(tensors), good.folder / f"{name}.safetensors")
    good.refuses(name, reason)


def test_files_of_other_models_are_refused(good: Good, tmp_path: Path) -> None:
    save_file(
        kohya(SD.build(), {"unet": "lora_unet", "text_encoder": "lora_te"}, 2),
        good.folder / "sd.safetensors",
    )
    save_lora(
        good.folder / "xl.safetensors", XL.build, {"unet": ("to_q",), "text_encoder_2": ("q_proj",)}
    )
    save_lora(good.folder / "flux.safetensors", FLUX.build, {"transformer": ("to_q", "proj_mlp")})
    for name in ("sd", "xl", "flux"):
        good.refuses(name, ".")
    save_lora(tmp_path / "xl.safetensors", XL.build, {"unet": ("to_q", "to_k")})
    with pytest.raises(LoraError, match="'xl' cannot be used: xl.safetensors"):
        Loras(SD.build(), tmp_path).load("xl")


def test_damaged_files_are_refused(good: Good) -> None:
    whole = (good.folder / "good.safetensors").read_bytes()
    for name, content, reason in (
        ("cut", whole[:-10], "damaged or cut off"),
        ("header", whole[:100], "damaged or cut off"),
        ("empty", b"", "the file is empty"),
        ("pickled", pickle.dumps({"weight": [1.0]}), "damaged or cut off"),
    ):
        (good.folder / f"{name}.safetensors").write_bytes(content)
        good.refuses(name, reason)


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"modules_to_save": ["proj_out"]}, "proj_out|replaces weights of transformer itself"),
        ({"bias": "all"}, "replaces weights of transformer itself"),
        ({"init_lora_weights": "pissa_niter_4"}, "for weights that 'pissa_niter_4' has changed"),
        ({"init_lora_weights": "olora"}, "for weights that 'olora' has changed"),
        ({"no_such_setting": 1}, "could not be instantiated"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_adapters_that_change_the_models_weights_are_refused(
    told: dict[str, Any], reason: str, good: Good
) -> None:
    tensors = load_file(good.folder / "good.safetensors")
    config = {"r": 4, "lora_alpha": 6.0, "target_modules": ["to_q", "to_v"], **told}
    told = {f"transformer.{key}": value for key, value in config.items()}
    name = "told-" + next(iter(reversed(config)))
    save_file(
        tensors, good.folder / f"{name}.safetensors",
        metadata={LORA_ADAPTER_METADATA_KEY: json.dumps(told)},
    )  # fmt: skip
    good.refuses(name, reason)


def test_a_control_lora_is_refused(tmp_path: Path) -> None:
    """It makes the first layer wider, for the image that it is told."""
    pipeline = FLUX.build()
    width, channels = pipeline.transformer.inner_dim, pipeline.transformer.config.in_channels
    save_file(
        {
            "transformer.x_embedder.lora_A.weight": torch.ones(4, 2 * channels),
            "transformer.x_embedder.lora_B.weight": torch.ones(width, 4),
            "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, width),
            "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(width, 4),
        },
        tmp_path / "control.safetensors",
    )
    before = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    with pytest.raises(LoraError, match="'control' cannot be used: .*x_embedder"):
        Loras(pipeline, tmp_path).load("control")
    after = pipeline.transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert pipeline.transformer.config.in_channels == channels


def test_entries_that_are_no_adapters_have_no_names(
    good: Good, caplog: pytest.LogCaptureFixture
) -> None:
    whole = (good.folder / "good.safetensors").read_bytes()
    (good.folder / "nothing").mkdir()
    two = good.folder / "two"
    two.mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        (two / name).write_bytes(whole)
    one = good.folder / "one"
    one.mkdir()
    (one / "whatever.safetensors").write_bytes(whole)
    for name in ("späße.safetensors", "a b.safetensors", ".hidden.safetensors", "notes.txt"):
        (good.folder / name).write_bytes(whole)
    names = good.loras.names()
    assert {"good", "one"} <= set(names)
    assert not {"nothing", "two", "späße", "a b", ".hidden", "notes"} & set(names)
    assert sum("is ignored" in record.getMessage() for record in caplog.records) == 4
    for name in ("nothing", "two", "a b", "../good", "good.safetensors", "", "notes"):
        with pytest.raises(LoraNotFoundError, match="There is no LoRA"):
            good.engine.submit(**request(SD3.build, 1), lora=[(name, 1.0)])
    assert difference(good.run("one"), good.expected) <= TOLERANCE


# Pipelines


def test_a_pipeline_without_loras_is_refused() -> None:
    with pytest.raises(LoadError, match="HunyuanImagePipeline takes no LoRAs"):
        Loras(FAMILIES["hunyuan_image"].build())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_modules_are_refused(tmp_path: Path) -> None:
    """Their layers' hooks may not be called."""
    pipeline = FLUX.build()
    pipeline.transformer.compile_repeated_blocks()
    with pytest.raises(LoadError, match="transformer is compiled, so that it takes no LoRAs"):
        Loras(pipeline, tmp_path)
    pipeline = SD3.build()
    pipeline.transformer = torch.compile(pipeline.transformer)
    with pytest.raises(LoadError, match="transformer is compiled"):
        Loras(pipeline, tmp_path)


def test_fused_projections_are_refused(tmp_path: Path) -> None:
    """The layers that adapters are for are not called."""
    pipeline = SD3.build()
    pipeline.transformer.fuse_qkv_projections()
    with pytest.raises(LoadError, match="transformer has fused projections"):
        Loras(pipeline, tmp_path)


def test_dora_has_its_effect_at_a_scale_of_0_as_in_diffusers(tmp_path: Path) -> None:
    """Its magnitudes are applied whatever the scale."""
    file = save_lora(
        tmp_path / "dora.safetensors", SD3.build, {"transformer": ("to_q", "to_v")}, use_dora=True
    )
    using = plain(SD3.build(), {"dora": file})
    expected, none = (
        numbers(using(named)(**request(SD3.build, 1))) for named in ([("dora", 0.0)], [])
    )
    assert difference(expected, none) > 0.01
    for mode in ("step", "request"):
        pipeline = SD3.build()
        with StepEngine(pipeline, mode, loras=Loras(pipeline, tmp_path)) as engine:  # type: ignore[arg-type]
            reproducible = mode == "step"
            named = [
                lambda lora=lora, reproducible=reproducible: {
                    **request(SD3.build, 1), "lora": lora, "reproducible": reproducible
                }
                for lora in ([("dora", 0.0)], [], [])
            ]  # fmt: skip
            dora, *others = submit_together(engine, named)
            made = numbers(dora.result(SECONDS))
            assert difference(made, expected) <= (0 if reproducible else TOLERANCE)
            for job in others:
                assert difference(numbers(job.result(SECONDS)), none) <= TOLERANCE


def test_modules_that_other_threads_make_meanwhile_have_weights(tmp_path: Path) -> None:
    """PEFT's own way of making layers without weights is for all threads of the process."""
    save_lora(tmp_path / "one.safetensors", SD3.build, {"transformer": ("to_q", "to_v")})
    pipeline, made, done = SD3.build(), [], threading.Event()

    def make() -> None:
        while not done.is_set():
            made.append(torch.nn.Linear(2, 2).weight.device.type)

    with ThreadPoolExecutor(1) as threads:
        making = threads.submit(make)
        try:
            for _ in range(3):
                Loras(pipeline, tmp_path).load("one")
        finally:
            done.set()
        making.result()
    assert set(made) == {"cpu"}


def test_the_pipeline_stays_as_it_is(good: Good) -> None:
    """Also where adapters are refused."""
    transformer = good.engine.pipeline.transformer
    fresh = SD3.build().transformer
    assert [name for name, _ in transformer.named_modules()] == [
        name for name, _ in fresh.named_modules()
    ]
    state = fresh.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in transformer.state_dict().items())
    assert isinstance(transformer, diffusers.ModelMixin)
    assert not getattr(transformer, "peft_config", None)
