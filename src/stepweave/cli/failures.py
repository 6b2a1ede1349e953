"""How a command ends without success: one line on standard error, and an exit status."""

from __future__ import annotations

from typing import Any

import click

INTERRUPTED = 130  # exit status, as of shells


class Failed(click.ClickException):
    """A failure at run time: exit status 1."""

    def show(self: click.ClickException, file: Any = None) -> None:
        click.echo(f"stepweave: {self.format_message()}", err=True)


class Usage(click.ClickException):
    """Wrong arguments or settings: exit status 2."""

    exit_code = 2
    show = Failed.show
