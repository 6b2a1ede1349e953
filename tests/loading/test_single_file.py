"""A model in a single file is the same as its directory; what is not a whole model is refused."""

from __future__ import annotations

import functools
import json
import logging
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import (
    DiffusionPipeline,
    FluxTransformer2DModel,
    ModelMixin,
    UNet2DConditionModel,
)
from diffusers.loaders import single_file_model, single_file_utils
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from stepweave.config import Settings
from stepweave.errors import ConfigError, LoadError
from stepweave.loading.checkpoint import Checkpoint
from stepweave.loading.clip_vocabulary import MERGES, clip_tokenizer, merges_of, vocabulary
from stepweave.loading.components import Component, components_of, read_index
from stepweave.loading.loader import load_pipeline
from stepweave.loading.single_file import CONFIGS, held_components, read_components
from tests.support.in_process import InProcess
from tests.support.original_layout import original, save_as_one_file
from tests.support.tiny import FAMILIES, WIDTH, enliven

CPU = torch.device("cpu")
SD, XL = "stable_diffusion", "stable_diffusion_xl"
Tensors = dict[str, torch.Tensor]


def build(family: str) -> Any:
    """A tiny pipeline; of XL, the second encoder is wider, by which diffusers knows it."""
    pipeline = FAMILIES[family].build()
    if family == XL:
        config = pipeline.text_encoder_2.config.to_dict() | {
            "hidden_size": 2 * WIDTH,
            "projection_dim": 2 * WIDTH,
        }
        sizes = {
            "cross_attention_dim": 3 * WIDTH,
            "projection_class_embeddings_input_dim": 6 * 8 + 2 * WIDTH,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipeline.text_encoder_2 = transformers.CLIPTextModelWithProjection(
                transformers.CLIPTextConfig(**config)
            ).eval()
            pipeline.unet = UNet2DConditionModel.from_config(
                {**pipeline.unet.config, **sizes}
            ).eval()
            enliven(pipeline.text_encoder_2)
            enliven(pipeline.unet)
    return pipeline


def load(file: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> DiffusionPipeline:
    return load_pipeline(Settings(model=str(file), **settings), CPU, dtype)[0]


def refused(file: Path, **settings: Any) -> str:
    with pytest.raises(LoadError) as caught:
        load(file, **settings)
    assert str(file.parent) not in caught.value.message
    return caught.value.message


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A directory with a pipeline in `model`, and the same in `one.safetensors`; not to be
    changed."""

    @functools.cache
    def save(family: str) -> Path:
        place = tmp_path_factory.mktemp(family)
        pipeline = build(family)
        pipeline.save_pretrained(place / "model")
        save_as_one_file(pipeline, place / "one.safetensors")
        return place

    return save


@pytest.fixture
def changed(saved: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """Writes the file of Stable Diffusion with changed tensors."""

    def write(change: Callable[[Tensors], Tensors]) -> Path:
        tensors = load_file(saved(SD) / "one.safetensors")
        save_file(change(tensors), tmp_path / "one.safetensors")
        return tmp_path / "one.safetensors"

    return write


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Nothing can be connected to; the list has what was tried."""
    asked: list[Any] = []

    def refuse(*arguments: Any, **options: Any) -> Any:
        asked.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return asked


def images(pipeline: Any, family: str = SD) -> Any:
    return pipeline(**FAMILIES[family].arguments("a red circle", seed=3)).images


@pytest.mark.parametrize("family", [SD, XL])
def test_a_file_is_the_same_as_its_directory_and_as_in_diffusers(
    saved: Callable[[str], Path], family: str, no_network: list[Any], caplog: Any
) -> None:
    place = saved(family)
    caplog.set_level(logging.INFO)
    pipeline = load(place / "one.safetensors", config_from=str(place / "model"))
    counts = sum(
        len(part.state_dict()) for part in pipeline.components.values() if hasattr(part, "to")
    )
    assert f"read all {counts} tensors of " in caplog.text
    directory = load(place / "model")
    for name, model in directory.components.items():
        if isinstance(model, torch.nn.Module):
            read = getattr(pipeline, name).state_dict()
            assert read.keys() == model.state_dict().keys()
            assert all(torch.equal(read[key], one) for key, one in model.state_dict().items())
    made = images(pipeline, family)
    # weights are where they are in the file, and their alignment changes the last bits of sums
    assert np.abs(made - images(directory, family)).max() < 1e-6
    plain = type(pipeline).from_single_file(
        str(place / "one.safetensors"), config=str(place / "model"), local_files_only=True
    )
    plain.set_progress_bar_config(disable=True)
    assert np.array_equal(made, images(plain, family))
    assert no_network == []


def test_a_file_in_half_precision_is_read_in_the_dtype_that_is_set(
    changed: Callable[..., Path], saved: Callable[[str], Path]
) -> None:
    file = changed(lambda tensors: {name: one.half() for name, one in tensors.items()})
    for dtype in (torch.float32, torch.bfloat16):
        pipeline: Any = load(file, dtype, config_from=str(saved(SD) / "model"))
        assert {
            pipeline.unet.dtype,
            pipeline.vae.dtype,
            pipeline.text_encoder.dtype,
        } == {dtype}


def test_what_the_file_lacks_is_read_from_the_directory(
    changed: Callable[..., Path], saved: Callable[[str], Path], tmp_path: Path
) -> None:
    whole = saved(SD) / "model"
    file = changed(
        lambda tensors: {
            name: one for name, one in tensors.items() if name.startswith("model.diffusion_model.")
        }
    )
    pipeline = load(file, config_from=str(whole))
    assert np.abs(images(pipeline) - images(load(whole))).max() < 1e-6
    configs = Path(shutil.copytree(whole, tmp_path / "configs"))
    for weights in configs.glob("*/*.safetensors"):
        weights.unlink()
    message = refused(file, config_from=str(configs))
    assert "text_encoder/ has no weights: no *.safetensors file is there" in message


def test_a_denoiser_by_diffusers_names_is_read_with_the_directory_of_its_pipeline(
    saved: Callable[[str], Path],
) -> None:
    """As published for families whose names are the same, such as Qwen-Image."""
    whole = saved(SD) / "model"
    file = whole / "unet" / "diffusion_pytorch_model.safetensors"
    pipeline = load(file, config_from=str(whole))
    assert np.abs(images(pipeline) - images(load(whole))).max() < 1e-6
    vae = whole / "vae" / "diffusion_pytorch_model.safetensors"
    assert "is a VAE" in refused(vae, config_from=str(whole))


def test_configurations_need_no_weights(saved: Callable[[str], Path], tmp_path: Path) -> None:
    place = saved(SD)
    configs = Path(shutil.copytree(place / "model", tmp_path / "configs"))
    for weights in configs.glob("*/*.safetensors"):
        weights.unlink()
    index = json.loads((configs / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (configs / "model_index.json").write_text(json.dumps(index))
    pipeline: Any = load(place / "one.safetensors", config_from=str(configs))
    assert pipeline.safety_checker is None  # single files hold none
    assert np.abs(images(pipeline) - images(load(place / "model"))).max() < 1e-6


@pytest.mark.full
def test_a_file_is_served_over_http_by_its_name(
    saved: Callable[[str], Path], in_process: Callable[..., InProcess]
) -> None:
    place = saved(SD)
    app = in_process(
        loads=True,
        model=str(place / "one.safetensors"),
        config_from=str(place / "model"),
        batching="step",
        preset='{"width": 16, "height": 16, "num_inference_steps": 3}',
    )
    (model,) = app.client.get("/v1/models").json()["data"]
    assert (model["id"], model["stepweave"]["pipeline"]) == ("one", "StableDiffusionPipeline")
    answer = app.post(seed=1, model="one")
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"][0]["b64_json"]


# Refusals


def test_a_damaged_or_missing_file_is_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
    content = (saved(SD) / "one.safetensors").read_bytes()
    file = tmp_path / "one.safetensors"
    for size, what in ((0, "the file is empty (0 bytes)"), (len(content) // 2, "damaged or cut")):
        file.write_bytes(content[:size])
        assert f"one.safetensors: {what}" in refused(file)
    save_file({}, file)
    assert "one.safetensors has no tensors" in refused(file)


@pytest.mark.parametrize(
    ("prefix", "name"),
    [
        ("model.diffusion_model.middle_block.0.in_layers.0.weight", "unet"),
        ("first_stage_model.decoder.conv_in.bias", "vae"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.weight", "text_encoder"),
    ],
)
def test_missing_tensors_and_other_shapes_are_refused(
    changed: Callable[..., Path], saved: Callable[[str], Path], prefix: str, name: str
) -> None:
    configs = str(saved(SD) / "model")
    file = changed(lambda tensors: {key: one for key, one in tensors.items() if key != prefix})
    message = refused(file, config_from=configs)
    assert f"{name} in one.safetensors: its weights lack 1 of the " in message
    file = changed(
        lambda tensors: {key: one[1:] if key == prefix else one for key, one in tensors.items()}
    )
    message = refused(file, config_from=configs)
    assert f"{name} in one.safetensors: its weights are not those of its config.json" in message


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        (["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight", "x.alpha"], "is a LoRA"),
        (["unet.mid_block.attentions.0.to_q.lora_A.weight", "b.lora_B.weight"], "is a LoRA"),
        (["lora_unet_down.hada_w1_a", "lora_unet_down.hada_w2_a"], "is a LoRA"),
        (["control_model.input_blocks.0.0.weight", "control_model.x"], "is a ControlNet"),
        (["control_all_x_embedder.2-1.weight", "control_layers.0.x"], "is a ControlNet"),
        (["controlnet_cond_embedding.conv_in.weight", "conv_in.bias"], "is a ControlNet"),
        (["emb_params"], "is a textual inversion"),
        (["clip_l", "clip_g"], "is a textual inversion"),
        (["<cat-toy>"], "is a textual inversion"),
        (["encoder.conv_in.weight", "decoder.mid.block_1.conv1.weight"], "is a VAE"),
        (
            ["down_blocks.0.resnets.0.conv1.weight", "conv_in.bias"],
            "has the weights of one component",
        ),
        (
            ["model.diffusion_model.x", "model.diffusion_model.scaled_fp8"],
            "has quantised weights",
        ),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_as_what_it_is(
    tmp_path: Path, tensors: list[str], what: str
) -> None:
    file = tmp_path / "other.safetensors"
    save_file({name: torch.zeros(2, 2) for name in tensors}, file)
    assert f"other.safetensors {what}" in refused(file)


def test_a_family_without_configurations_is_refused_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "f.safetensors"
    save_file(
        {
            "double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(2),
            "img_in.weight": torch.zeros(2, 64),
        },
        file,
    )
    message = refused(file)
    assert "f.safetensors is of family 'flux-schnell', and there are built-in" in message
    assert "set STEPWEAVE_CONFIG_FROM to the directory" in message
    assert "such as black-forest-labs/FLUX.1-schnell" in message
    save_file({"a.weight": torch.zeros(2), "b.weight": torch.zeros(2)}, file)
    assert "f.safetensors is of no family that diffusers knows" in refused(file)


def test_settings_that_do_not_fit_a_file_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def message(**settings: str) -> str:
        with monkeypatch.context() as context:
            for name, value in settings.items():
                context.setenv(f"STEPWEAVE_{name.upper()}", value)
            with pytest.raises(ConfigError) as caught:
                Settings.load()
        return caught.value.message

    for name in ("a.safetensors", "a.ckpt"):
        (tmp_path / name).write_bytes(b"x")
    file = str(tmp_path / "a.safetensors")
    assert "not a .safetensors file, the only kind that is read" in message(
        model=str(tmp_path / "a.ckpt")
    )
    assert "is not an existing file" in message(model="models/b.safetensors")
    assert "is a file; unset one of them" in message(model=file, revision="0" * 40)
    assert "STEPWEAVE_VARIANT is not for a model that is a file" in message(
        model=file, variant="fp16"
    )
    assert "STEPWEAVE_QUANTIZATION is not for a model that is a file" in message(
        model=file, quantization='{"quant_backend": "torchao"}'
    )
    assert "is not an existing directory" in message(model=file, config_from=file)
    assert "is for a model that is a .safetensors file" in message(config_from=str(tmp_path))


# What the server has for Stable Diffusion 1.5 and XL

PARAMETERS = {
    "v1": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "xl_base": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}


def empty_models(folder: Path) -> dict[str, Any]:
    """The models of a directory's configurations, without memory."""
    models = {}
    for component in components_of(read_index(folder)):
        if component.weights is not None:
            config = json.loads((folder / component.name / "config.json").read_text())
            with init_empty_weights():
                models[component.name] = (
                    component.kind.from_config(config)
                    if component.is_a(ModelMixin)
                    else component.kind(component.kind.config_class(**config))
                )
    return models


@pytest.mark.parametrize("family", PARAMETERS)
def test_built_in_configurations_are_those_of_the_published_models(family: str) -> None:
    models = empty_models(CONFIGS / family)
    counts = {
        name: sum(parameter.numel() for parameter in model.parameters())
        for name, model in models.items()
    }
    assert counts == PARAMETERS[family]


def test_the_vocabulary_is_clips(tmp_path: Path) -> None:
    merges = merges_of(MERGES.read_text(encoding="utf-8"))
    tokens = vocabulary(merges)
    assert (len(merges), len(tokens)) == (48_894, 49_408)
    assert (tokens["!"], tokens["<|startoftext|>"], tokens["<|endoftext|>"]) == (0, 49406, 49407)
    first = clip_tokenizer(CONFIGS / "v1" / "tokenizer")
    second = clip_tokenizer(CONFIGS / "xl_base" / "tokenizer_2")
    prompt = "a photo of an astronaut riding a horse on mars"
    numbers = [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496, 49407]
    assert first(prompt).input_ids == second(prompt).input_ids == numbers
    assert (first.pad_token_id, second.pad_token_id) == (49407, 0)
    # as transformers reads the files of the published models
    shutil.copy(MERGES, tmp_path / "merges.txt")
    shutil.copy(CONFIGS / "v1" / "tokenizer" / "tokenizer_config.json", tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps(tokens))
    read = CLIPTokenizer.from_pretrained(tmp_path)
    for text in (prompt, "Ünïcode — 日本語 🦄, it's 42!", "", "x " * 100):
        whole = {"padding": "max_length", "max_length": 77, "truncation": True}
        assert read(text, **whole).input_ids == first(text, **whole).input_ids


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """Makes the built-in configurations as small as a tiny pipeline's models, whose file is
    returned; the encoders have CLIP's whole vocabulary."""

    def make(family: str) -> Path:
        pipeline = build({"v1": SD, "xl_base": XL}[family])
        configs = Path(shutil.copytree(CONFIGS, tmp_path / "configs"))
        for name, config in (("unet", pipeline.unet.config), ("vae", pipeline.vae.config)):
            (configs / family / name / "config.json").write_text(json.dumps(dict(config)))
        for name in ("text_encoder", "text_encoder_2"):
            encoder = getattr(pipeline, name, None)
            if encoder is not None:
                encoder.resize_token_embeddings(49_408)
                encoder.config.max_position_embeddings = 77
                config = encoder.config.to_dict()
                made = type(encoder)(type(encoder.config).from_dict(config))
                setattr(pipeline, name, made.eval())
                (configs / family / name / "config.json").write_text(json.dumps(config))
        monkeypatch.setattr("stepweave.loading.single_file.CONFIGS", configs)
        monkeypatch.setattr(
            "stepweave.loading.checkpoint.Checkpoint.family", property(lambda _: family)
        )
        return save_as_one_file(pipeline, tmp_path / "small.safetensors")

    return make


@pytest.mark.parametrize("family", ["v1", "xl_base"])
def test_built_in_configurations_make_a_pipeline_without_the_hub(
    small: Callable[[str], Path], family: str, no_network: list[Any]
) -> None:
    pipeline: Any = load(small(family))
    assert images(pipeline, {"v1": SD, "xl_base": XL}[family]).shape == (1, 16, 16, 3)
    assert pipeline.tokenizer.model_max_length == 77
    assert getattr(pipeline, "safety_checker", None) is None
    assert no_network == []


class WholeError(Exception):
    """The tensors of a file were found to be all of a model, of the right shapes."""


@pytest.fixture
def only_checked(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensors], None]:
    """Has tensors instead of a file's, which are checked, and not read."""

    def whole(*_: Any, **__: Any) -> None:
        raise WholeError

    def give(tensors: Tensors) -> None:
        monkeypatch.setattr("stepweave.loading.single_file.load_file", lambda path: tensors)
        for module in (single_file_model, single_file_utils):
            # what is called once the tensors are found to be right
            monkeypatch.setattr(module, "load_model_dict_into_meta", whole)

    return give


@pytest.mark.parametrize("family", ["v1", "xl_base"])
def test_every_tensor_of_a_published_model_has_its_place(
    family: str, tmp_path: Path, only_checked: Callable[[Tensors], None]
) -> None:
    """All of its tensors by their original names, without memory."""
    folder = CONFIGS / family
    tensors = original(type("Pipeline", (), empty_models(folder)))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    checkpoint = Checkpoint(tmp_path / "a.safetensors", shapes, {})
    assert checkpoint.family == family
    assert checkpoint.numbers == sum(PARAMETERS[family].values())
    components = [part for part in components_of(read_index(folder)) if part.weights]
    assert held_components(checkpoint, components, folder) == components
    only_checked(tensors)
    for component in components:
        with pytest.raises(LoadError, match="WholeError"):
            read_components(checkpoint, [component], folder, torch.float16, lambda name: None)


def flux() -> Tensors:
    """The tensors of FLUX.1-dev's transformer by their original names, without memory."""
    wide, heads = 3072, 128
    linear = {
        "img_in": (wide, 64),
        "txt_in": (wide, 4096),
        "final_layer.linear": (64, wide),
        "final_layer.adaLN_modulation.1": (2 * wide, wide),
    }
    for name, width in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        linear |= {f"{name}.in_layer": (wide, width), f"{name}.out_layer": (wide, wide)}
    norms = []
    for block in (f"double_blocks.{number}" for number in range(19)):
        for kind in ("img", "txt"):
            linear |= {
                f"{block}.{kind}_mod.lin": (6 * wide, wide),
                f"{block}.{kind}_attn.qkv": (3 * wide, wide),
                f"{block}.{kind}_attn.proj": (wide, wide),
                f"{block}.{kind}_mlp.0": (4 * wide, wide),
                f"{block}.{kind}_mlp.2": (wide, 4 * wide),
            }
            norms.append(f"{block}.{kind}_attn.norm")
    for block in (f"single_blocks.{number}" for number in range(38)):
        linear |= {
            f"{block}.linear1": (7 * wide, wide),
            f"{block}.linear2": (wide, 5 * wide),
            f"{block}.modulation.lin": (3 * wide, wide),
        }
        norms.append(f"{block}.norm")
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": one for name, one in linear.items()}
    shapes |= {f"{name}.bias": one[:1] for name, one in linear.items()}
    shapes |= {f"{name}.{part}_norm.scale": (heads,) for name in norms for part in ("query", "key")}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def test_every_tensor_of_flux_has_its_place(
    tmp_path: Path, only_checked: Callable[[Tensors], None]
) -> None:
    tensors = flux()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    checkpoint = Checkpoint(tmp_path / "a.safetensors", shapes, {})
    assert (checkpoint.family, checkpoint.numbers) == ("flux-dev", 11_901_408_320)
    (tmp_path / "transformer").mkdir()
    config = json.dumps({"_class_name": "FluxTransformer2DModel", "guidance_embeds": True})
    (tmp_path / "transformer" / "config.json").write_text(config)
    component = Component("transformer", FluxTransformer2DModel)
    assert held_components(checkpoint, [component], tmp_path) == [component]
    only_checked(tensors)
    with pytest.raises(LoadError, match="WholeError"):
        read_components(checkpoint, [component], tmp_path, torch.bfloat16, lambda name: None)
    del tensors["single_blocks.7.linear2.bias"]
    with pytest.raises(LoadError, match="transformer in a.safetensors"):
        read_components(checkpoint, [component], tmp_path, torch.bfloat16, lambda name: None)


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ((), ("epsilon", False)),
        (("v_pred",), ("v_prediction", False)),
        (("v_pred", "ztsnr"), ("v_prediction", True)),
    ],
)
def test_the_prediction_of_the_scheduler_is_that_of_the_file(
    saved: Callable[[str], Path], tmp_path: Path, marks: tuple[str, ...], expected: Any
) -> None:
    place = saved(XL)
    file = tmp_path / "one.safetensors"
    tensors = load_file(place / "one.safetensors")
    save_file({**tensors, **{name: torch.zeros(0) for name in marks}}, file)
    pipeline: Any = load(file, config_from=str(place / "model"))
    config = pipeline.scheduler.config
    assert (config.timestep_spacing == "trailing") is ("ztsnr" in marks)
    assert (config.prediction_type, config.rescale_betas_zero_snr) == expected
    assert np.isfinite(images(pipeline, XL)).all()
