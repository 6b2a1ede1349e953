"""A model that is not whole is refused, by component and file; whole ones of many families,
variants and shards load."""

from __future__ import annotations

import functools
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn

from stepweave.config import EMBEDDED_MODEL, Settings
from stepweave.errors import LoadError
from stepweave.loading.loader import load_pipeline
from stepweave.loading.tokenizers import check_tokenizers
from tests.pipelines.catalog import entries
from tests.support.tiny import FAMILIES
from tests.support.waiting import SECONDS

CPU = torch.device("cpu")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
DAMAGED = ("stable_diffusion", "flux", "qwen_image")


@pytest.fixture
def every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipelines that are not served are read, too: how whole is another question."""
    monkeypatch.setattr("stepweave.loading.loader.check_served", lambda *_: None)


def load(folder: Path, **settings: Any) -> DiffusionPipeline:
    return load_pipeline(Settings(model=str(folder), **settings), CPU, torch.float32)[0]


def refused(folder: Path, **settings: Any) -> str:
    """What the server says of a model."""
    with pytest.raises(LoadError) as caught:
        load(folder, **settings)
    assert str(folder.parent) not in caught.value.message, caught.value.message
    return caught.value.message.partition(" cannot be loaded: ")[2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory that a tiny family was saved to; it is not to be changed."""

    @functools.cache
    def save(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family) / "model"
        FAMILIES[family].build().save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def copy(saved: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    def make(family: str = "stable_diffusion", name: str = "model") -> Path:
        return Path(shutil.copytree(saved(family), tmp_path / name))

    return make


# Damage

# each takes the folder of a component and returns what the message must hold besides the
# component's name
Damage = Callable[[Path], str]


def weights(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file = weights(folder)
    save_file(
        {name: one.clone() for name, one in change(load_file(file)).items()},
        file,
        metadata={"format": "pt"},
    )


def first_key(folder: Path) -> str:
    """Of those that nothing else could stand for."""
    return next(
        key
        for key in sorted(load_file(weights(folder)))
        if key.endswith(("norm1.weight", "layer_norm1.weight", "norm.weight")) or "norm" in key
    )


def key_renamed(folder: Path) -> str:
    key = first_key(folder)
    rewrite(
        folder,
        lambda all_: {
            ("other." + name if name == key else name): one for name, one in all_.items()
        },
    )
    return "lack 1 of the"


def keys_dropped(folder: Path) -> str:
    kept = first_key(folder)
    rewrite(folder, lambda all_: {name: one for name, one in all_.items() if name == kept})
    return " more"


def no_keys(folder: Path) -> str:
    save_file({}, weights(folder), metadata={"format": "pt"})
    return "/: "


def other_shape(folder: Path) -> str:
    key = first_key(folder)
    rewrite(
        folder, lambda all_: {name: one[:-1] if name == key else one for name, one in all_.items()}
    )
    return ""


def empty_weights(folder: Path) -> str:
    weights(folder).write_bytes(b"")
    return f"/{weights(folder).name}: the file is empty"


def cut_weights(folder: Path) -> str:
    file = weights(folder)
    file.write_bytes(file.read_bytes()[:-64])
    return f"/{file.name}: damaged or cut off at {file.stat().st_size} bytes"


def no_weights(folder: Path) -> str:
    weights(folder).unlink()
    return "/ has no weights"


def config_of(folder: Path) -> Path:
    (file,) = (
        one for one in folder.glob("*config.json") if one.name not in ("generation_config.json",)
    )
    return file


def no_config(folder: Path) -> str:
    file = config_of(folder)
    file.rename(folder / "config.txt")
    return f"/{file.name} is missing"


def broken_config(folder: Path) -> str:
    file = config_of(folder)
    file.write_text(file.read_text()[:-3])
    return f"/{file.name}: not JSON"


def empty_config(folder: Path) -> str:
    config_of(folder).write_text("")
    return f"/{config_of(folder).name}: the file is empty"


def no_folder(folder: Path) -> str:
    shutil.rmtree(folder)
    return "/ is missing or empty"


def empty_folder(folder: Path) -> str:
    shutil.rmtree(folder)
    folder.mkdir()
    return "/ is missing or empty"


def no_vocabulary(folder: Path) -> str:
    for file in folder.iterdir():
        if "config" not in file.name:
            file.unlink()
    return "/ has no vocabulary"


def empty_vocabulary(folder: Path) -> str:
    for file in folder.iterdir():
        if "config" not in file.name:
            file.write_bytes(b"")
    return ".json is empty"


def cut_vocabulary(folder: Path) -> str:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text()[:-100])
    return "/tokenizer.json: not JSON"


def changed_vocabulary(folder: Path, change: Callable[[dict[str, Any]], None]) -> str:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    change(content["model"])
    file.write_text(json.dumps(content))
    return "is incomplete: "


def lost_vocabulary(folder: Path) -> str:
    def change(model: dict[str, Any]) -> None:
        if isinstance(model["vocab"], list):
            model["vocab"] = model["vocab"][:3]  # the special ones
        else:
            model["vocab"], model["merges"] = {}, []

    return changed_vocabulary(folder, change)


OF_MODELS: tuple[Damage, ...] = (
    key_renamed,
    keys_dropped,
    no_keys,
    other_shape,
    empty_weights,
    cut_weights,
    no_weights,
    no_config,
    broken_config,
    empty_config,
    no_folder,
)
OF_TOKENIZERS: tuple[Damage, ...] = (
    no_vocabulary, empty_vocabulary, cut_vocabulary, lost_vocabulary, no_folder, empty_folder
)  # fmt: skip
OF_OTHERS: tuple[Damage, ...] = (no_config, broken_config, empty_config, no_folder, empty_folder)
KINDS: dict[str, tuple[Damage, ...]] = {
    "models": OF_MODELS,
    "tokenizers": OF_TOKENIZERS,
    "others": OF_OTHERS,
}


def parts_of(pipeline: Any, kind: str) -> list[str]:
    def kind_of(one: Any) -> str:
        return (
            "models"
            if isinstance(one, nn.Module)
            else "tokenizers"
            if hasattr(one, "get_vocab")
            else "others"
        )

    return [
        name
        for name, one in pipeline.components.items()
        if one is not None and kind_of(one) == kind
    ]


@pytest.mark.parametrize(
    ("family", "kind", "damage"),
    [
        pytest.param(
            family,
            kind,
            damage,
            id=f"{family}-{kind}-{damage.__name__}",
            marks=[pytest.mark.full] * (family != DAMAGED[0]),
        )
        for family in DAMAGED
        for kind, damages in KINDS.items()
        for damage in damages
    ],
)
def test_a_damaged_component_is_refused_by_name(
    copy: Callable[..., Path], family: str, kind: str, damage: Damage
) -> None:
    names = parts_of(FAMILIES[family].build(), kind)
    assert names
    for name in names:
        folder = copy(family, name)
        told = damage(folder / name)
        message = refused(folder)
        assert message.startswith(f"{name}/") and told in message, message
        assert "Error" not in message.replace("Error while", ""), message


def test_the_keys_of_a_text_encoder_are_named(copy: Callable[..., Path]) -> None:
    """transformers would draw them at random, another image for a seed after each start."""
    folder = copy()

    def renamed(all_: dict[str, Any]) -> dict[str, Any]:
        return {name.replace("mlp", "ffn"): one for name, one in all_.items()}

    rewrite(folder / "text_encoder", renamed)
    assert refused(folder) == (
        "text_encoder/: its weights lack 8 of the 36 tensors of CLIPTextModel: "
        "encoder.layers.0.mlp.fc1.bias, "
        "encoder.layers.0.mlp.fc1.weight, encoder.layers.0.mlp.fc2.bias and 5 more; they have "
        "encoder.layers.0.ffn.fc1.bias, encoder.layers.0.ffn.fc1.weight, "
        "encoder.layers.0.ffn.fc2.bias and 5 more, which it "
        "does not know"
    )


def test_merges_that_are_lost_are_noticed(copy: Callable[..., Path]) -> None:
    """Prompts still differ, letter by letter, and no word is what the text encoder has learnt."""
    folder = copy()
    changed_vocabulary(folder / "tokenizer", lambda model: model.update(merges=[]))
    assert refused(folder).startswith(
        "tokenizer/: the vocabulary of CLIPTokenizer is incomplete: it finds none of its"
    )


def test_from_pretrained_is_as_it_was_afterwards_and_for_other_threads(
    saved: Callable[[str], Path],
) -> None:
    kinds = (
        transformers.PreTrainedModel,
        ModelMixin,
        transformers.CLIPTokenizer,
        transformers.CLIPTextModel,
    )
    before = [vars(kind).get("from_pretrained") for kind in kinds]
    found: list[Any] = []
    original = DiffusionPipeline.from_pretrained

    def meanwhile(*args: Any, **kwargs: Any) -> Any:
        """Another thread reads a text encoder of which a key is missing, as it may."""

        def read() -> None:
            config = transformers.CLIPTextConfig(num_hidden_layers=3, **{})
            found.append(
                transformers.CLIPTextModel.from_pretrained(None, config=config, state_dict={})
            )

        thread = threading.Thread(target=read)
        thread.start()
        thread.join(SECONDS)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusionPipeline, "from_pretrained", meanwhile)
        load(saved("stable_diffusion"))
    assert [type(one) for one in found] == [transformers.CLIPTextModel]
    assert [vars(kind).get("from_pretrained") for kind in kinds] == before


