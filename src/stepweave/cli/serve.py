"""`stepweave serve`: BentoML's command with the settings of options and files."""

from __future__ import annotations

import ipaddress
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import yaml

from stepweave.cli.failures import Usage
from stepweave.cli.options import (
    ADDRESS,
    HOST,
    PORT,
    Given,
    Grouped,
    export,
    given_settings,
    setting_options,
)
from stepweave.config import Settings
from stepweave.errors import shown

SERVICE = "stepweave.service:Stepweave"
DEFAULTS = {
    HOST: Given("127.0.0.1", "default"),
    PORT: Given("3000", "default"),
    # at a terminal, a server that cannot start should say so and end
    "exit_on_failure": Given("true", "default"),
}
SECRETS = ("api_keys",)


@click.command("serve", short_help="Serve a model over HTTP.", cls=Grouped)
@click.argument("model", required=False)
@click.option(
    "--host", help=f"Address to listen on; 0.0.0.0 for all. [{ADDRESS[HOST]}; default 127.0.0.1]"
)
@click.option("--port", help=f"Port to listen on. [{ADDRESS[PORT]}; default 3000]")
@click.option("--print-config", is_flag=True, help="Print all settings as YAML, and do not serve.")
@setting_options(without=("model",), exit_on_failure=True)
def command(print_config: bool, config: Path | None, **flags: Any) -> None:
    """Serve MODEL: the directory of a diffusers pipeline, a .safetensors file of a whole model, or
    a hub repository (owner/name) with its commit as --revision. By default the embedded model,
    which draws shapes.

    Behind it is `bentoml serve`; see its help for further options, such as TLS: bentoml serve
    stepweave.service:Stepweave --help.
    """
    given = {**DEFAULTS, **given_settings(flags, config)}
    check_address(given)
    settings = export(given)
    if print_config:
        click.echo(effective(settings, given), nl=False)
        return
    # -P: modules of the working directory are not imported instead of libraries'
    bentoml = [sys.executable, "-P", "-m", "bentoml", "serve", SERVICE]
    address = ["--host", given[HOST].text, "--port", given[PORT].text]
    sys.stdout.flush()
    os.execv(sys.executable, [*bentoml, *address])  # its signals are this process's


def check_address(given: Mapping[str, Given]) -> None:
    """Raise Usage unless the host is an IP address, as BentoML requires, and the port a number."""
    host, port = given[HOST], given[PORT]
    try:
        ipaddress.ip_address(host.text)
    except ValueError:
        advice = "it must be an IP address, such as 127.0.0.1, or 0.0.0.0 for all"
        raise Usage(f"{host.source}={shown(host.text)}: {advice}") from None
    if not port.text.isdecimal() or not 1 <= int(port.text) <= 65535:
        raise Usage(f"{port.source}={shown(port.text)}: a port is a number, 1 to 65535")


def effective(settings: Settings, given: dict[str, Given]) -> str:
    """All settings as YAML, each with what gave it."""
    lines = []
    for name in (HOST, PORT, *Settings.model_fields):
        one = given.get(name)
        if name in SECRETS and getattr(settings, name):
            lines.append(f"# {name} is set, and not shown\n")
            continue
        if name in ADDRESS:
            value: Any = int(given[name].text) if name == PORT else given[name].text
        elif one is not None and name in ("preset", "quantization"):
            value = one.text
        else:
            value = settings.model_dump(mode="json", include={name})[name]
        text = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
        text = text.removesuffix("...\n").strip()
        lines.append(f"{name}: {text}  # {'default' if one is None else one.source}\n")
    return "".join(lines)
