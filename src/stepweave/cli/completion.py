"""`stepweave completion`: what a shell needs to complete commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")


@click.command("completion", short_help="Print the completion script of a shell.")
@click.argument("shell", type=click.Choice(SHELLS))
def command(shell: str) -> None:
    """Print the completion script of a shell.

    For bash: eval "$(stepweave completion bash)", in ~/.bashrc. For zsh: the same in ~/.zshrc. For
    fish: stepweave completion fish | source, in ~/.config/fish/config.fish.
    """
    kind = get_completion_class(shell)
    assert kind is not None
    main = click.get_current_context().find_root().command
    click.echo(kind(main, {}, "stepweave", "_STEPWEAVE_COMPLETE").source())