# What is whole


@pytest.mark.usefixtures("every_kind")
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"stable_cascade"}))
def test_what_diffusers_has_saved_loads(saved: Callable[[str], Path], family: str) -> None:
    assert_read(load(saved(family)), FAMILIES[family].build())


def assert_read(pipeline: Any, expected: Any, *, atol: float = 0.0) -> None:
    """All tensors are those of the pipeline that was saved."""
    for name, one in expected.components.items():
        if isinstance(one, nn.Module):
            state = getattr(pipeline, name).state_dict()
            for key, tensor in one.state_dict().items():
                assert torch.allclose(state[key].float(), tensor.float(), rtol=0, atol=atol), (
                    name,
                    key,
                )


WHOLE = (
    "stable_diffusion_2_text",
    "stable_diffusion_xl_text",
    "if_text",
    "kandinsky_v22_text",
    "pixart_sigma",
    "lumina2",
    "aura_flow",
    "hunyuan_dit",
    "z_image",
    "cogview4",
    "flux2_klein",
    "animate_diff_text",
)


@pytest.mark.full
@pytest.mark.usefixtures("every_kind")
@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("layout", ["plain", "variant", "sharded", "sharded_variant"])
def test_more_families_load_whole_however_they_were_saved(
    tmp_path: Path, name: str, layout: str
) -> None:
    pipeline = entries()[name].build()
    options: dict[str, Any] = {"variant": "fp16"} if "variant" in layout else {}
    if "sharded" in layout:
        options["max_shard_size"] = "10KB"
    pipeline.save_pretrained(tmp_path / "model", **options)
    assert ("variant" in layout) == bool(list(tmp_path.rglob("*.fp16*")))
    assert ("sharded" in layout) == bool(list(tmp_path.rglob("*-00002-of-*")))
    assert_read(load(tmp_path / "model"), pipeline)


