"""The description of a pipeline's call, of all pipelines of diffusers."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import diffusers
import pytest
import torch
from PIL import Image

from stepweave.calls import CallDescription, Kind, described, has_scalar
from tests.support.calls import image_calls
from tests.support.tiny import FAMILIES

# Of diffusers 0.42: all whose results are no images
OTHERS: dict[Kind, str] = {
    "video": "Wan AnimateDiff CogVideoX LTX LTX2 HunyuanVideo Mochi StableVideoDiffusion "
    "TextToVideoZero TextToVideoZeroSDXL Cosmos3Omni Latte SanaVideo Kandinsky5T2V "
    "Kandinsky6TI2VA WanAnimate LucyEdit SkyReelsV2",
    "audio": "AudioLDM AudioLDM2 StableAudio MusicLDM DanceDiffusion AceStep LongCatAudioDiT",
    "text": "LLaDA2 DiffusionGemma",
    "3d": "ShapE ShapEImg2Img",
    "other": "FluxPriorRedux KandinskyPrior StableCascadePrior VersatileDiffusion RFD4Proteina",
}
# what they need, by the pipelines' names
NEEDS = {
    "StableDiffusion": (),
    "Flux2": (),
    "FluxKontext": (),
    "BriaFiboEdit": (),
    "StableDiffusionImg2Img": ("image",),
    "StableDiffusionInpaint": ("image", "mask_image"),
    "StableDiffusionUpscale": ("image",),
    "StableDiffusionInstructPix2Pix": ("image",),
    "StableDiffusionImageVariation": ("image",),
    "QwenImageEdit": ("image",),
    "QwenImageEditPlus": ("image",),
    "QwenImageLayered": ("image",),
    "LongCatImageEdit": ("image",),
    "FluxFill": ("image", "mask_image"),
    "PaintByExample": ("example_image", "image", "mask_image"),
    "IFImg2ImgSuperResolution": ("image", "original_image"),
    "MarigoldDepth": ("image",),
    "CycleDiffusion": ("source_prompt", "image"),
    "DiT": ("class_labels",),
    "StableDiffusionAttendAndExcite": ("token_indices",),
    "DDPM": (),
    "KandinskyV22": ("image_embeds", "negative_image_embeds"),
    "StableDiffusionDiffEdit": ("image_latents", "mask_image"),
}


def call(name: str) -> CallDescription:
    return described(getattr(diffusers, f"{name}Pipeline"))


@pytest.mark.parametrize("expected", OTHERS)
def test_what_makes_no_images_is_told_apart(expected: Kind) -> None:
    names = OTHERS[expected].split()
    assert {name: call(name).kind for name in names} == dict.fromkeys(names, expected)


@pytest.mark.parametrize("name", NEEDS)
def test_what_a_call_needs_is_known(name: str) -> None:
    assert call(name).kind == "image"
    assert call(name).needs == NEEDS[name]


def test_every_family_of_the_tests_makes_images_and_needs_nothing_unknown() -> None:
    for family in FAMILIES.values():
        found = described(family.build())
        assert (found.kind, found.unknown_needs) == ("image", ())


def test_nothing_but_texts_numbers_flags_images_and_tensors_is_offered() -> None:
    """By what the pipelines' signatures say, not by what we made of it."""
    described_calls = image_calls()
    assert len(described_calls) > 190
    for one in described_calls:
        parameters = inspect.signature(getattr(diffusers, one.pipeline).__call__).parameters
        for name, argument in {**one.arguments, **one.images}.items():
            annotation = str(parameters[name].annotation)
            for never in ("Callable", "Generator", "dict[", "Dict[", "nn.Module", "device"):
                assert never not in annotation, (one.pipeline, name)
            assert not name.startswith("_")
            if not argument.is_file:
                tensors = argument.type == "tensor"
                assert ("Tensor" in annotation) >= tensors, (one.pipeline, name)
                assert "Tensor" not in str(argument.value), (one.pipeline, name)
        for name in ("callback_on_step_end", "generator", "seed", "masked_image_latents"):
            assert name not in one.arguments and name not in one.images


