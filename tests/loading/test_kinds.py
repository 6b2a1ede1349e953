"""Which of diffusers' pipelines make images of prompts, and that others are refused before their
weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from stepweave.config import EMBEDDED_MODEL, Settings
from stepweave.config.preset import Preset
from stepweave.errors import LoadError, NoImagesError
from stepweave.images.outputs import images_of
from stepweave.loading.kinds import Kind, check_served, kind_of
from stepweave.loading.loader import load_pipeline
from stepweave.serving.model import ServedModel
from tests.pipelines.catalog import exported
from tests.support.fake_pipeline import FakePipeline
from tests.support.tiny import FAMILIES

CPU = torch.device("cpu")
COMMIT = "0123456789abcdef0123456789abcdef01234567"

# Of diffusers 0.42: all that make images of a prompt and nothing else, or may do without the image
# that they take
TEXT_TO_IMAGE = """
    AltDiffusion Amused AuraFlow BriaFibo2 BriaFiboEdit BriaFibo Bria Chroma CogView3Plus CogView4 Cosmos2TextToImage
    DreamLiteMobile DreamLite ErnieImage Flux2KleinKV Flux2Klein Flux2 FluxKontext Flux GlmImage HiDreamImage
    HunyuanDiTPAG HunyuanDiT HunyuanImage IF Ideogram4 JoyImageEdit JoyImageEditPlus Kandinsky3 Kandinsky5T2I
    KandinskyCombined KandinskyV22Combined KolorsPAG Kolors Krea2 LDMTextToImage LatentConsistencyModel LongCatImage
    Lumina2 Lumina NucleusMoEImage OmniGen OvisImage PRX PRXPixel PixArtAlpha PixArtSigmaPAG PixArtSigma QwenImage21
    QwenImage SanaPAG Sana SanaSprint SemanticStableDiffusion StableCascadeCombined StableDiffusion3PAG
    StableDiffusion3 StableDiffusionGLIGEN StableDiffusionGLIGENTextImage StableDiffusionModelEditing
    StableDiffusionPAG StableDiffusionPanorama StableDiffusionParadigms StableDiffusion StableDiffusionPix2PixZero
    StableDiffusionSAG StableDiffusionXLPAG StableDiffusionXL StableUnCLIP UniDiffuser VQDiffusion
    VersatileDiffusionTextToImage WuerstchenCombined ZImageOmni ZImage
