"""The files of LoRAs: which there are, by the names of their adapters, and which have changed."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import stat
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from stepweave.config.components import NAME
from stepweave.errors import LoadError, shown

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
_USUAL = "pytorch_lora_weights.safetensors"  # as diffusers saves one
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)
_OTHERS = (SUFFIX, ".ckpt", ".pt", ".pth", ".bin")  # in which LoRAs may be, too


class LoraFile(NamedTuple):
    """A file, and what tells it from one that was there before. `problem` is why it cannot be
    looked at now."""

    path: Path
    inode: int
    size: int  # bytes
    changed: int  # nanoseconds
    problem: str = ""

    def same(self, other: LoraFile) -> bool:
        """Whether the other is this file as it is, as far as is known."""
        return self._replace(problem="") == other._replace(problem="")

    @classmethod
    def of(cls, path: Path) -> LoraFile:
        """Raises OSError, also for what is no regular file: who opens a pipe waits."""
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        return cls(path, found.st_ino, found.st_size, found.st_mtime_ns)


class LoraDirectory:
    """Each safetensors file in a directory, and each folder with one, and other `files` by name.

    What cannot be looked at for a moment, as on a network volume, is not thereby gone. Raises
    LoadError for a directory that does not exist.
    """

    def __init__(self, directory: Path | None, files: Mapping[str, Path]) -> None:
        if directory is not None and (why := why_no_directory(directory)):
            raise LoadError(why)
        self._directory = directory
        self._others = dict(files)
        self._told: set[str] = set()
        self._looking = threading.Lock()  # so that none stores what was there before another's look
        self.found: dict[str, LoraFile] = {}  # by the last look
        self.look()

    def look(self) -> dict[str, LoraFile]:
        """Read the directory again, and return what there is."""
        with self._looking:
            found: dict[str, LoraFile] = {}
            for name, path in (*self._others.items(), *self._paths()):
                file = None if name in found else self._file(name, path)
                if file is not None:
                    found[name] = file
            self.found = found
            return found

    def _paths(self) -> list[tuple[str, Path]]:
        """Names and files of the directory; those of the last look if it cannot be read now."""
        if self._directory is None:
            return []
        try:
            with os.scandir(self._directory) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            self._tell("", f"the directory of LoRAs cannot be read: {error.strerror}")
            return [(name, file.path) for name, file in self.found.items()]
        self._told.discard("")
        return list(self._named(listed))

    def _named(self, entries: list[os.DirEntry[str]]) -> Iterator[tuple[str, Path]]:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = Path(entry.path)
            try:
                name, file = (entry.name, _within(path)) if entry.is_dir() else (path.stem, path)
            except OSError as error:
                name = path.stem if path.suffix == SUFFIX else entry.name
                if name in self.found:
                    yield name, self.found[name].path
                self._tell(entry.name, f"{shown(entry.name)}: {error.strerror}")
                continue
            if file is None:
                self._ignore(entry.name, f"a folder is a LoRA if it has one {SUFFIX} file")
            elif file.suffix != SUFFIX:
                if file.suffix.lower() in _OTHERS:
                    self._ignore(entry.name, f"LoRAs are {SUFFIX} files")
            elif NAME.fullmatch(name) is None:
                self._ignore(entry.name, "use 1 to 64 letters, digits and ._- in an adapter's name")
            else:
                yield name, file

    def _file(self, name: str, path: Path) -> LoraFile | None:
        """A file as it is now, or was if it cannot be looked at; None if there is none."""
        try:
            return LoraFile.of(path)
        except OSError as error:
            if error.errno in _GONE:
                return None
            problem, known = error.strerror or type(error).__name__, self.found.get(name)
            self._tell(name, f"{shown(path.name)}: {problem}")
            return None if known is None else known._replace(problem=problem)

    def _ignore(self, name: str, reason: str) -> None:
        self._tell(name, f"{shown(name)} is ignored: {reason}")

    def _tell(self, name: str, message: str) -> None:
        """Log a message once for a name."""
        if name not in self._told:
            self._told.add(name)
            logger.warning("%s", message)


def why_no_directory(directory: Path) -> str | None:
    """What is wrong with what is no directory of LoRAs; None if it is one."""
    if directory.is_dir():
        return None
    hint = ""
    if directory.is_file():
        hint = ": it is a file; name the directory that it is in"
    elif "/" in str(directory) and not directory.is_absolute():
        hint = "; an id of the hub needs its commit: OWNER/NAME@COMMIT"
    return f"{shown(str(directory))} is no directory{hint}"


def _within(folder: Path) -> Path | None:
    """The file of a folder: its only one, or that which diffusers saves. Raises OSError."""
    with os.scandir(folder) as entries:
        files = sorted(entry.name for entry in entries if entry.name.endswith(SUFFIX))
    if _USUAL in files:
        return folder / _USUAL
    return folder / files[0] if len(files) == 1 else None


def digest(file: Path) -> bytes:
    """Of a file's content. Raises LoadError."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "blake2b").digest()
    except OSError as error:
        raise LoadError(f"{file.name}: {error.strerror}") from error
