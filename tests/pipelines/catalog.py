"""What there is: the entries of all modules, the classes that diffusers exports, and those that no
entry builds."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import warnings

import diffusers
from diffusers import DiffusionPipeline, ModularPipeline
from diffusers.utils.import_utils import DummyObject

from tests import pipelines
from tests.pipelines.registry import ENTRIES, Entry

_OTHER_RUNTIMES = ("Flax", "Onnx")  # they run JAX and ONNX, not torch

_VISION = "Qwen3-VL's processor needs torchvision, and has no stand-in here yet"
_UNWRITTEN = "no entry written yet; no obstacle is known"
_OLD = "deprecated by diffusers; no entry written: "
_REASONS: dict[str, tuple[str, ...]] = {
    "it writes text": ("DiffusionGemmaPipeline", "LLaDA2Pipeline"),
    "it makes proteins": ("RFD4ProteinaPipeline",),
    "its call continues what `invert()` left on the pipeline: not one call": (
        "LEditsPPPipelineStableDiffusion",
        "LEditsPPPipelineStableDiffusionXL",
    ),
    (
        "broken in diffusers 0.42.1: it reads a setting `guidance_embeds` that Chroma's "
        "transformer "
        "lacks"
    ): ("ChromaInpaintPipeline",),
    "broken with transformers 5: it expects CLAP to return a tensor": ("MusicLDMPipeline",),
    "diffusers has it only if librosa is installed": ("AudioDiffusionPipeline",),
    "diffusers has it only if note_seq is installed": ("SpectrogramDiffusionPipeline",),
    "diffusers has it only if OpenCV is installed": ("ConsisIDPipeline",),
    "its image processor needs torchvision": ("OmniGenPipeline",),
    _VISION: (
        "BriaFibo2Pipeline",
        "DreamLiteMobilePipeline",
        "DreamLitePipeline",
        "JoyImageEditPipeline",
        "JoyImageEditPlusPipeline",
        "NucleusMoEImagePipeline",
        "QwenImage21Pipeline",
        "Flux3DistilledModularPipeline",
        "Flux3ModularPipeline",
        "QwenImage21ModularPipeline",
        "QwenImage21TurboModularPipeline",
    ),
    "modular, it makes videos or sound; no entry written": (
        "Cosmos3DistilledModularPipeline",
        "Cosmos3OmniModularPipeline",
        "EchoModularPipeline",
        "HeliosModularPipeline",
        "HeliosPyramidDistilledModularPipeline",
        "HeliosPyramidModularPipeline",
        "HunyuanVideo15ModularPipeline",
        "LTX25ModularPipeline",
        "LTX2ModularPipeline",
        "LTXModularPipeline",
        "MiniMaxH3ModularPipeline",
        "MiniMaxMusic3ModularPipeline",
        "Wan22Image2VideoModularPipeline",
        "Wan22ModularPipeline",
        "Wan22VaceModularPipeline",
        "WanAnimate2DistilledModularPipeline",
        "WanAnimate2ModularPipeline",
        "WanImage2VideoModularPipeline",
        "WanModularPipeline",
    ),
    _OLD + "it needs BLIP-2's Q-Former": (
        "BlipDiffusionControlNetPipeline",
        "BlipDiffusionPipeline",
    ),
    _OLD + "GLIGEN with images instead of phrases": ("StableDiffusionGLIGENTextImagePipeline",),
    _OLD + "it needs a captioning model, and computes gradients": (
        "StableDiffusionPix2PixZeroPipeline",
    ),
    _OLD + "a transformer for images and captions": ("UniDiffuserPipeline",),
    _OLD + "it combines parts of two UNets": (
        "VersatileDiffusionDualGuidedPipeline",
        "VersatileDiffusionImageVariationPipeline",
        "VersatileDiffusionPipeline",
        "VersatileDiffusionTextToImagePipeline",
    ),
    _OLD + "its transformer works on discrete codes": ("VQDiffusionPipeline",),
    "no entry written: a prior and a renderer of radiance fields": (
        "ShapEImg2ImgPipeline",
        "ShapEPipeline",
    ),
    _UNWRITTEN: (
        "AceStepPipeline",
        "AnyFlowFARPipeline",
        "Cosmos2_5_PredictBasePipeline",
        "Cosmos2_5_TransferPipeline",
        "Cosmos3OmniPipeline",
        "EasyAnimateControlPipeline",
        "EasyAnimateInpaintPipeline",
        "EasyAnimatePipeline",
        "HeliosPipeline",
        "HeliosPyramidPipeline",
        "HunyuanVideoFramepackPipeline",
        "HunyuanVideoImageToVideoPipeline",
        "Ideogram4Pipeline",
        "Kandinsky6SRPipeline",
        "Kandinsky6TI2VAPipeline",
        "LTX2DFRPipeline",
        "LTX2DFRTemporalRefinePipeline",
        "LTX2HDRPipeline",
        "LTX2InContextPipeline",
        "LTX2VideoDiffusionDecodePipeline",
        "LongCatImageEditPipeline",
        "MotifVideoImage2VideoPipeline",
        "MotifVideoPipeline",
        "SanaWMPipeline",
        "StableAudio3AudioToAudioPipeline",
        "StableAudio3InpaintPipeline",
        "StableAudio3Pipeline",
        "WanAnimatePipeline",
        "ZImageOmniPipeline",
    ),
}
NOT_BUILT = {name: reason for reason, names in _REASONS.items() for name in names}


def entries() -> dict[str, Entry]:
    """All entries by name, in the order of the modules' names and then of their text."""
    for name in entry_modules():
        importlib.import_module(name)
    return ENTRIES


def entry_modules() -> list[str]:
    """This package's modules, as they are imported."""
    prefix = f"{pipelines.__name__}."
    return [
        one.name
        for one in pkgutil.iter_modules(pipelines.__path__, prefix)
        if not one.name.endswith("__main__")
    ]


def exported() -> set[str]:
    """The pipeline classes that diffusers exports, without old names of others, and what runs on
    JAX or ONNX.

    Where a package is missing, diffusers exports stand-ins of the same name; they count.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some warn of what torch deprecated as they are imported
        return {name for name in dir(diffusers) if "Pipeline" in name and _is_pipeline(name)}


def _is_pipeline(name: str) -> bool:
    found = getattr(diffusers, name)
    if (
        not inspect.isclass(found)
        or found.__name__ != name
        or any(other in name for other in _OTHER_RUNTIMES)
    ):
        return False
    return isinstance(found, DummyObject) or (
        issubclass(found, (DiffusionPipeline, ModularPipeline))
        and found not in (DiffusionPipeline, ModularPipeline)
    )
