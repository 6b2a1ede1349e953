"""The pages about models are what the tool writes, and name only what exists."""

from __future__ import annotations

import inspect
import json
import re
import shlex
from collections.abc import Iterator
from typing import Any, get_args

import diffusers
import pytest

from stepweave.api.schemas import EditRequest, GenerationRequest
from stepweave.config import PREFIX, Settings
from stepweave.loading.edit_pipelines import Edit, edit_pipeline_class
from tools.model_pages import DATA, FOLDER, NETWORKS, NOT_KNOWN, Network, pages

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"  # Kolors
)
PAGES = {page["slug"]: page for page in DATA["pages"]}
FILES = {"image", "image[]", "mask"}
ROUTES = {
    "generations": set(GenerationRequest.model_fields),
    "edits": set(EditRequest.model_fields),
}


def classes(page: dict[str, Any]) -> set[str]:
    """The pipelines of a page, and those for edits that are made of their modules."""
    own = {name for variant in page["variants"] for name in variant["pipelines"]}
    edits = [edit_pipeline_class(name, edit) for name in own for edit in get_args(Edit)]
    return own | {kind.__name__ for kind in edits if kind is not None}


def requests(page: dict[str, Any]) -> Iterator[tuple[str, set[str]]]:
    """The last part of the route of each command of curl, and the names of its fields."""
    for block in re.findall(r"^```bash\n(.*?)^```$", page["request"], re.MULTILINE | re.DOTALL):
        for command in re.split(r"(?=^curl )", block, flags=re.MULTILINE)[1:]:
            words = shlex.split(command)
            url = next(word for word in words if word.startswith("http"))
            values = [
                value for option, value in zip(words, words[1:], strict=False) if option == "-F"
            ]
            body = words[words.index("-d") + 1] if "-d" in words else "{}"
            names = {value.partition("=")[0] for value in values} | json.loads(body).keys()
            yield url.rpartition("/")[2], names


def test_the_pages_are_what_the_tool_writes() -> None:
    committed = {path.name: path.read_text() for path in FOLDER.glob("*.md")}
    assert committed == pages(), "run `python -m tools.model_pages`"


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_requests_have_fields_of_the_route_or_arguments_of_the_pipeline(
    page: dict[str, Any],
) -> None:
    arguments = {
        name
        for kind in classes(page)
        for name in inspect.signature(getattr(diffusers, kind).__call__).parameters
    }
    found = list(requests(page))
    assert found
    for route, names in found:
        assert "prompt" in names
        assert bool(names & FILES) == (route == "edits")
        assert names - FILES - ROUTES[route] - arguments == set()


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_the_pipelines_that_a_page_lists_are_those_that_are_served(page: dict[str, Any]) -> None:
    text = (FOLDER / f"{page['slug']}.md").read_text()
    assert set(re.findall(r"^\| `(\w+Pipeline)` \| `\w+` \|", text, re.MULTILINE)) == classes(page)


def test_every_setting_that_is_named_exists() -> None:
    named = {name for text in pages().values() for name in re.findall(rf"\b{PREFIX}(\w+)", text)}
    assert len(named) > 5
    assert {name.lower() for name in named} - Settings.model_fields.keys() == set()


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_a_configuration_has_a_source_or_is_not_known(network: Network) -> None:
    assert bool(network.source) != bool(network.unknown)
    assert bool(network.omit) == bool(network.lacking)


def test_parameters_are_counted_without_what_is_omitted_and_once_if_shared() -> None:
    linear = Network("torch.nn:Linear", {"in_features": 3, "out_features": 2})
    assert linear.parameters == 3 * 2 + 2
    assert linear.gib * 2**30 == 2 * linear.parameters
    assert Network(linear.kind, linear.config, omit="bias").parameters == 3 * 2
    small = {"vocab_size": 8, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4}
    kind = "transformers:Qwen3ForCausalLM"
    apart = Network(kind, {**small, "tie_word_embeddings": False}).parameters
    assert apart - Network(kind, {**small, "tie_word_embeddings": True}).parameters == 8 * 4


def test_what_is_not_known_has_no_number() -> None:
    text = (FOLDER / "stable-diffusion-3.5.md").read_text()
    unknown = [name for name, network in NETWORKS.items() if network.unknown]
    variant = PAGES["stable-diffusion-3.5"]["variants"][0]
    rows = re.findall(r"^\| `(\w+)` \| `\w+` \| ([^|]*) \| ([^|]*) \|", text, re.MULTILINE)
    figures = {part: figures for part, *figures in rows if part in variant["parts"]}
    assert figures.keys() == variant["parts"].keys()
    for part, name in variant["parts"].items():
        assert (figures[part] == [NOT_KNOWN, NOT_KNOWN]) == (name in unknown)