# Of diffusers 0.42: all texts that requests may send. One that is new here: does the pipeline open
# or fetch what it names?
TEXTS = """
    complex_human_instruction content_prompt editing_prompt gligen_phrases neg_prompt
    negative_prompt_2 negative_prompt_3 negative_prompt_4 prompt_2 prompt_3 prompt_4
    resample_method_input resample_method_output source_prompt source_subject_category system_prompt
    target_subject_category task_prompt
""".split()


def test_these_are_all_the_texts_that_can_be_sent() -> None:
    found = {
        name
        for one in image_calls()
        for name, argument in one.arguments.items()
        if has_scalar(argument.value, str)
    }
    assert found == set(TEXTS)


# Of diffusers 0.42: all tensors that requests may send. One that is new here: what does an index
# in it read, and how much work does its size mean?
TENSORS = """
    attention_mask controlnet_pooled_projections depth_map encoder_hidden_states hint
    image_embeddings image_embeds image_latents latents negative_attention_mask
    negative_encoder_hidden_states negative_image_embeds negative_pooled_prompt_embeds
    negative_prompt_attention_mask negative_prompt_attention_mask_2 negative_prompt_embeds
    negative_prompt_embeds_2 negative_prompt_embeds_clip negative_prompt_embeds_llama3
    negative_prompt_embeds_mask negative_prompt_embeds_mask_2 negative_prompt_embeds_pooled
    negative_prompt_embeds_qwen negative_prompt_embeds_t5 pooled_prompt_embeds prior_token_ids
    prompt_attention_mask prompt_attention_mask_2 prompt_embeds prompt_embeds_2 prompt_embeds_clip
    prompt_embeds_llama3 prompt_embeds_mask prompt_embeds_mask_2 prompt_embeds_pooled
    prompt_embeds_qwen prompt_embeds_t5
""".split()


def test_these_are_all_the_tensors_that_can_be_sent() -> None:
    found = {
        name
        for one in image_calls()
        for name, argument in one.arguments.items()
        if argument.type == "tensor"
    }
    assert found == set(TENSORS)
    unknown = [one.pipeline for one in image_calls() if one.unknown_needs]
    assert unknown == ["VersatileDiffusionDualGuidedPipeline"]


def test_a_list_of_tensors_is_told_from_one() -> None:
    z_image, flux = call("ZImage").arguments, call("Flux").arguments
    assert z_image["prompt_embeds"].several and not flux["prompt_embeds"].several
    assert not call("KandinskyV22").arguments["image_embeds"].several  # may be either


def test_no_text_is_a_file_or_a_url_to_a_pipeline() -> None:
    class Opens:
        def __call__(
            self, prompt: str, image: str | None = None, fonts: list[str] | None = None,
            lora_path: str = "", style_image: str | list[str] = "",
        ) -> Any: ...  # fmt: skip

    found = described(Opens)
    assert (found.arguments, found.images) == ({}, {})


def test_all_numbers_flags_and_texts_of_signatures_are_offered() -> None:
    left: dict[str, set[str]] = {}
    for one in image_calls():
        parameters = inspect.signature(getattr(diffusers, one.pipeline).__call__).parameters
        for name, parameter in parameters.items():
            plain = {"int", "float", "bool", "str", "int | None", "float | None", "bool | None"}
            text = inspect.formatannotation(parameter.annotation)
            known = one.arguments.keys() | {"width", "height", "num_inference_steps"}
            if text in plain and name not in known:
                left.setdefault(name, set()).add(one.pipeline)
    # the server's own fields, what would change the kind of result, and what is private
    assert left.keys() <= {
        "prompt", "negative_prompt", "guidance_scale", "guidance_rescale", "strength",
        "num_images_per_prompt", "batch_size", "output_type", "return_dict", "seed",
        "callback_steps", "debug", "output_latent", "output_uncertainty", "_auto_resize",
    }, left  # fmt: skip


