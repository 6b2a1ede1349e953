"""Downloads a model's files from the hub to its cache."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, RepoFile, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from stepweave.errors import LoadError
from stepweave.loading.components import (
    INDEX,
    SAFELY,
    absent_components,
    components_of,
    pipeline_class,
    read_index,
)
from stepweave.loading.files import files_of
from stepweave.loading.kinds import check_served
from stepweave.loading.modular import MODULAR_INDEX, ModularIndex
from stepweave.loading.places import Source, sources_of
from stepweave.loading.progress import OnProgress, amount, downloading, share
from stepweave.loading.variants import choose_variant, files_read
from stepweave.reasons import reason_of

logger = logging.getLogger(__name__)


def fetch(
    repository: str,
    revision: str | None,
    wanted: str | None,
    given: Collection[str] = (),
    on_progress: OnProgress = lambda stage, done, message: None,
) -> tuple[Path, str | None]:
    """Download a pipeline's files. Returns their directory, and the variant of the weights or None.

    If the hub cannot be reached, its cache is used. Raises LoadError; before the weights are
    downloaded, if the pipeline, called with the `given` arguments, cannot be served.
    """
    try:
        snapshot = _index(repository, revision).parent
        index = read_index(snapshot)
        check_served(pipeline_class(index), given)
        files = _listed(repository, revision)
        known = {name: file.size for name, file in files.items()} or files_of(snapshot)
        if isinstance(index, ModularIndex):
            sources = {
                name: source if source.repository else replace(source, repository=repository)
                for name, source in sources_of(index, known, revision).items()
            }
            return snapshot, _fetch_parts(index, sources, known, wanted, on_progress)
        variant = choose_variant(index, known, wanted)
        names = [component.name for component in components_of(index)]
        sizes = files_read(known, names, variant)
        with _told(repository, files, sizes, on_progress):
            folder = DiffusionPipeline.download(
                repository, revision=revision, variant=variant, **absent_components(index), **SAFELY
            )
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(_explained(error, revision)) from error
    return Path(folder), variant


def fetch_parts(
    folder: Path,
    index: dict[str, Any],
    wanted: str | None,
    on_progress: OnProgress = lambda stage, done, message: None,
) -> str | None:
    """Download the components that a modular pipeline in a directory takes from repositories of the
    hub. Returns the variant of the weights, of any pipeline. Raises LoadError."""
    files = files_of(folder)
    if not isinstance(index, ModularIndex):
        return choose_variant(index, files, wanted)
    return _fetch_parts(index, sources_of(index, files), files, wanted, on_progress)


def _fetch_parts(
    index: ModularIndex,
    sources: Mapping[str, Source],
    files: Mapping[str, int],
    wanted: str | None,
    on_progress: OnProgress,
) -> str | None:
    """Download the components' files from their sources, except those of a directory, which has
    these `files`. Returns the variant of the weights."""
    places = {source.place for source in sources.values() if source.repository is not None}
    listed = {place: _listed(*place) for place in places}
    known: dict[str, int] = {}
    for name, source in sources.items():
        there = files
        if source.repository is not None:
            there = {path: file.size for path, file in listed[source.place].items()}
            if not there:
                there = _cached(source)
        known |= {f"{name}/{file}": there[path] for path, file in source.files(there).items()}
    variant = choose_variant(index, known, wanted)
    needed = files_read(known, list(sources), variant)
    for place, entries in listed.items():
        repository, revision = place
        paths = {
            path: needed[f"{name}/{file}"]
            for name, source in sources.items()
            for path, file in source.files(entries).items()
            if source.place == place and f"{name}/{file}" in needed
        }
        if paths:  # else they cannot be listed: the cache must do
            with _told(repository, entries, paths, on_progress), explained(*place):
                snapshot_download(repository, revision=revision, allow_patterns=list(paths))
    return variant


def _cached(source: Source) -> dict[str, int]:
    """The files of a component's repository in the cache. Raises LoadError if it is not there."""
    if not source.cached().is_dir():
        with explained(source.repository, source.revision):
            snapshot_download(str(source.repository), revision=source.revision, allow_patterns=[])
    return files_of(source.cached())


@contextlib.contextmanager
def explained(repository: str | None, revision: str | None) -> Iterator[None]:
    """Within the block, which downloads components, turn errors of the hub into LoadError that
    names the repository and the commit."""
    try:
        yield
    except Exception as error:
        why = _explained(error, revision, "the revision ")
        raise LoadError(f"{repository}, which holds components: {why}") from error


def _index(repository: str, revision: str | None) -> Path:
    """The file that names the components: that of a usual pipeline if there is one."""
    try:
        return Path(hf_hub_download(repository, INDEX, revision=revision))
    except (RemoteEntryNotFoundError, LocalEntryNotFoundError) as error:
        with contextlib.suppress(RemoteEntryNotFoundError, LocalEntryNotFoundError):
            return Path(hf_hub_download(repository, MODULAR_INDEX, revision=revision))
        raise error from None


def _listed(repository: str, revision: str | None) -> dict[str, RepoFile]:
    """The files of a repository by name; none if the hub does not say."""
    try:
        listed = HfApi().list_repo_tree(repository, revision=revision, recursive=True)
        return {file.path: file for file in listed if isinstance(file, RepoFile)}
    except Exception as error:
        logger.info(
            "the files of %s cannot be listed (%s); using those in the cache",
            repository,
            reason_of(error),
        )
        return {}


@contextlib.contextmanager
def _told(
    repository: str,
    files: Mapping[str, RepoFile],
    sizes: Mapping[str, int],
    on_progress: OnProgress,
) -> Iterator[None]:
    """Within the block, which downloads files of these sizes, report the progress."""

    def on_bytes(done: int, total: int) -> None:
        on_progress("downloading", share(done, total), f"{repository}, {amount(done, total)}")

    folder = repo_folder_name(repo_id=repository, repo_type="model")
    blobs = Path(huggingface_hub.constants.HF_HUB_CACHE) / folder / "blobs"
    with downloading(blobs, _contents(files, sizes), on_bytes):
        yield


def _contents(files: Mapping[str, RepoFile], sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes by the names that contents have in the cache: SHA-256 of large files, else git's id."""
    listed = ((files[name], size) for name, size in sizes.items() if name in files)
    return {file.lfs.sha256 if file.lfs else file.blob_id: size for file, size in listed}


def _explained(
    error: BaseException, revision: str | None, name: str = "STEPWEAVE_REVISION="
) -> str:
    if isinstance(error, GatedRepoError):  # a RepositoryNotFoundError, too
        return "its repository is gated: accept its terms on the hub, and set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such repository, or none that HF_TOKEN may read"
    if isinstance(error, RevisionNotFoundError):
        return f"its repository has no commit {name}{revision!r}"
    if isinstance(error, RemoteEntryNotFoundError):
        return f"its repository has no {INDEX}: it is not that of a diffusers pipeline"
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return (
            "the hub cannot be reached, and its cache does not hold the model at "
            f"{name.rstrip(' =')}: see HF_HUB_OFFLINE, HF_ENDPOINT and HF_HOME"
        )
    return f"it cannot be downloaded from the hub: {reason_of(error)}"
