"""Writes the pages of docs/models: `python -m tools.model_pages`.

The texts are in model_pages.toml, which also says of which networks a model consists, and where the
configuration of each is known from. A network is made on the meta device, which holds no weights,
to count its parameters. Without a known configuration the pages say so: a guess would look like a
measurement. What is batched is copied from docs/pipelines.md.
"""

from __future__ import annotations

import functools
import inspect
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import diffusers
import torch
from transformers import PreTrainedModel

from stepweave.config.preset import Preset
from stepweave.loading.builtin import BUILT_IN

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "models"
DATA = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
TEXTS = DATA["texts"]
NOT_KNOWN = "not known"
# arguments of a call that the server sets, or that a request sets by its `size`
_OURS = {"num_images_per_prompt", "return_dict", "callback_steps", "width", "height"}


@dataclass(frozen=True)
class Network:
    """A part of a model: a class, and what is known of its configuration."""

    kind: str
    config: Any = field(default_factory=dict)
    source: str = ""
    omit: str = ""  # parameters whose names begin so are not counted
    lacking: str = ""  # what these are
    unknown: str = ""  # why nothing is counted

    @property
    def whole(self) -> bool:
        return not (self.unknown or self.lacking)

    @functools.cached_property
    def parameters(self) -> int:
        """Their number, counting weights once that layers share."""
        kind, config = resolve_name(self.kind), _resolved(self.config)
        with torch.device("meta"):
            if issubclass(kind, PreTrainedModel):
                model = kind(kind.config_class(**config))
            else:
                model = kind(**config)
        return sum(
            parameter.numel()
            for name, parameter in model.named_parameters()
            if not self.omit or not name.startswith(self.omit)
        )

    @property
    def gib(self) -> float:
        return 2 * self.parameters / 2**30


def _resolved(config: Any) -> Any:
    """A configuration with values in place of their `module:name`."""
    if isinstance(config, dict):
        return {name: _resolved(value) for name, value in config.items()}
    return resolve_name(config) if isinstance(config, str) and ":" in config else config


NETWORKS = {name: Network(**values) for name, values in DATA["networks"].items()}


def pages() -> dict[str, str]:
    """The pages by file name."""
    index = _table(
        ["page", "model", "pipeline", "GiB of weights that are known", NOT_KNOWN],
        [row for page in DATA["pages"] for row in _index(page)],
    )
    found = {f"{page['slug']}.md": _page(page) for page in DATA["pages"]}
    return {"README.md": _joined("# Models", TEXTS["written"], TEXTS["index"], index), **found}


def _page(page: dict[str, Any]) -> str:
    versions = [f"{name} {version(name)}" for name in ("diffusers", "transformers")]
    pipelines = [name for variant in page["variants"] for name in variant["pipelines"]]
    return _joined(
        f"# {page['title']}",
        TEXTS["written"],
        "## Serve",
        page["serve"],
        TEXTS["serve"],
        _optimizations(page["denoiser"]),
        "## Request",
        page["request"],
        TEXTS["request"],
        _arguments(dict.fromkeys(pipelines), page["presets"]),
        "## Memory",
        TEXTS["memory"].replace("VERSIONS", " and ".join(versions)),
        *map(_weights, page["variants"]),
        TEXTS["fit"],
        "## What is batched",
        TEXTS["batched"],
        _batched(page["entries"]),
        TEXTS["batching"] + page["batching"],
        "## Not tried",
        TEXTS["tried"],
        page["tried"],
    )


def _joined(*parts: str) -> str:
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _optimizations(denoiser: str) -> str:
    """Whether two settings are refused, by what stepweave.loading.optimizations asks for."""
    kind = resolve_name(denoiser)
    with torch.device("meta"):
        parts = list(kind().modules())
    blocks = ", ".join(f"`{name}`" for name in kind._repeated_blocks or ())
    dispatches = any(
        hasattr(getattr(part, "processor", None), "_attention_backend") for part in parts
    )
    name = f"`{kind.__name__}`"
    rows = [
        [
            "`STEPWEAVE_COMPILE`",
            f"compiles {blocks}" if blocks else f"refused: {name} declares no repeated blocks",
        ],
        [
            "`STEPWEAVE_ATTENTION_BACKEND`",
            "possible" if dispatches else f"refused: the attention of {name} calls torch directly",
        ],
    ]
    return _table(["[optimization](../optimizations.md)", "with this model"], rows)


