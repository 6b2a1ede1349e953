"""`stepweave doctor`: what keeps a server from starting here, in words."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
import psutil
from packaging.requirements import Requirement

import stepweave
from stepweave.cli.failures import Failed
from stepweave.cli.options import HOST, PORT, Grouped, export, given_settings, setting_options
from stepweave.cli.serve import DEFAULTS, check_address
from stepweave.config import Settings
from stepweave.errors import ConfigError

if TYPE_CHECKING:
    import torch

GIB = 2**30
FREE_DISK = 1 * GIB  # of the state directory and the hub's cache: below, a warning
TIGHT = 0.8  # share of free memory that weights may take without a warning
State = Literal["ok", "warning", "problem"]
MARKS: Mapping[State, str] = {"ok": "ok      ", "warning": "warning ", "problem": "PROBLEM "}


@dataclass(frozen=True)
class Finding:
    """What was looked at, and what was found."""

    about: str
    state: State
    message: str


@click.command(
    "doctor", short_help="Look for what would keep `serve` from working here.", cls=Grouped
)
@click.argument("model", required=False)
@click.option("--host", help="Address that the server would listen on.")
@click.option("--port", help="Its port.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each finding.")
@setting_options(without=("model",))
def command(as_json: bool, config: Path | None, **flags: Any) -> None:
    """Look for what would keep `stepweave serve` with the same arguments from working: versions,
    device, model, memory, port, and the directory of jobs and images.

    Exit status 1 if there is a problem.
    """
    given = {**DEFAULTS, **given_settings(flags, config)}
    check_address(given)
    settings = export(given)
    findings = []
    for finding in _look(settings, given[HOST].text, int(given[PORT].text)):
        findings.append(finding)
        line = f"{MARKS[finding.state]}{finding.about}: {finding.message}"
        click.echo(json.dumps(asdict(finding)) if as_json else line)
    problems = sum(finding.state == "problem" for finding in findings)
    if problems:
        raise Failed(f"{problems} problem{'s' if problems > 1 else ''} found")


def _look(settings: Settings, host: str, port: int) -> Iterator[Finding]:
    yield _versions()
    yield _port(host, port)
    yield from _keys(settings)
    yield from _state_directory(settings)
    device, finding = _device(settings)
    yield finding
    yield from _model(settings, device)
    yield from _beside(settings)
    yield from _loras(settings)


def _versions() -> Finding:
    python = f"stepweave {stepweave.__version__}, Python {sys.version.split()[0]}"
    try:
        required = importlib.metadata.requires("stepweave") or []
    except importlib.metadata.PackageNotFoundError:
        return Finding("versions", "warning", f"{python}; stepweave itself is not installed")
    wrong = []
    for text in required:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is installed, {requirement} is needed")
    if wrong:
        return Finding(
            "versions", "problem", f"{python}; {'; '.join(wrong)}: pip install stepweave"
        )
    shown = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("torch", "diffusers", "transformers", "bentoml")
    )
    return Finding("versions", "ok", f"{python}, {shown}")


def _port(host: str, port: int) -> Finding:
    from stepweave.serving.supervisor import check_port

    try:
        check_port(host, port)
    except SystemExit as error:
        message = str(error).removeprefix("stepweave: ")
        return Finding("port", "problem", message)
    return Finding("port", "ok", f"{port} of {host} is free")


def _keys(settings: Settings) -> Iterator[Finding]:
    from stepweave.serving.keys import ApiKeys

    try:
        ApiKeys(settings.api_keys, settings.api_keys_file)
    except ConfigError as error:
        yield Finding("API keys", "problem", error.message)


def _state_directory(settings: Settings) -> Iterator[Finding]:
    about = "state directory"
    folder = Path(settings.state_dir or tempfile.gettempdir()).expanduser()
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        yield Finding(about, "problem", f"{there} cannot be written to: choose another --state-dir")
        return
    free = shutil.disk_usage(there).free
    kind = "" if settings.state_dir else ", temporary (--state-dir keeps jobs across restarts)"
    text = f"{folder}{kind}, {free / GIB:.1f} GiB free"
    if free < FREE_DISK:
        yield Finding(about, "warning", f"{text}: images need up to --keep-bytes")
    else:
        yield Finding(about, "ok", text)


def _device(settings: Settings) -> tuple[torch.device | None, Finding]:
    import torch

    from stepweave.errors import LoadError
    from stepweave.loading.device import choose_device, choose_dtype

    try:
        device = choose_device(settings)
        dtype = choose_dtype(settings, device)
    except LoadError as error:
        return None, Finding("device", "problem", error.message)
    kind = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return device, Finding("device", "ok", f"{device} ({name}), {kind}")
    text = f"{device}, {kind}"
    if settings.device == "auto" and device.type == "cpu" and shutil.which("nvidia-smi"):
        build = torch.version.cuda
        why = (
            f"this torch is a build for CUDA {build}: it may need a newer driver"
            if build
            else "this torch is a build for CPUs"
        )
        return device, Finding("device", "warning", f"{text}, although there is a GPU: {why}")
    return device, Finding("device", "ok", text)


def _model(settings: Settings, device: torch.device | None) -> Iterator[Finding]:
    from huggingface_hub import try_to_load_from_cache

    from stepweave.cli.inspection import inspect_settings
    from stepweave.loading.components import INDEX
    from stepweave.loading.device import choose_dtype
    from stepweave.loading.modular import MODULAR_INDEX

    folder = None
    if not settings.is_local():
        found = (
            try_to_load_from_cache(settings.model, name, revision=settings.revision)
            for name in (INDEX, MODULAR_INDEX)
        )
        cached = next((path for path in found if isinstance(path, str)), None)
        if cached is None:
            text = f"{settings.model} is not in the hub's cache: it will be downloaded"
            yield Finding("model", "warning", text)
            return
        folder = Path(cached).parent
    facts = inspect_settings(settings, folder)
    if facts.problem is not None:
        if folder is not None and facts.incomplete:
            text = f"{settings.model} is not whole in the hub's cache: the rest will be downloaded"
            yield Finding("model", "warning", text)
        else:
            yield Finding("model", "problem", f"{settings.model_name()}: {facts.problem}")
        return
    size = f"{facts.bytes / GIB:.2f} GiB of files"
    yield Finding("model", "ok", f"{settings.model_name()}: {facts.pipeline}, {size}")
    if device is not None:
        yield _memory(settings, device, facts.numbers * choose_dtype(settings, device).itemsize)


def _beside(settings: Settings) -> Iterator[Finding]:
    """The components of the setting and of the preset."""
    from stepweave.adapters.beside import look_at
    from stepweave.errors import LoadError

    for name, source, what in look_at(settings):
        about = f"component {name}"
        if isinstance(what, LoadError):
            yield Finding(about, "problem", what.message)
        elif what is None:
            yield Finding(about, "warning", f"{source.source}: it may have to be downloaded")
        else:
            yield Finding(about, "ok", f"{what} of {source.source}")


def _loras(settings: Settings) -> Iterator[Finding]:
    """The directory of LoRAs of the setting."""
    directory = None if settings.loras is None else settings.loras.directory
    if directory is None:
        return
    from stepweave.adapters.lora_directory import LoraDirectory, why_no_directory
    from stepweave.loading.reading import listed

    if why := why_no_directory(directory):
        yield Finding("loras", "problem", f"STEPWEAVE_LORAS: {why}")
        return
    names = sorted(LoraDirectory(directory, {}).found)
    yield Finding("loras", "ok" if names else "warning", f"{directory}: {listed(names) or 'none'}")


def _memory(settings: Settings, device: torch.device, needed: int) -> Finding:
    where, free = "main memory", psutil.virtual_memory().available
    if device.type == "cuda" and settings.offload == "off":
        import torch

        where, free = str(device), torch.cuda.mem_get_info(device)[0]
    text = f"the weights take {needed / GIB:.2f} GiB of {where}, where {free / GIB:.2f} are free"
    if settings.quantization is not None:
        return Finding("memory", "ok", f"{text}; less with --quantization")
    if needed > free:
        advice = "see --dtype, --quantization and --offload"
        return Finding("memory", "problem", f"{text}: {advice}")
    if needed > TIGHT * free:
        return Finding("memory", "warning", f"{text}: little is left for making images")
    return Finding("memory", "ok", f"{text}; making images takes more, by size and batch")
