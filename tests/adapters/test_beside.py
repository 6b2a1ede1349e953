"""Components beside a model: what is loaded, and how what cannot be used is refused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from stepweave.adapters.beside import Added, by_field, load_beside
from stepweave.adapters.control_pipelines import control_pipeline, guides_of, modes_of
from stepweave.config import Settings
from stepweave.config.preset import Preset, parsed
from stepweave.errors import ConfigError, LoadError
from stepweave.serving.pipelines import Pipelines
from tests.pipelines.adapters_transformers import hunyuan_dit_control_net
from tests.pipelines.catalog import entries
from tests.pipelines.parts import autoencoder, controlnet, diffusion, vision
from tests.support.hub import COMMIT, hub, point_to

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("components") / "canny"
    controlnet().save_pretrained(folder)
    return folder


pytestmark = pytest.mark.usefixtures("no_settings")


@pytest.fixture
def settings(no_settings: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    def load(**components: Any) -> Settings:
        monkeypatch.setenv("STEPWEAVE_COMPONENTS", json.dumps(components))
        return Settings.load()

    return load


@pytest.fixture
def base() -> Any:
    return diffusers.StableDiffusionPipeline(**diffusion())


def load(settings: Settings, pipeline: Any, preset: Preset | None = None) -> dict[str, Added]:
    return load_beside(settings, preset or Preset(), pipeline, CPU, torch.float32)


def test_components_have_the_names_and_fields_by_which_requests_name_them(
    settings: Any, base: Any, net: Path
) -> None:
    added = load(settings(canny=str(net), outlines={"source": str(net)}), base)
    assert {name: one.field for name, one in added.items()} == dict.fromkeys(
        ("canny", "outlines"), "controlnet"
    )
    assert by_field(added).keys() == {"controlnet"}
    assert not any(part.training for one in added.values() for part in one.model.modules())


def test_a_presets_paths_begin_at_the_models_directory_and_the_setting_goes_first(
    settings: Any, base: Any, net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(net, tmp_path / "model" / "nets" / "canny")
    monkeypatch.setenv("STEPWEAVE_MODEL", str(tmp_path / "model"))
    preset = parsed(b'{"components": {"canny": "nets/canny", "other": "nowhere"}}')
    added = load(settings(other=str(net)), base, preset)
    assert added.keys() == {"canny", "other"}


def test_an_autoencoder_is_for_requests_that_name_it_or_replaces_the_models(
    settings: Any, base: Any, tmp_path: Path
) -> None:
    own = base.vae
    own.enable_tiling()
    torch.manual_seed(1)
    autoencoder().save_pretrained(tmp_path / "vae")
    source = str(tmp_path / "vae")
    [named] = load(settings(mse=source), base).values()
    assert base.vae is own and named.field == "vae" and not named.default
    assert named.model.use_tiling and not named.model.use_slicing
    added = load(settings(other=source, mse={"source": source, "default": True}), base)
    assert base.vae is added["mse"].model and base.vae is not added["other"].model
    assert not torch.equal(base.vae.decoder.conv_in.weight, own.decoder.conv_in.weight)


def saved(folder: Path, what: str) -> Path:
    """A directory with something wrong."""
    place = folder / what
    if what == "empty":
        place.mkdir()
        return place
    if what == "vision":
        vision().save_pretrained(place)
        return place
    if what == "unet":
        diffusers.StableDiffusionPipeline(**diffusion()).unet.save_pretrained(place)
        return place
    if what == "wide":
        diffusers.AutoencoderKL(**{**autoencoder().config, "latent_channels": 16}).save_pretrained(
            place
        )
        return place
    controlnet().save_pretrained(place)
    weights = place / "diffusion_pytorch_model.safetensors"
    if what == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "lacking":
        import safetensors.torch as files

        tensors = files.load_file(weights)
        tensors.pop("conv_in.weight")
        files.save_file(tensors, weights, {"format": "pt"})
    elif what == "pickle":
        torch.save({}, place / "diffusion_pytorch_model.bin")
        weights.unlink()
    elif what == "odd":
        (place / "config.json").write_text("[1]")
    return place


WRONG = {
    "empty": "config.json is missing",
    "vision": "_class_name is None",
    "unet": "it is a UNet2DConditionModel; a component may be",
    "cut": "damaged or cut off",
    "lacking": "conv_in.weight",
    "pickle": "safetensors",
    "odd": "_class_name is None",
}


@pytest.mark.parametrize(("what", "message"), WRONG.items(), ids=WRONG)
def test_what_cannot_be_read_is_refused_by_its_name(
    settings: Any, base: Any, tmp_path: Path, what: str, message: str
) -> None:
    with pytest.raises(LoadError, match="the component 'mine' cannot be loaded: ") as caught:
        load(settings(mine=str(saved(tmp_path, what))), base)
    assert message in caught.value.message
    assert str(tmp_path) not in caught.value.message
    assert "\n" not in caught.value.message


def test_an_autoencoder_with_other_latents_is_refused(
    settings: Any, base: Any, tmp_path: Path
) -> None:
    with pytest.raises(LoadError, match="'mine' .*its latent_channels is 16; that of .* is 4"):
        load(settings(mine=str(saved(tmp_path, "wide"))), base)


def test_only_one_autoencoder_is_the_default_and_nothing_else(
    settings: Any, base: Any, net: Path, tmp_path: Path
) -> None:
    autoencoder().save_pretrained(tmp_path / "vae")
    default = {"source": str(tmp_path / "vae"), "default": True}
    with pytest.raises(LoadError, match="'two' .*'one' replaces the model's autoencoder already"):
        load(settings(one=default, two=default), base)
    with pytest.raises(LoadError, match="'canny' .*which only an autoencoder may be"):
        load(settings(canny={"source": str(net), "default": True}), base)


@pytest.mark.parametrize(
    ("name", "channels"),
    [("stable_diffusion_3", 1), ("stable_diffusion_3_inpaint", 0)],
)
def test_what_guides_another_task_is_refused_with_its_channels(name: str, channels: int) -> None:
    pipeline = entries()[name].build()
    for extra, refused in ((channels, True), (1 - channels, False)):
        guide = diffusers.SD3ControlNetModel.from_transformer(
            # a copy: it writes the number of layers into the configuration that it is given
            copy.deepcopy(pipeline.transformer), num_layers=1, num_extra_conditioning_channels=extra
        )  # fmt: skip
        if refused:
            with pytest.raises(LoadError, match=f"its input has {extra} channels for masks"):
                control_pipeline(pipeline, [guide])
        else:
            assert guides_of(control_pipeline(pipeline, [guide])) == [guide]


def test_what_guides_another_family_is_refused(base: Any) -> None:
    with pytest.raises(LoadError, match="it is a HunyuanDiT2DControlNetModel; StableDiffusionCont"):
        control_pipeline(base, guides_of(hunyuan_dit_control_net()))
    with pytest.raises(LoadError, match="no pipeline like PixArtAlphaPipeline that is guided"):
        control_pipeline(entries()["pixart_alpha"].build(), [controlnet()])
    with pytest.raises(LoadError, match="'mine' cannot be used with this model: it is a Hunyuan"):
        guide = guides_of(hunyuan_dit_control_net())[0]
        Pipelines(base, {"mine": Added("mine", "controlnet", guide)})


SETTINGS = {
    "name": ({"": "x"}, "'' is not a name of a component"),
    "colon": ({"a:b": "x"}, "'a:b' is not a name of a component"),
    "member": ({"a": {"source": "x", "sub": 1}}, "sub"),
    "no text": ({"a": 1}, "components"),
    "number": ({str(number): "x" for number in range(33)}, "33 components; the limit is 32"),
    "climbing": ({"a": {"source": "x", "subfolder": "../y"}}, "subfolder"),
}


@pytest.mark.parametrize(("value", "message"), SETTINGS.values(), ids=SETTINGS)
def test_a_setting_that_is_wrong_is_refused(
    value: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPWEAVE_COMPONENTS", json.dumps(value))
    with pytest.raises(ConfigError, match="STEPWEAVE_COMPONENTS") as caught:
        Settings.load()
    assert message in caught.value.message.lower() or message in caught.value.message


@pytest.mark.parametrize("text", ["{", "[]", "nowhere.json"])
def test_a_setting_that_is_no_object_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPWEAVE_COMPONENTS", text)
    with pytest.raises(ConfigError, match="STEPWEAVE_COMPONENTS"):
        Settings.load()


def test_the_setting_may_be_a_file(
    net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "components.json"
    file.write_text(json.dumps({"canny": str(net)}))
    monkeypatch.setenv("STEPWEAVE_COMPONENTS", str(file))
    assert Settings.load().components.keys() == {"canny"}


def test_a_repository_of_the_hub_needs_a_commit(settings: Any, base: Any) -> None:
    for source in ("owner/net", "owner/net@main", "owner/net@" + "a" * 39):
        with pytest.raises(LoadError, match=r"neither an existing directory .*OWNER/NAME@COMMIT"):
            load(settings(canny=source), base)


def test_only_what_is_needed_is_downloaded_of_a_commit(
    settings: Any, base: Any, net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(net, tmp_path / "net")
    (tmp_path / "net" / "README.md").write_text("no")
    (tmp_path / "net" / "diffusion_pytorch_model.bin").write_bytes(b"no")
    with hub(tmp_path / "net", "owner/net") as served:
        served.let_go.set()
        point_to(served, monkeypatch)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        added = load(settings(canny=f"owner/net@{COMMIT}"), base)
    assert added["canny"].field == "controlnet"
    names = {file.name for file in (tmp_path / "cache").rglob("*") if file.is_symlink()}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_controlnets_that_tell_kinds_of_images_apart_say_how_many() -> None:
    [union] = guides_of(entries()["stable_diffusion_xl_control_net_union_text"].build())
    assert modes_of([union]) == union.config.num_control_type
    assert modes_of([controlnet()]) is None and modes_of([]) is None
