"""Writes the tables of settings in docs/configure.md: `python -m tools.settings_table`."""

from __future__ import annotations

from pathlib import Path

from stepweave.config import GROUPS, PREFIX, Settings

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configure.md"
HEADER = "| setting | default | meaning |\n| --- | --- | --- |\n"


def tables() -> str:
    """A heading and a Markdown table for each group of settings, with defaults and descriptions."""
    return "\n".join(f"### {group}\n\n{HEADER}{_rows(names)}" for group, names in GROUPS.items())


def _rows(names: tuple[str, ...]) -> str:
    fields = ((name, Settings.model_fields[name]) for name in names)
    return "".join(
        f"| `{PREFIX}{name.upper()}` | "
        f"{'' if field.default in (None, ()) else f'`{str(field.default).lower()}`'} | "
        f"{field.description} |\n"
        for name, field in fields
    )


def main() -> None:
    """Replace what follows the first group's heading."""
    text, first = PAGE.read_text(), f"### {next(iter(GROUPS))}\n"
    assert first in text, f"{PAGE} has no heading {first!r}"
    PAGE.write_text(text[: text.index(first)] + tables())


if __name__ == "__main__":
    main()