# Variants


def rename(folder: Path, name: Callable[[str], str]) -> None:
    """Name the weights, and the shards in their indexes, otherwise."""
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index*json")]:
        if "index" in file.name:
            content = json.loads(file.read_text())
            content["weight_map"] = {
                key: name(shard) for key, shard in content["weight_map"].items()
            }
            file.write_text(json.dumps(content))
        file.rename(folder / name(file.name))


def to_variant(file: str, variant: str = "fp16") -> str:
    """As save_pretrained names it today."""
    if ".index." in file:
        return file.replace(".json", f".{variant}.json")
    stem, dash, shard = file.removesuffix(".safetensors").partition("-0")
    return f"{stem}.{variant}{dash}{shard}.safetensors"


def to_old_variant(file: str) -> str:
    """As diffusers and transformers named shards before."""
    return (
        to_variant(file) if ".index." in file else file.replace(".safetensors", ".fp16.safetensors")
    )


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    FAMILIES["stable_diffusion"].build().save_pretrained(
        tmp_path / "sharded", max_shard_size="20KB"
    )
    assert len(list((tmp_path / "sharded" / "text_encoder").glob("model-0000*"))) > 1
    return tmp_path / "sharded"


@pytest.mark.parametrize("name", [to_variant, to_old_variant])
def test_the_one_variant_that_is_there_is_loaded(sharded: Path, name: Callable[[str], str]) -> None:
    for component in ("unet", "vae", "text_encoder"):
        rename(sharded / component, name)
    assert_read(load(sharded), FAMILIES["stable_diffusion"].build())


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_a_component_in_another_variant_than_the_others_is_loaded(
    copy: Callable[..., Path], component: str
) -> None:
    folder = copy()
    rename(folder / component, to_variant)
    assert_read(load(folder), FAMILIES["stable_diffusion"].build())


