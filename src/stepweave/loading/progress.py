"""Progress of downloading and of reading a model, in bytes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

# stage, its share from 0 to 1, message; raises LoadError if the server is shutting down
OnProgress = Callable[[Literal["downloading", "loading"], float, str], None]
POLL_SECONDS = 1.0
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def amount(done: float, total: float) -> str:
    """For example `1.2 of 4.0 GB`."""
    size, unit = next((one for one in _UNITS if total >= one[0]), _UNITS[-1])
    return f"{done / size:.1f} of {total / size:.1f} {unit}"


def share(done: float, total: float) -> float:
    return min(1.0, done / total) if total else 1.0


@contextlib.contextmanager
def downloading(
    blobs: Path, sizes: Mapping[str, int], on_progress: Callable[[int, int], None]
) -> Iterator[None]:
    """Within the block, call `on_progress` each second, on a thread, with the bytes of files that
    the hub's cache has, and of all. `blobs` is its folder, in which a file has the name of its
    content (or that with a suffix, while it is incomplete); `sizes` are in bytes, by such names."""
    total, ended = sum(sizes.values()), threading.Event()

    def poll() -> None:
        while not ended.wait(POLL_SECONDS):
            try:
                on_progress(_present(blobs, sizes), total)
            except Exception:  # the server is shutting down, which the download's end notices
                return

    thread = threading.Thread(target=poll, name="stepweave-download", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _present(blobs: Path, sizes: Mapping[str, int]) -> int:
    present = dict.fromkeys(sizes, 0)
    for file in _files(blobs):
        name = file.name.partition(".")[0]
        with contextlib.suppress(FileNotFoundError):  # renamed or removed meanwhile
            if name in present:
                present[name] = min(sizes[name], max(present[name], file.stat().st_size))
    return sum(present.values())


def _files(folder: Path) -> Iterable[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return ()


class Components:
    """Reports the components of a model that are read, by the sizes of their files in bytes."""

    def __init__(self, sizes: Mapping[str, int], on_progress: Callable[[float, str], None]) -> None:
        self._on_progress = on_progress
        self._sizes: dict[str, int] = {}
        for file, size in sizes.items():
            name = file.partition("/")[0]
            self._sizes[name] = self._sizes.get(name, 0) + size
        self._total = sum(self._sizes.values())
        self._read: set[str] = set()

    def begin(self, name: str) -> None:
        """Report that a component is about to be read."""
        done = sum(self._sizes.get(other, 0) for other in self._read)
        self._on_progress(share(done, self._total), f"{name}, {amount(done, self._total)}")
        self._read.add(name)
