"""`stepweave models`: the models at hand, and whether they can be served."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from stepweave.cli.connection import over_http, told
from stepweave.cli.failures import Failed

GIB = 2**30


@dataclass(frozen=True)
class Entry:
    """One model."""

    model: str  # as for `stepweave serve`
    revision: str | None
    pipeline: str | None
    gib: float
    problem: str | None


@click.command("models", short_help="List models at hand, and what keeps them from being served.")
@click.argument("directories", nargs=-1, type=click.Path(exists=True))
@click.option("--url", help="List the models of a server instead.")
@click.option("--api-key", envvar="STEPWEAVE_CLIENT_KEY", show_envvar=True, help="Its key.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each model.")
def command(
    directories: tuple[str, ...], url: str | None, api_key: str | None, as_json: bool
) -> None:
    """List the embedded model, pipelines in the hub's cache, and those in DIRECTORIES, with what
    keeps them from being served. Models may also be single .safetensors files."""
    if url is not None:
        entries: Sequence[dict[str, Any]] = asyncio.run(_served(url, api_key))
        lines = [(model["id"], _about(model)) for model in entries]
    else:
        found = list(_found(directories))
        entries = [asdict(entry) for entry in found]
        lines = [(_name(entry), _state(entry)) for entry in found]
    if as_json:
        for one in entries:
            click.echo(json.dumps(one))
        return
    width = max(len(name) for name, _ in lines)
    for name, about in lines:
        click.echo(f"{name:<{width}}  {about}")


def _found(directories: Sequence[str]) -> Iterator[Entry]:
    # takes seconds: not before the arguments are known to be right
    from huggingface_hub import CacheNotFound, scan_cache_dir

    from stepweave.cli.inspection import inspect_file, inspect_model, is_model
    from stepweave.config import EMBEDDED_MODEL

    def entry(model: str, folder: Path, revision: str | None = None) -> Entry:
        facts = inspect_model(folder) if folder.is_dir() else inspect_file(folder)
        return Entry(model, revision, facts.pipeline, facts.bytes / GIB, facts.problem)

    yield entry("shapes", EMBEDDED_MODEL)
    try:
        repositories = scan_cache_dir().repos
    except (CacheNotFound, ValueError):  # the latter if it is a file
        repositories = frozenset()
    for repository in sorted(repositories, key=lambda one: one.repo_id):
        for revision in sorted(repository.revisions, key=lambda one: -one.last_modified):
            if repository.repo_type == "model" and is_model(revision.snapshot_path):
                yield entry(repository.repo_id, revision.snapshot_path, revision.commit_hash)
    for directory in map(Path, directories):
        alone = is_model(directory) or directory.is_file()
        folders = [directory] if alone else sorted(directory.iterdir())
        models = [folder for folder in folders if is_model(folder)]
        if not models:
            raise Failed(
                f"{directory} has no pipeline: no model_index.json, here or one deeper, and no "
                ".safetensors file"
            )
        for folder in models:
            yield entry(str(folder), folder)


def _name(entry: Entry) -> str:
    return entry.model if entry.revision is None else f"{entry.model} --revision {entry.revision}"


def _state(entry: Entry) -> str:
    about = f"{entry.pipeline or 'no pipeline'}, {entry.gib:.2f} GiB"
    return about if entry.problem is None else f"{about}; not served: {entry.problem}"


async def _served(url: str, key: str | None) -> list[dict[str, Any]]:
    async with over_http(url, key) as client:
        response = await client.get("/v1/models")
        if response.status_code != 200:
            raise Failed(told(response))
        models: list[dict[str, Any]] = response.json()["data"]
        return models


def _about(model: dict[str, Any]) -> str:
    if "parent" in model:
        state = "in memory" if model["loaded"] else "read when first named"
        return f"LoRA for {model['parent']}, {state}"
    details = model["stepweave"]
    return (
        f"{details['pipeline']} on {details['device']} in {details['dtype']}, "
        f"{details['native_size']}, {details['default_num_inference_steps']} steps"
    )