def _arguments(pipelines: Iterable[str], presets: list[str]) -> str:
    """Defaults of calls, and in further columns what presets set instead."""
    columns: dict[str, dict[str, Any]] = {
        f"`{name}`": _numbers(getattr(diffusers, name)) for name in pipelines
    }
    for built_in in BUILT_IN:
        if built_in.name in presets:
            link = f"[preset](../presets.md#built-in-presets) `{built_in.name}`"
            columns[link] = _values(built_in.preset)
    names = list(dict.fromkeys(name for values in columns.values() for name in values))
    rows = [
        [f"`{name}`", *(str(values.get(name, "")).lower() for values in columns.values())]
        for name in names
    ]
    return _table(["argument", *columns], rows)


def _numbers(pipeline: type[Any]) -> dict[str, Any]:
    return {
        name: argument.default
        for name, argument in inspect.signature(pipeline.__call__).parameters.items()
        if isinstance(argument.default, int | float)
        and not name.startswith("_")
        and name not in _OURS
    }


def _values(preset: Preset) -> dict[str, Any]:
    values = preset.model_dump(exclude_none=True, exclude={"limits"})
    call: dict[str, Any] = values.pop("call")
    if "width" in values:
        values = {"size": f"{values.pop('width')}x{values.pop('height')}", **values}
    return values | call


def _weights(variant: dict[str, Any]) -> str:
    """A table of a model's parts, and their sum."""
    rows = []
    for part, name in variant["parts"].items():
        network = NETWORKS[name]
        kind = f"`{network.kind.partition(':')[2]}`"
        if network.unknown:
            rows.append([f"`{part}`", kind, NOT_KNOWN, NOT_KNOWN, network.unknown])
            continue
        source = network.source
        if network.lacking:
            source += f"; *{NOT_KNOWN}*: {network.lacking}"
        rows.append(
            [f"`{part}`", kind, f"{network.parameters:,}", f"{network.gib:.2f}", source],
        )
    table = _table(["part", "class", "parameters", "GiB", "configuration"], rows)
    known, lacking = _sum(variant)
    total = f"**{variant['name']}**: {known:.1f} GiB"
    if lacking:
        total += f", and what is *{NOT_KNOWN}*: {lacking}"
    return f"{total}.\n\n{table}"


def _sum(variant: dict[str, Any]) -> tuple[float, str]:
    """GiB of what is known, and what is not."""
    parts = {part: NETWORKS[name] for part, name in variant["parts"].items()}
    known = sum(network.gib for network in parts.values() if not network.unknown)
    lacking = [
        f"`{part}`" if network.unknown else f"a part of `{part}`"
        for part, network in parts.items()
        if not network.whole
    ]
    return known, ", ".join(lacking)


@functools.cache
def _checked() -> dict[str, re.Match[str]]:
    """The rows of docs/pipelines.md by entry."""
    row = (
        r"^\| `(?P<class>\w+)` \| `(?P<entry>\w+)`[^|]* "
        r"\| (?P<shared>[^|]*) \| [^|]* \| (?P<alone>.*) \|$"
    )
    text = (ROOT / "docs" / "pipelines.md").read_text()
    return {found["entry"]: found for found in re.finditer(row, text, re.MULTILINE)}


def _batched(entries: list[str]) -> str:
    rows = [_checked()[entry] for entry in entries]
    return _table(
        ["class", "entry", "shared", "what ran alone"],
        [[f"`{row['class']}`", f"`{row['entry']}`", row["shared"], row["alone"]] for row in rows],
    )


def _index(page: dict[str, Any]) -> Iterator[list[str]]:
    for variant in page["variants"]:
        known, lacking = _sum(variant)
        yield [
            f"[{page['slug']}]({page['slug']}.md)",
            variant["name"],
            ", ".join(f"`{name}`" for name in variant["pipelines"]),
            f"{known:.1f}",
            lacking,
        ]


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    written = pages()
    for stale in set(FOLDER.glob("*.md")) - {FOLDER / name for name in written}:
        stale.unlink()
    for name, text in written.items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    main()
