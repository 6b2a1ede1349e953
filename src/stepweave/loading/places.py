"""Where the files of a modular pipeline's components are.

Unlike `model_index.json`, `modular_model_index.json` may name another repository for each
component. It must do so with a commit, since what a branch holds changes.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.constants
from huggingface_hub.file_download import repo_folder_name

from stepweave.errors import LoadError, shown
from stepweave.loading.files import files_of
from stepweave.loading.modular import MODULAR_INDEX, ModularIndex

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_FOLDER = re.compile(r"[\w-][\w.-]*")


@dataclass(frozen=True)
class Source:
    """Where the files of a component are: in a `folder` of the model, or of another `repository` at
    a commit; "" for all of that repository."""

    folder: str
    repository: str | None = None
    revision: str | None = None

    @property
    def place(self) -> tuple[str, str | None]:
        """The repository, "" if it is the model's directory, and the commit."""
        return self.repository or "", self.revision

    def files(self, known: Collection[str]) -> dict[str, str]:
        """Those of the `known` files that are in the folder: their names in it by full names."""
        start = f"{self.folder}/" if self.folder else ""
        names = {name: name.removeprefix(start) for name in known if name.startswith(start)}
        return {name: file for name, file in names.items() if "/" not in file}

    def cached(self) -> Path:
        """The directory of the repository at the commit in the hub's cache; it may not exist."""
        name = repo_folder_name(repo_id=self.repository or "", repo_type="model")
        return Path(huggingface_hub.constants.HF_HUB_CACHE, name, "snapshots", self.revision or "")


def sources_of(
    index: ModularIndex, files: Collection[str], own: str | None = None
) -> dict[str, Source]:
    """Where the files of each component are, of a model with these files, by relative name; `own`
    is the commit of its own files.

    Raises LoadError, naming the component, unless its files are the model's own, or those of a
    repository at a commit.
    """
    folders = {file.partition("/")[0] for file in files if "/" in file}
    found = {}
    for name, spec in index.specs.items():
        path, revision = spec["pretrained_model_name_or_path"], spec.get("revision")
        folder = spec.get("subfolder") or ""
        if not isinstance(folder, str) or (folder and not _FOLDER.fullmatch(folder)):
            raise LoadError(f"{MODULAR_INDEX}: {name}: subfolder is {shown(folder)}, not a name")
        if (folder or name) in folders:
            found[name] = Source(folder or name, None, own)
            continue
        pinned = isinstance(revision, str) and _COMMIT.fullmatch(revision)
        if not (pinned and isinstance(path, str) and _REPOSITORY.fullmatch(path)):
            raise LoadError(
                f"{name}/ is missing, and {MODULAR_INDEX} takes {name} from {shown(path)} at the "
                f"revision {shown(revision)}: put its files into {name}/, or name a hub repository "
                "and a commit of 40 hex digits"
            )
        found[name] = Source(folder, path, revision)
    return found


@contextlib.contextmanager
def in_place(folder: Path, index: Mapping[str, Any]) -> Iterator[Path]:
    """Within the block, a directory in which the files of each component are in the folder of its
    name: the model's own, or one of links. What other repositories hold has been downloaded."""
    sources = sources_of(index, files_of(folder)) if isinstance(index, ModularIndex) else {}
    places = {name: _place(folder, source) for name, source in sources.items()}
    if all(place == folder / name for name, place in places.items()):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="stepweave-") as made:
        for file in folder.glob("*.json"):
            (Path(made) / file.name).symlink_to(file.resolve())
        for name, place in places.items():
            (Path(made) / name).symlink_to(place.resolve(), target_is_directory=True)
        yield Path(made)


def _place(folder: Path, source: Source) -> Path:
    if source.repository is None:
        return folder / source.folder
    return source.cached() / source.folder