@pytest.mark.parametrize(
    ("pipeline", "name", "value", "default"),
    [
        ("StableDiffusion", "clip_skip", int, None),
        ("StableDiffusion", "eta", float, 0.0),
        ("QwenImage", "true_cfg_scale", float, 4.0),
        ("StableDiffusionXL", "original_size", tuple[int, int], None),
        ("StableDiffusionXL", "prompt_2", str, None),
        ("Flux", "sigmas", list[float], None),
        ("Flux2", "text_encoder_out_layers", tuple[int, ...], (10, 20, 30)),
        ("StableDiffusionGLIGEN", "gligen_boxes", list[list[float]], None),
        ("SemanticStableDiffusion", "edit_threshold", float | list[float], 0.9),
        ("PixArtAlpha", "clean_caption", bool, True),
        ("BriaFibo", "do_patching", bool, False),  # by its default: it has no annotation
    ],
)
def test_types_are_those_of_annotations(pipeline: str, name: str, value: Any, default: Any) -> None:
    argument = call(pipeline).arguments[name]
    assert argument.value == value
    assert argument.default == default


def test_lists_become_the_tuples_that_a_call_takes() -> None:
    arguments = call("StableDiffusionXL").arguments
    assert arguments["original_size"].passed([64, 32]) == (64, 32)
    assert arguments["timesteps"].passed([9, 3]) == [9, 3]


@pytest.mark.parametrize(
    ("pipeline", "scaled"),
    [
        ("StableDiffusionImg2Img", "image"),
        ("StableDiffusion3Img2Img", "image"),  # takes width and height, too
        ("FluxFill", "image"),
        ("StableDiffusionUpscale", "image"),  # has no width and height
        ("IFImg2ImgSuperResolution", "original_image"),
        ("Flux2", None),
        ("FluxKontext", None),
        ("QwenImageEditPlus", None),
        ("StableDiffusionXLInstructPix2Pix", None),
    ],
)
def test_references_are_told_from_images_that_a_result_begins_with(
    pipeline: str, scaled: str | None
) -> None:
    assert call(pipeline).scaled == scaled


def test_the_result_and_the_number_of_images_are_found_by_their_names() -> None:
    assert (call("StableDiffusion").result, call("StableDiffusion").count) == (
        "images",
        "num_images_per_prompt",
    )
    assert (call("DDPM").count, call("DiT").count) == ("batch_size", None)
    assert (call("MarigoldDepth").result, call("MarigoldDepth").output_type) == ("prediction", "np")
    assert call("MarigoldDepth").count is None  # its batch_size is something else
    assert call("StableDiffusionLDM3D").result == "rgb"
    assert call("Kandinsky5T2I").result == "image"
    assert call("UnCLIP").steps == (
        "decoder_num_inference_steps",
        "prior_num_inference_steps",
        "super_res_num_inference_steps",
    )


def test_arguments_are_described_by_the_docstring() -> None:
    text = call("StableDiffusion").arguments["clip_skip"].description
    assert text.startswith("Number of layers to be skipped from CLIP")
    described_ones = [bool(one.description) for c in image_calls() for one in c.arguments.values()]
    assert sum(described_ones) > 0.8 * len(described_ones)


class Odd:
    """A pipeline that is not diffusers'."""

    def __call__(
        self,
        prompt: str,
        image: Any = None,
        mode: Literal["soft", "hard"] = "soft",
        weights: "list[float]" = [1.0],  # noqa: B006, UP037
        unknown: "Missing" = None,  # type: ignore[name-defined]  # noqa: F821, UP037
        bare=3,  # type: ignore[no-untyped-def]
        photo: Image.Image | torch.Tensor | None = None,
        images_of_before: torch.Tensor | None = None,
        *args: int,
        **more: int,
    ) -> Any:
        raise NotImplementedError


def test_a_call_of_another_library_is_described_by_the_same_rules() -> None:
    found = described(Odd)
    assert found.kind == "image"
    assert {name: one.type for name, one in found.arguments.items()} == {
        "mode": "string",
        "weights": "array",
        "bare": "integer",
    }
    assert list(found.images) == ["image"]