def test_files_without_a_variant_come_first_and_the_setting_chooses(
    copy: Callable[..., Path],
) -> None:
    folder = copy()
    shutil.copy(weights(folder / "unet"), folder / "unet" / "half.safetensors")
    other = folder / "unet" / "half.safetensors"
    save_file(
        {key: tensor * 2 for key, tensor in load_file(other).items()},
        other,
        metadata={"format": "pt"},
    )
    other.rename(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    expected = FAMILIES["stable_diffusion"].build()
    assert_read(load(folder), expected)
    chosen = load(folder, variant="fp16")
    key = "conv_in.weight"
    assert torch.equal(chosen.unet.state_dict()[key], expected.unet.state_dict()[key] * 2)
    assert torch.equal(
        chosen.vae.state_dict()[key.replace("conv", "encoder.conv")],
        expected.vae.encoder.conv_in.weight,
    )
    assert refused(folder, variant="ema") == (
        "STEPWEAVE_VARIANT='ema': no component of the model has that variant; its variants are fp16"
    )


def test_several_variants_that_would_do_are_named_with_the_setting(
    copy: Callable[..., Path],
) -> None:
    folder = copy()
    file = weights(folder / "vae")
    for variant in ("bf16", "fp16"):
        shutil.copy(file, folder / "vae" / f"diffusion_pytorch_model.{variant}.safetensors")
    file.unlink()
    message = refused(folder)
    assert (
        "bf16, fp16 are complete; choose one with STEPWEAVE_VARIANT" in message
        and message.startswith("vae/")
    )
    assert_read(load(folder, variant="bf16"), FAMILIES["stable_diffusion"].build())


def test_variants_that_do_not_go_together_are_named(copy: Callable[..., Path]) -> None:
    folder = copy()
    rename(folder / "unet", to_variant)
    rename(folder / "vae", lambda file: to_variant(file, "bf16"))
    message = refused(folder)
    assert "variant 'fp16' only" in message and "vae" in message and "STEPWEAVE_VARIANT" in message
    assert "vae/ has weights of the variant 'bf16' only" in refused(folder, variant="fp16")


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_a_shard_or_an_index_that_is_missing_is_named(sharded: Path, component: str) -> None:
    index = next((sharded / component).glob("*.index.json"))
    content = index.read_text()
    index.unlink()
    assert refused(sharded) == f"{component}/ lacks {index.name}"
    index.write_text(content)
    shard = next((sharded / component).glob("*-00002-of-*"))
    shard.unlink()
    assert refused(sharded) == f"{component}/ lacks {shard.name}"


def test_weights_as_pickles_only_are_refused_with_what_to_do(copy: Callable[..., Path]) -> None:
    folder = copy()
    file = weights(folder / "unet")
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    assert refused(folder) == (
        "unet/ has weights as diffusion_pytorch_model.bin only; Stepweave reads safetensors: load "
        "the model with diffusers once, "
        "and write it with `save_pretrained`"
    )


def test_the_hub_is_asked_for_the_variant_that_its_files_have(
    copy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network, from the hub's cache."""
    folder = copy()
    for component in ("unet", "vae", "text_encoder"):
        rename(folder / component, to_variant)
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / COMMIT
    shutil.copytree(folder, snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    pipeline, _ = load_pipeline(Settings(model="owner/name", revision=COMMIT), CPU, torch.float32)
    assert_read(pipeline, FAMILIES["stable_diffusion"].build())
    with pytest.raises(
        LoadError, match="the hub cannot be reached, and its cache does not hold the model"
    ):
        load_pipeline(Settings(model="owner/other", revision=COMMIT), CPU, torch.float32)


# What else is wrong with a model


def changed_index(folder: Path, **changes: Any) -> None:
    file = folder / "model_index.json"
    index = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in index.items() if value is not ...}))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"_class_name": "NoSuchPipeline"},
            "model_index.json: _class_name is 'NoSuchPipeline', which diffusers 0",
        ),
        ({"_class_name": ["pipeline", "Own"]}, "code from the model's files, which is not run"),
        (
            {"_class_name": "UNet2DConditionModel"},
            "_class_name is 'UNet2DConditionModel', which is not a pipeline",
        ),
        (
            {"_class_name": "SpectrogramDiffusionPipeline"},
            "needs packages that are not installed: note_seq",
        ),
        (
            {"unet": ["diffusers", "NoSuchModel"]},
            "unet is ['diffusers', 'NoSuchModel'], which diffusers 0",
        ),
        (
            {"text_encoder": ["transformers", "NoSuchModel"]},
            "`transformers` has no class `NoSuchModel`",
        ),
        (
            {"scheduler": ["no_such_library", "Scheduler"]},
            "no_such_library is not one of the libraries",
        ),
        (
            {"scheduler": ...},
            "model_index.json lacks scheduler, which StableDiffusionPipeline needs",
        ),
        ({"scheduler": ["diffusers", "OnnxRuntimeModel"]}, "scheduler"),
    ],
)
def test_an_index_that_names_what_is_not_there_is_refused(
    copy: Callable[..., Path], changes: dict[str, Any], told: str
) -> None:
    folder = copy()
    changed_index(folder, **changes)
    assert told in refused(folder)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            None,
            "model_index.json is missing: the model's directory is not that of a diffusers "
            "pipeline",
        ),
        ("", "model_index.json: not JSON, Expecting value: line 1 column 1"),
        ('{"_class_name": ', "model_index.json: not JSON, Expecting value"),
        ("[]", "model_index.json is []; it must be a JSON object"),
    ],
)
def test_an_index_that_cannot_be_read_is_refused(
    copy: Callable[..., Path], content: str | None, told: str
) -> None:
    folder = copy()
    (folder / "model_index.json").unlink()
    if content is not None:
        (folder / "model_index.json").write_text(content)
    assert refused(folder).startswith(told)


