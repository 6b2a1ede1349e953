"""The calls of modular pipelines are described as their blocks declare them."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest
import torch

from stepweave.calls import described
from stepweave.compat.modular import call_class, functions_of, unpacker_of, with_declared_call
from stepweave.planning.workload import arguments_of
from tests.pipelines.modular import (
    flux_modular,
    qwen_image_edit_modular,
    qwen_image_modular,
    stable_diffusion_xl_modular,
)


def kinds() -> dict[str, Any]:
    names = [name for name in dir(diffusers) if name.endswith("ModularPipeline")]
    found = {name.removesuffix("ModularPipeline"): getattr(diffusers, name) for name in names}
    return {name: kind for name, kind in found.items() if name}


def test_what_makes_no_images_is_told_apart() -> None:
    told = {name: described(kind).kind for name, kind in kinds().items()}
    videos = "Cosmos3 Echo Helios HunyuanVideo LTX MiniMaxH3 Wan"
    assert {name for name, kind in told.items() if kind == "video"} == {
        name for name in told if name.startswith(tuple(videos.split()))
    }
    assert [name for name, kind in told.items() if kind == "audio"] == ["MiniMaxMusic3"]
    assert set(told.values()) == {"image", "video", "audio"}


@pytest.mark.parametrize(
    ("name", "images", "needs", "scaled"),
    [
        ("Flux", ("image",), (), "image"),
        ("FluxKontext", ("image",), (), None),
        ("Flux2", ("image",), (), None),
        ("StableDiffusionXL", ("image", "mask_image", "control_image"), (), "image"),
        ("QwenImage", ("image", "mask_image", "control_image"), (), "image"),
        ("QwenImageEdit", ("image", "mask_image"), ("image",), None),  # a reference, without mask
        ("QwenImageEditPlus", ("image",), ("image",), None),
        ("QwenImageLayered", ("image",), ("image",), "image"),
        ("Krea2", (), (), None),
    ],
)
def test_images_are_known(
    name: str, images: tuple[str, ...], needs: tuple[str, ...], scaled: str | None
) -> None:
    call = described(kinds()[name])
    assert (tuple(call.images), call.needs_images, call.scaled) == (images, needs, scaled)
    assert call.unknown_needs == ()
    assert call.pipeline == f"{name}ModularPipeline"
    assert call.count == "num_images_per_prompt"
    assert {"prompt", "generator", "num_inference_steps", "output_type"} <= call.takes


def test_inputs_have_the_types_defaults_and_texts_of_their_blocks() -> None:
    call = described(diffusers.QwenImageLayeredModularPipeline)
    layers = call.arguments["layers"]
    assert (layers.type, layers.default) == ("integer", 4)
    assert layers.description == "Number of layers to extract from the image"
    flux = described(diffusers.FluxModularPipeline).arguments
    assert flux["prompt_2"].value is str  # the blocks declare no type
    assert flux["sigmas"].type == "array"
    assert not {"latents", "joint_attention_kwargs", "resized_image", "output"} & flux.keys()


def test_inputs_of_workflows_without_their_components_are_not_offered() -> None:
    offered = described(diffusers.QwenImageModularPipeline)
    assert "control_image" in offered.images
    pipeline = qwen_image_modular()
    assert pipeline.controlnet is None
    call = described(pipeline)
    assert tuple(call.images) == ("image", "mask_image")
    assert "controlnet_conditioning_scale" not in call.takes
    assert "padding_mask_crop" in call.arguments


def test_the_guiders_scale_is_an_argument() -> None:
    pipeline = stable_diffusion_xl_modular()
    assert arguments_of(pipeline)["guidance_scale"].default == 7.5
    other = stable_diffusion_xl_modular()
    other.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0))
    assert arguments_of(other)["guidance_scale"].default == 3.0
    assert arguments_of(flux_modular())["guidance_scale"].default == 3.5  # the blocks' own
    assert "guidance_scale" not in arguments_of(diffusers.Krea2TurboModularPipeline())


def test_the_class_is_the_pipelines_own_for_all_others() -> None:
    assert call_class(diffusers.FluxPipeline) is diffusers.FluxPipeline
    assert call_class(int) is int
    pipeline = flux_modular()
    made = call_class(pipeline)
    assert made is call_class(pipeline) is call_class(made)
    assert made.__name__ == "FluxModularPipeline"
    assert issubclass(made, diffusers.FluxModularPipeline)
    assert type(pipeline) is diffusers.FluxModularPipeline  # it is not changed
    assert type(with_declared_call(pipeline)) is made


def test_a_call_returns_images_and_refuses_what_is_not_declared() -> None:
    plain, pipeline = stable_diffusion_xl_modular(), stable_diffusion_xl_modular()
    with_declared_call(pipeline)
    arguments: dict[str, Any] = {
        "prompt": "a ring", "width": 16, "height": 16, "num_inference_steps": 1,
        "output_type": "np",
    }  # fmt: skip

    def drawn(pipeline: Any, **more: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipeline(**arguments, **more, generator=generator)

    assert (drawn(pipeline).images == drawn(plain, output="images")).all()
    plain.guider.guidance_scale = 2.0
    assert (drawn(pipeline, guidance_scale=2.0).images == drawn(plain, output="images")).all()
    assert (drawn(pipeline).images != drawn(plain, output="images")).any()
    assert pipeline.guider.guidance_scale == 7.5
    with pytest.raises(TypeError, match="unexpected keyword argument 'steps'"):
        pipeline(prompt="a ring", steps=4)


def test_the_code_of_blocks_is_read() -> None:
    names = {function.__qualname__ for function in functions_of(call_class(flux_modular()))}
    assert {"FluxSetTimestepsStep.__call__", "calculate_shift"} <= names
    assert not any(name.startswith("ModularPipeline") for name in names)
    usual = {function.__qualname__ for function in functions_of(diffusers.FluxPipeline)}
    assert "FluxPipeline.__call__" in usual
    assert "DiffusionPipeline.to" not in usual


def test_the_example_of_an_edit_needs_its_image() -> None:
    parameters = inspect.signature(call_class(qwen_image_edit_modular()).__call__).parameters
    required = [name for name, one in parameters.items() if one.default is one.empty]
    assert required == ["self", "image", "prompt"]


def test_packed_latents_are_unpacked_as_the_blocks_do() -> None:
    packed = torch.arange(16 * 16.0).reshape(1, 16, 16)
    sizes = {"height": 16, "width": 16, "vae_scale_factor": 2}
    for pipeline, usual in (
        (flux_modular(), diffusers.FluxPipeline),
        (qwen_image_modular(), diffusers.QwenImagePipeline),
    ):
        unpack = unpacker_of(pipeline)
        assert unpack is not None
        assert torch.equal(unpack(packed, **sizes), usual._unpack_latents(packed, **sizes))
    assert unpacker_of(stable_diffusion_xl_modular()) is None
