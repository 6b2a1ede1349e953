"""Downloads a model into the hub's cache, for servers that only read it: `python -m
stepweave.download`.

The model is `STEPWEAVE_MODEL`, `STEPWEAVE_REVISION` and `STEPWEAVE_VARIANT`, the cache
`HF_HUB_CACHE` or `HF_HOME`; set `HF_TOKEN` for gated models. Cached files are not downloaded again.
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
    """Download the model. Raises SystemExit with a message (status 1) if that fails."""
    try:
        settings = Settings.load()
        if settings.is_local():
            raise SystemExit(
                f"stepweave: STEPWEAVE_MODEL={settings.model!r} is not a hub id: nothing to "
                "download"
            )
        from huggingface_hub.constants import HF_HUB_CACHE

        check_writable(Path(HF_HUB_CACHE))
        from stepweave.loading.hub import fetch

        folder, variant = fetch(settings.model, settings.revision, settings.variant)
    except StepweaveError as error:
        raise SystemExit(f"stepweave: the download failed: {error.message}") from None
    sys.stdout.write(
        f"{settings.model}{f', variant {variant},' if variant else ''} is in {folder}\n"
    )


def check_writable(cache: Path) -> None:
    """Create a directory if it is missing. Raises SystemExit if it cannot be written to."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
        status = existing.stat()
        raise SystemExit(
            f"stepweave: user {os.getuid()} cannot write to the cache {cache} ({error.strerror}): "
            f"{existing} belongs to {status.st_uid}:{status.st_gid} with mode "
            f"{stat.S_IMODE(status.st_mode):o}"
        ) from None


if __name__ == "__main__":
    main()
