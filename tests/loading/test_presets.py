"""Defaults of requests: where they come from, which source has precedence, and what built-in
presets are recognised by."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from stepweave.config import EMBEDDED_MODEL, Settings
from stepweave.config.preset import FILE_NAME, Preset, preset_of_setting, read_preset
from stepweave.errors import ConfigError, LoadError
from stepweave.loading.builtin import BUILT_IN, recognise, recognise_configs
from stepweave.loading.loader import load_pipeline
from stepweave.serving.model import ServedModel
from tests.support.environment import ROOT
from tests.support.fake_pipeline import FakePipeline
from tests.support.in_process import InProcess
from tests.support.resolving import resolve

pytestmark = pytest.mark.usefixtures("no_settings")

CPU = torch.device("cpu")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
BUILT_INS = {one.name: one for one in BUILT_IN}


# The setting


def test_the_setting_is_json_or_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    expected = Preset(width=512, guidance_scale=0.0, call={"max_sequence_length": 256})
    text = '{"width": 512, "guidance_scale": 0, "id": null, "call": {"max_sequence_length": 256}}'
    file = tmp_path / "preset.json"
    file.write_text(text)
    for value in (text, f"\n {text}", str(file)):
        monkeypatch.setenv("STEPWEAVE_PRESET", value)
        preset = Settings.load().preset
        assert preset is not None
        assert preset.given() == expected.given()
    monkeypatch.setenv("STEPWEAVE_PRESET", "")
    assert Settings.load().preset is None


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ('{"widht": 64}', "there is no member 'widht' (did you mean 'width'?)"),
        (
            '{"sampler": 1}',
            "there is no member 'sampler' (allowed are id, width, height, num_inference_steps, "
            "guidance_scale, call, limits, components)",
        ),
        ('{"width": 4}', "width is 4: Input should be greater than or equal to 8"),
        ('{"width": "64"}', "width is '64': Input should be a valid integer"),
        (
            '{"num_inference_steps": true}',
            "num_inference_steps is True: Input should be a valid integer",
        ),
        (
            '{"guidance_scale": -1, "height": 2}',
            "height is 2: Input should be greater than or equal to 8; guidance_scale is -1",
        ),
        (
            '{"guidance_scale": 101}',
            "guidance_scale is 101: Input should be less than or equal to 100",
        ),
        ('{"guidance_scale": NaN}', "guidance_scale is nan: Input should be"),
        ('{"call": [1]}', "call is [1]: Input should be an object"),
        ('{"call": {"width": 64}}', "call.width must be a member of its own, outside call"),
        ('{"call": {"prompt": "x"}}', "call.prompt is set by the server"),
        ('{"width": 64', "not JSON, EOF while parsing"),
        (
            "[]",
            "it must be a JSON object, or the path of a file with one (No such file or directory)",
        ),
        (
            "/no/such/file.json",
            "it must be a JSON object, or the path of a file with one (No such file or directory)",
        ),
        (str(ROOT), "it must be a JSON object, or the path of a file with one (Is a directory)"),
        (str(ROOT / "README.md"), "in the file, not JSON, expected value"),
        (
            '{"num_inference_steps": 201}',
            "STEPWEAVE_PRESET: num_inference_steps is 201; STEPWEAVE_MAX_STEPS is 200",
        ),
        (
            '{"width": 4096, "height": 2048}',
            "STEPWEAVE_PRESET: width is 4096 and height is 2048; STEPWEAVE_MAX_PIXELS is 4194",
        ),
    ],
)
def test_what_is_wrong_with_it_is_named_with_the_member_and_what_is_allowed(
    value: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPWEAVE_PRESET", value)
    with pytest.raises(ConfigError) as caught:
        Settings.load()
    message = caught.value.message
    assert message.startswith("STEPWEAVE_PRESET")
    assert told in message, message


# Precedence


def test_the_setting_goes_before_the_file_that_before_ours_and_that_before_the_pipelines() -> None:
    setting = preset_of_setting('{"num_inference_steps": 2, "call": {"a": 1}}')
    file = Preset(num_inference_steps=3, guidance_scale=3.0, call={"a": 2, "b": 2}).named(
        "stepweave.json"
    )
    ours = Preset(
        width=64, height=32, num_inference_steps=4, guidance_scale=4.0, call={"a": 3, "c": 3}
    ).named("ours")
    merged = setting.over(file.over(ours))
    assert merged.given() == {
        "width": 64,
        "height": 32,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "call.a": 1,
        "call.b": 2,
        "call.c": 3,
    }
    assert {name: merged.source(name) for name in merged.given()} == {
        "width": "ours",
        "height": "ours",
        "num_inference_steps": "STEPWEAVE_PRESET",
        "guidance_scale": "stepweave.json",
        "call.a": "STEPWEAVE_PRESET",
        "call.b": "stepweave.json",
        "call.c": "ours",
    }
    assert merged.sources() == ["STEPWEAVE_PRESET", "stepweave.json", "ours"]


def test_a_served_model_takes_each_default_from_the_strongest_that_says_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    setting = preset_of_setting('{"guidance_scale": 0, "call": {"negative_prompt": "blue"}}')
    file = Preset(guidance_scale=3.0, num_inference_steps=3).named("stepweave.json")
    package = logging.getLogger("stepweave")
    propagated, package.propagate = package.propagate, True
    try:
        with caplog.at_level(logging.INFO, "stepweave.serving.model"):
            model = ServedModel(FakePipeline(), file, Settings(preset=setting))
    finally:
        package.propagate = propagated
    resolved = resolve(model, prompt="x")
    assert (resolved.guidance_scale, resolved.num_inference_steps) == (0.0, 3)
    assert (resolved.width, resolved.height) == (64, 64)  # the pipeline's own
    assert model.call(resolved)["negative_prompt"] == "blue"
    assert "negative_prompt" not in ServedModel(
        FakePipeline(), Preset(call={"negative_prompt": None}), Settings()
    ).call(resolved)
    for told in (
        "num_inference_steps=3 (stepweave.json)",
        "guidance_scale=0.0 (STEPWEAVE_PRESET)",
        "call.negative_prompt='blue' (STEPWEAVE_PRESET)",
    ):
        assert told in caplog.text


def test_v1_models_tells_the_defaults_and_where_they_come_from(in_process: Any) -> None:
    setting = preset_of_setting(
        '{"num_inference_steps": 7, "width": 32, "height": 32, "id": "mine"}'
    )
    app: InProcess = in_process(preset=setting)
    [model] = app.client.get("/v1/models").json()["data"]
    assert model["id"] == "mine"
    told = model["stepweave"]
    assert (told["default_num_inference_steps"], told["native_size"]) == (7, "32x32")
    assert told["default_guidance_scale"] == 7.0
    assert told["presets"] == ["STEPWEAVE_PRESET"]
    assert app.post().json()["parameters"]["num_inference_steps"] == 7
    assert in_process().client.get("/v1/models").json()["data"][0]["stepweave"]["presets"] == []


def test_it_serves_a_hub_id_and_goes_before_the_file_of_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--owner--shapes" / "snapshots" / COMMIT
    shutil.copytree(EMBEDDED_MODEL, snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    setting = preset_of_setting('{"num_inference_steps": 6, "call": {"max_sequence_length": 2}}')
    hub = Settings(model="owner/shapes", revision=COMMIT, preset=setting)
    model = ServedModel(*load_pipeline(hub, CPU, torch.float32), hub)
    assert (model.id, model.default_steps, model.default_guidance) == ("owner/shapes", 6, 7.0)
    assert model.call(resolve(model, prompt="x"))["max_sequence_length"] == 2
    local = Settings(preset=setting)
    model = ServedModel(*load_pipeline(local, CPU, torch.float32), local)
    assert (model.id, model.default_steps, model.default_guidance) == ("shapes", 6, 2.0)


# What the model does not take


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ('{"width": 68}', "STEPWEAVE_PRESET: width is 68; it must be a multiple of 8"),
        (
            '{"height": 20000}',
            "STEPWEAVE_PRESET: height is 20000; the model's limit is 8192 a side",
        ),
        (
            '{"call": {"max_sequence_length": 1}}',
            "STEPWEAVE_PRESET: call.max_sequence_length: FakePipeline takes no argument",
        ),
    ],
)
def test_what_the_model_does_not_take_is_refused_with_its_source(setting: str, told: str) -> None:
    with pytest.raises(LoadError) as caught:
        ServedModel(FakePipeline(), Preset(), Settings(preset=preset_of_setting(setting)))
    assert caught.value.message.startswith(told), caught.value.message


def test_guidance_and_sizes_that_the_pipeline_has_not_are_refused() -> None:
    class Plain(FakePipeline):
        def __call__(self, prompt: str, num_inference_steps: int = 4, generator: Any = None) -> Any:  # type: ignore[override]
            raise AssertionError("never called")

    for preset, told in (
        (
            Preset(guidance_scale=2.0),
            "stepweave.json: guidance_scale is 2, but Plain has no guidance_scale",
        ),
        (
            Preset(width=128),
            "stepweave.json: width is 128, but Plain has no width: it is always 64",
        ),
    ):
        with pytest.raises(LoadError) as caught:
            ServedModel(Plain(), preset, Settings())
        assert caught.value.message == told
    assert ServedModel(Plain(), Preset(width=64), Settings()).width == 64


# Built-in presets

SDXL = {"_class_name": "StableDiffusionXLPipeline"}
SD = {"_class_name": "StableDiffusionPipeline"}
FLUX = {"_class_name": "FluxPipeline"}
UNET = {"_class_name": "UNet2DConditionModel", "in_channels": 4}
SDXL_UNET = {
    **UNET,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "sample_size": 128,
}
DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
EULER = {"_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon", **DIFFUSION}
ANCESTRAL = {**EULER, "_class_name": "EulerAncestralDiscreteScheduler"}
PNDM = {
    "_class_name": "PNDMScheduler",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    **DIFFUSION,
}
LCM = {
    "_class_name": "LCMScheduler",
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
    **DIFFUSION,
}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
FLUX_SHIFTS = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
}
DEV = {
    "_class_name": "FluxTransformer2DModel",
    "guidance_embeds": True,
    "num_layers": 19,
    "num_single_layers": 38,
}
DYNAMIC = {**FLOW, **FLUX_SHIFTS, "shift": 3.0, "use_dynamic_shifting": True}

# Excerpts of the configurations in the repositories that are named
MODELS: dict[str, tuple[str | None, dict[str, dict[str, Any]]]] = {
    "stabilityai/sdxl-turbo": (
        "sdxl-turbo",
        {
            "model_index": SDXL,
            "unet": {**SDXL_UNET, "sample_size": 64},
            "scheduler": {**ANCESTRAL, "timestep_spacing": "trailing"},
        },
    ),
    "stabilityai/sd-turbo": (
        "sd-turbo",
        {
            "model_index": SD,
            "unet": {**UNET, "cross_attention_dim": 1024, "sample_size": 64},
            "scheduler": {**EULER, "timestep_spacing": "trailing"},
        },
    ),
    "black-forest-labs/FLUX.1-schnell": (
        "flux-schnell",
        {
            "model_index": FLUX,
            "transformer": {**DEV, "guidance_embeds": False},
            "scheduler": {**FLOW, **FLUX_SHIFTS, "shift": 1.0, "use_dynamic_shifting": False},
        },
    ),
    "black-forest-labs/FLUX.2-klein-4B": (
        "flux2-klein",
        {
            "model_index": {"_class_name": "Flux2KleinPipeline", "is_distilled": True},
            "scheduler": DYNAMIC,
        },
    ),
    "Krea 2, distilled": (
        "krea2-turbo",
        {"model_index": {"_class_name": "Krea2Pipeline", "is_distilled": True}},
    ),
    "hunyuanvideo-community/HunyuanImage-2.1-Distilled-Diffusers": (
        "hunyuan-image-distilled",
        {
            "model_index": {"_class_name": "HunyuanImagePipeline"},
            "transformer": {"use_meanflow": True, "guidance_embeds": True},
        },
    ),
    "Tongyi-MAI/Z-Image-Turbo": (
        "z-image-turbo",
        {
            "model_index": {"_class_name": "ZImagePipeline"},
            "scheduler": {**FLOW, "shift": 3.0, "use_dynamic_shifting": False},
        },
    ),
    "Vargol/lcm_sdxl_full_model": (
        "lcm",
        {"model_index": SDXL, "unet": {**SDXL_UNET, "time_cond_proj_dim": 256}, "scheduler": LCM},
    ),
    "Stable Diffusion 1.5 with the LCM-LoRA fused": (
        "lcm-lora",
        {
            "model_index": SD,
            "unet": {**UNET, "cross_attention_dim": 768, "sample_size": 64},
            "scheduler": LCM,
        },
    ),
    "PixArt-alpha/PixArt-LCM-XL-2-1024-MS": (
        "pixart-lcm",
        {
            "model_index": {"_class_name": "PixArtAlphaPipeline"},
            "transformer": {"_class_name": "Transformer2DModel"},
            "scheduler": LCM,
        },
    ),
    # the models that those were made of, and others like them
    "stabilityai/stable-diffusion-xl-base-1.0": (
        None,
        {
            "model_index": SDXL,
            "unet": SDXL_UNET,
            "scheduler": {**EULER, "timestep_spacing": "leading"},
        },
    ),
    "fluently/Fluently-XL-v4": (
        None,
        {
            "model_index": SDXL,
            "unet": SDXL_UNET,
            "scheduler": {**ANCESTRAL, "timestep_spacing": "leading"},
        },
    ),
    "SDXL with trailing spacing": (
        None,
        {
            "model_index": SDXL,
            "unet": SDXL_UNET,
            "scheduler": {**ANCESTRAL, "timestep_spacing": "trailing"},
        },
    ),
    "SDXL of velocities, of 512 pixels": (
        None,
        {
            "model_index": SDXL,
            "unet": {**SDXL_UNET, "sample_size": 64},
            "scheduler": {
                **ANCESTRAL,
                "timestep_spacing": "trailing",
                "prediction_type": "v_prediction",
            },
        },
    ),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (
        None,
        {
            "model_index": SD,
            "unet": {**UNET, "cross_attention_dim": 768, "sample_size": 64},
            "scheduler": PNDM,
        },
    ),
    "stabilityai/stable-diffusion-2-1": (
        None,
        {
            "model_index": SD,
            "unet": {**UNET, "cross_attention_dim": 1024, "sample_size": 96},
            "scheduler": {
                "_class_name": "DDIMScheduler",
                "prediction_type": "v_prediction",
                **DIFFUSION,
            },
        },
    ),
    "stabilityai/stable-diffusion-2-1-base": (
        None,
        {
            "model_index": SD,
            "unet": {**UNET, "cross_attention_dim": 1024, "sample_size": 64},
            "scheduler": {**PNDM, "prediction_type": "epsilon"},
        },
    ),
    "stabilityai/stable-diffusion-2": (
        None,
        {
            "model_index": SD,
            "unet": {**UNET, "cross_attention_dim": 1024, "sample_size": 96},
            "scheduler": {**EULER, "prediction_type": "v_prediction"},
        },
    ),
    "black-forest-labs/FLUX.1-dev": (
        None,
        {"model_index": FLUX, "transformer": DEV, "scheduler": DYNAMIC},
    ),
    "a FLUX.1-dev without its distillation": (
        None,
        {
            "model_index": FLUX,
            "transformer": {**DEV, "guidance_embeds": False},
            "scheduler": DYNAMIC,
        },
    ),
    "black-forest-labs/FLUX.2-klein-base-4B": (
        None,
        {
            "model_index": {"_class_name": "Flux2KleinPipeline", "is_distilled": False},
            "scheduler": DYNAMIC,
        },
    ),
    "stabilityai/stable-diffusion-3-medium-diffusers": (
        None,
        {
            "model_index": {"_class_name": "StableDiffusion3Pipeline"},
            "scheduler": {**FLOW, "shift": 3.0},
        },
    ),
    "PixArt-alpha/PixArt-XL-2-1024-MS": (
        None,
        {
            "model_index": {"_class_name": "PixArtAlphaPipeline"},
            "transformer": {"_class_name": "Transformer2DModel"},
            "scheduler": {"_class_name": "DPMSolverMultistepScheduler"},
        },
    ),
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": (
        None,
        {
            "model_index": {"_class_name": "SanaPipeline"},
            "scheduler": {"_class_name": "DPMSolverMultistepScheduler"},
        },
    ),
    "Tongyi-MAI/Z-Image": (
        None,
        {
            "model_index": {"_class_name": "ZImagePipeline"},
            "scheduler": {**FLOW, "shift": 6.0, "use_dynamic_shifting": False},
        },
    ),
    "hunyuanvideo-community/HunyuanImage-2.1-Diffusers": (
        None,
        {
            "model_index": {"_class_name": "HunyuanImagePipeline"},
            "transformer": {"use_meanflow": False, "guidance_embeds": False},
        },
    ),
    # whose pipeline has fitting defaults
    "SimianLuo/LCM_Dreamshaper_v7": (
        None,
        {
            "model_index": {"_class_name": "LatentConsistencyModelPipeline"},
            "unet": {**UNET, "time_cond_proj_dim": 256},
            "scheduler": LCM,
        },
    ),
}


@pytest.mark.parametrize("model", MODELS)
def test_layouts_are_recognised_by_their_configuration(model: str) -> None:
    expected, configs = MODELS[model]
    found = recognise_configs(configs, [model])
    assert (None if found is None else found.built_in.name) == expected


def test_there_is_a_model_for_each_built_in_preset() -> None:
    assert {name for name, _ in MODELS.values()} - {None} == set(BUILT_INS)


@pytest.mark.parametrize("model", [name for name, (built_in, _) in MODELS.items() if built_in])
def test_each_sign_counts_and_a_name_is_none(model: str) -> None:
    expected, configs = MODELS[model]
    assert expected is not None
    for sign, value in BUILT_INS[expected].signs.items():
        component, _, member = sign.partition(".")
        other = {
            **configs,
            component: {
                **configs.get(component, {}),
                member: "another" if value is not None else 256,
            },
        }
        found = recognise_configs(other, [model])
        if member == "time_cond_proj_dim" and expected.startswith("lcm"):
            continue  # the one sign in which two presets differ
        assert found is None, sign
    assert (
        recognise_configs({"model_index": configs["model_index"] | {"is_distilled": None}}, [model])
        is None
    )


@pytest.mark.parametrize(
    "name",
    ["jimmycarter/LibreFLUX", "ostris/OpenFLUX.1", "me/flux-de-distilled", "Z-Image-De-Turbo"],
)
def test_models_that_were_undone_are_not_taken_for_distilled_ones(name: str) -> None:
    """Their configuration is that of the model that they were made of."""
    for model in ("black-forest-labs/FLUX.1-schnell", "Tongyi-MAI/Z-Image-Turbo"):
        configs = MODELS[model][1]
        assert recognise_configs(configs, [model]) is not None
        assert recognise_configs(configs, [name]) is None


@pytest.mark.parametrize("name", BUILT_INS)
def test_the_pipelines_take_what_their_presets_say(name: str) -> None:
    one = BUILT_INS[name]
    for pipeline in one.pipelines:
        call = set(diffusers_call(pipeline))
        assert {member for member in one.preset.given() if "." not in member} <= call
        assert set(one.preset.call) <= call


def diffusers_call(name: str) -> list[str]:
    code = getattr(diffusers, name).__call__
    while hasattr(code, "__wrapped__"):
        code = code.__wrapped__
    return list(code.__code__.co_varnames[: code.__code__.co_argcount])


def test_a_directory_is_recognised_by_its_files(tmp_path: Path) -> None:
    for component, config in MODELS["stabilityai/sdxl-turbo"][1].items():
        folder = tmp_path if component == "model_index" else tmp_path / component
        folder.mkdir(exist_ok=True)
        names = {"model_index": "model_index.json", "scheduler": "scheduler_config.json"}
        (folder / names.get(component, "config.json")).write_text(json.dumps(config))
    found = recognise(tmp_path, "anything")
    assert found is not None
    assert found.preset.given() == {
        "width": 512,
        "height": 512,
        "num_inference_steps": 4,
        "guidance_scale": 0.0,
    }
    assert found.preset.sources() == ["built-in preset sdxl-turbo"]
    assert "scheduler.timestep_spacing=trailing" in found.signs
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{")
    assert recognise(tmp_path, "anything") is None


def test_the_document_is_the_code() -> None:
    rows = re.findall(
        r"^\| `([\w-]+)` \| (.*?) \| (.*?) \| (.*?) \|$",
        (ROOT / "docs/presets.md").read_text(),
        re.MULTILINE,
    )
    assert rows == [
        (
            one.name,
            f"[card]({one.card})",
            ", ".join(f"`{pipeline}`" for pipeline in one.pipelines),
            ", ".join(f"`{name}` {value:g}" for name, value in one.preset.given().items()),
        )
        for one in BUILT_IN
    ]


def test_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    text = '\ufeff{"num_inference_steps": 7}'
    (tmp_path / FILE_NAME).write_text(text)
    for preset in (
        read_preset(tmp_path),
        preset_of_setting(text),
        preset_of_setting(str(tmp_path / FILE_NAME)),
    ):
        assert preset.num_inference_steps == 7
