"""Writes the table of settings in docs/configure.md: `python -m tools.settings_table`."""

from __future__ import annotations

import re
from pathlib import Path

from stepweave.config import PREFIX, Settings

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configure.md"
HEADER = "| setting | default | meaning |\n| --- | --- | --- |\n"


def table() -> str:
    """A Markdown table of all settings with defaults and descriptions, in the order of the code."""
    rows = [
        f"| `{PREFIX}{name.upper()}` | "
        f"{'' if field.default in (None, ()) else f'`{str(field.default).lower()}`'} | "
        f"{field.description} |\n"
        for name, field in Settings.model_fields.items()
    ]
    return HEADER + "".join(rows)


def main() -> None:
    rows = re.compile(re.escape(HEADER) + r"(\|.*\n)*")
    PAGE.write_text(rows.sub(lambda _: table(), PAGE.read_text(), count=1))


if __name__ == "__main__":
    main()
