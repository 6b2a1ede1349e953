"""Command lines that are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def refusal(
    parse: Callable[[list[str]], object], argument: str, capsys: pytest.CaptureFixture[str]
) -> str:
    """The last line of what a parser says before it exits."""
    with pytest.raises(SystemExit):
        parse([argument])
    return capsys.readouterr().err.splitlines()[-1]