""".split()
OTHERS: dict[Kind, str] = {
    "edit": "StableDiffusionImg2Img StableDiffusionInpaint StableDiffusionUpscale "
    "StableDiffusionControlNet FluxFill FluxControl FluxControlNet QwenImageEdit "
    "QwenImageEditPlus QwenImageControlNet LongCatImageEdit Kandinsky5I2I "
    "KandinskyImg2ImgCombined StableDiffusionXLInstructPix2Pix StableDiffusionAdapter "
    "StableDiffusionXLControlNetUnion HunyuanImageRefiner IFSuperResolution "
    "StableDiffusionDiffEdit CycleDiffusion BlipDiffusion QwenImageLayered "
    "SanaSprintImg2Img ZImageInpaint",
    "video": "Wan AnimateDiff CogVideoX LTX LTX2 HunyuanVideo Mochi StableVideoDiffusion "
    "TextToVideoZero TextToVideoZeroSDXL Cosmos3Omni Latte SanaVideo Kandinsky5T2V "
    "Kandinsky6TI2VA WanAnimate LucyEdit SkyReelsV2",
    "audio": "AudioLDM AudioLDM2 StableAudio MusicLDM DanceDiffusion AceStep LongCatAudioDiT",
    "text": "LLaDA2 DiffusionGemma",
    "3d": "ShapE ShapEImg2Img",
    "other": "DDPM DiT StableDiffusionLDM3D FluxPriorRedux KandinskyPrior StableCascadePrior "
    "StableCascadeDecoder MarigoldDepth StableDiffusionAttendAndExcite "
    "StableDiffusionImageVariation UnCLIP VersatileDiffusion PaintByExample RFD4Proteina",
}


def kind(name: str) -> Kind:
    return kind_of(getattr(diffusers, name)).kind


def test_exactly_these_classes_of_diffusers_make_images_of_prompts() -> None:
    """A class that is new here: is it one of them? Then its name belongs above, else into `OTHERS`
    if it is of a new sort."""
    found = {name for name in exported() if kind(name) == "text_to_image"}
    assert found == {f"{name}Pipeline" for name in TEXT_TO_IMAGE} | {"StableDiffusionPipelineSafe"}


@pytest.mark.parametrize("expected", OTHERS)
def test_others_are_told_apart(expected: Kind) -> None:
    names = [f"{name}Pipeline" for name in OTHERS[expected].split()]
    assert {name: kind(name) for name in names} == dict.fromkeys(names, expected)


def test_every_family_of_the_tests_but_controlnets_is_served() -> None:
    refused = {
        name
        for name, family in FAMILIES.items()
        if kind_of(type(family.build())).kind != "text_to_image"
    }
    assert refused == {"controlnet_sd"}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("WanPipeline", "makes videos, not images (its results are frames)"),
        ("AudioLDM2Pipeline", "makes sound, not images (its results are audios)"),
        (
            "StableDiffusionInpaintPipeline",
            "makes images from images, not from a prompt alone (it needs image, mask_image)",
        ),
        ("DDPMPipeline", "makes no images of prompts (it takes no argument 'prompt')"),
        ("VersatileDiffusionPipeline", "makes no images of prompts (its class has no call)"),
    ],
)
def test_they_are_refused_before_anything_but_the_index_is_read(
    name: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = json.dumps({"_class_name": name})  # no component, no weights
    folder, snapshot = (
        tmp_path / "mine",
        tmp_path / "hub" / "models--owner--name" / "snapshots" / COMMIT,
    )
    for one in (folder, snapshot):
        one.mkdir(parents=True)
        (one / "model_index.json").write_text(index)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for model, settings in (
        ("mine", Settings(model=str(folder))),
        ("owner/name", Settings(model="owner/name", revision=COMMIT)),
    ):
        with pytest.raises(LoadError) as caught:
            load_pipeline(settings, CPU, torch.float32)
        assert caught.value.message == (
            f"the model {model!r} cannot be loaded: {name} {told}; this server serves "
            f"text-to-image pipelines only"
        )


def test_what_a_call_needs_may_come_from_a_preset() -> None:
    needing = diffusers.StableDiffusionAttendAndExcitePipeline
    with pytest.raises(LoadError, match="it needs token_indices"):
        check_served(needing)
    check_served(needing, {"token_indices"})


def test_pipelines_that_are_made_in_code_are_held_to_it_too() -> None:
    class Needing(FakePipeline):
        def __call__(
            self, prompt: str, image: Any, num_inference_steps: int = 4, generator: Any = None
        ) -> Any:  # type: ignore[override]
            raise AssertionError("never called")

    with pytest.raises(
        LoadError,
        match=r"Needing makes images from images, not from a prompt alone \(it needs image\)",
    ):
        ServedModel(Needing(), Preset(), Settings())


def test_images_are_found_under_either_name_and_nothing_else_is_one() -> None:
    image = Image.new("RGB", (8, 8))
    outputs = diffusers.pipelines.kandinsky5.pipeline_output.KandinskyImagePipelineOutput
    assert images_of(outputs(image=[image])) == [image]
    assert images_of(diffusers.ImagePipelineOutput(images=[image, image])) == [image, image]
    assert images_of(diffusers.ImagePipelineOutput(images=[])) == []
    films = diffusers.pipelines.wan.pipeline_output.WanPipelineOutput(frames=[[image]])
    with pytest.raises(
        NoImagesError,
        match=r"Wan makes no images of prompts: it returned frames \(list\), and no list of",
    ):
        images_of(films, "Wan")
    for wrong in (diffusers.ImagePipelineOutput(images=[[image]]), torch.zeros(1), (image,)):
        with pytest.raises(NoImagesError):
            images_of(wrong)


def test_the_embedded_model_is_served() -> None:
    index = json.loads((EMBEDDED_MODEL / "model_index.json").read_text())
    assert kind(index["_class_name"]) == "text_to_image"