def test_a_config_of_another_model_is_refused_by_component_and_key(
    copy: Callable[..., Path],
) -> None:
    folder = copy()
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"cross_attention_dim": 8}))
    message = refused(folder)
    assert (
        message.startswith("unet/: ")
        and "attn2.to_k.weight" in message
        and "ignore_mismatched" not in message
    )
    file.write_text(
        json.dumps(
            json.loads(file.read_text()) | {"down_block_types": ["NoSuchBlock", "DownBlock2D"]}
        )
    )
    assert refused(folder).startswith("unet/: ") and "NoSuchBlock" in refused(folder)


def test_what_does_not_fit_into_memory_says_which_settings_help(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, device: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB. GPU 0 has ...")

    monkeypatch.setattr(DiffusionPipeline, "to", full)
    assert refused(saved("stable_diffusion")).startswith(
        "it does not fit into the memory of cpu; see STEPWEAVE_DTYPE"
    )


def test_a_tensor_that_nothing_was_read_into_is_named(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = DiffusionPipeline.from_pretrained

    def emptied(*args: Any, **kwargs: Any) -> Any:
        pipeline = original(*args, **kwargs)
        pipeline.vae.encoder.conv_in.to("meta")
        return pipeline

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", emptied)
    told = "vae/: no weights were read for encoder.conv_in.weight, encoder.conv_in.bias"
    assert refused(saved("stable_diffusion")) == told


def test_files_that_may_not_be_read_are_named(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another user would find them; tests may run as root, who may read all."""
    original = open

    def guarded(file: Any, *args: Any, **kwargs: Any) -> Any:
        if str(file).endswith("scheduler_config.json"):
            raise PermissionError(13, "Permission denied", str(file))
        return original(file, *args, **kwargs)

    monkeypatch.setattr("builtins.open", guarded)
    told = refused(saved("stable_diffusion"))
    assert told.startswith("scheduler/") and "scheduler_config.json: Permission denied" in told


def test_tokenizers_of_words_that_are_not_english_are_whole() -> None:
    """The embedded model's tells its own words apart; one without them, nothing."""
    pipeline, _ = load_pipeline(Settings(), CPU, torch.float32)
    assert EMBEDDED_MODEL.is_dir() and check_tokenizers(pipeline.components) == [
        "tokenizer",
        "tokenizer_2",
    ]
    words = {"<unk>": 0, "rouge": 1, "bleu": 2}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert check_tokenizers({"tokenizer": tokenizer}) == ["tokenizer"]
    empty = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>")), unk_token="<unk>"
    )
    with pytest.raises(
        LoadError,
        match=r"tokenizer/: the vocabulary of .* is incomplete: every prompt gives the same",
    ):
        check_tokenizers({"tokenizer": empty})
