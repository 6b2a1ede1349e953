"""Brings a model from the hub into its cache, for servers that only read it: `python -m
stepweave.download`.

`STEPWEAVE_MODEL`, `STEPWEAVE_REVISION` and `STEPWEAVE_VARIANT` name it, `HF_HUB_CACHE` or `HF_HOME`
the cache, and `HF_TOKEN` is for gated ones. What is in the cache already is not fetched again.
"""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from pathlib import Path

from stepweave.config import Settings
from stepweave.errors import StepweaveError


def main() -> None:
    """Raises SystemExit, which prints one line and makes the status 1, if that cannot be done."""
    try:
        settings = Settings.load()
        if settings.model_directory() is not None:
            raise SystemExit(
                f"stepweave: STEPWEAVE_MODEL={settings.model!r} is a directory: there is nothing "
                f"to download"
            )
        from huggingface_hub.constants import HF_HUB_CACHE

        check_writable(Path(HF_HUB_CACHE))
        from stepweave.loading.hub import fetch

        folder, variant = fetch(settings.model, settings.revision, settings.variant)
    except StepweaveError as error:
        raise SystemExit(f"stepweave: the model cannot be downloaded: {error.message}") from None
    sys.stdout.write(
        f"{settings.model}{f', variant {variant},' if variant else ''} is in {folder}\n"
    )


def check_writable(cache: Path) -> None:
    """Raises SystemExit if a directory, made if it is absent, cannot be written to."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        there = next(folder for folder in (cache, *cache.parents) if folder.exists())
        owner = there.stat()
        raise SystemExit(
            f"stepweave: the cache {cache} cannot be written to ({error.strerror}): this is user "
            f"{os.getuid()}, and {there} belongs to {owner.st_uid}:{owner.st_gid} with mode "
            f"{stat.S_IMODE(owner.st_mode):o}"
        ) from None


if __name__ == "__main__":
    main()
