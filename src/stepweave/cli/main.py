"""The command `stepweave`."""

from __future__ import annotations

import importlib
import os
from typing import Any

import click

import stepweave
from stepweave.cli.failures import INTERRUPTED, Failed
from stepweave.errors import StepweaveError
from stepweave.telemetry.logs import quiet_libraries

COMMANDS = ("serve", "generate", "models", "doctor", "completion")


class Commands(click.Group):
    """Imports a command's module when it is used: torch and BentoML take seconds."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"stepweave.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        quiet_libraries()
        # OpenMP's threads must not spin while they wait, as in a server
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        try:
            return super().invoke(ctx)
        except StepweaveError as error:
            raise Failed(error.message) from None
        except (KeyboardInterrupt, click.Abort):
            raise SystemExit(INTERRUPTED) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(stepweave.__version__, prog_name="stepweave")
def main() -> None:
    """Serve a diffusion model to many people at once, or make images with it.

    Settings are options, environment variables (in capitals, after STEPWEAVE_), or entries of the
    file of --config. Exit status: 0 success; 1 failure; 2 wrong arguments or settings; 130
    interrupted.
    """
