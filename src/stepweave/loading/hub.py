"""Downloads a model's files from the hub to its cache."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, RepoFile, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

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
        snapshot = Path(hf_hub_download(repository, INDEX, revision=revision)).parent
        index = read_index(snapshot)
        check_served(pipeline_class(index), given)
        try:
            listed = HfApi().list_repo_tree(repository, revision=revision, recursive=True)
            files = {file.path: file for file in listed if isinstance(file, RepoFile)}
        except Exception as error:
            logger.info(
                "the files of %s cannot be listed (%s); using those in the cache",
                repository,
                reason_of(error),
            )
            files = {}
        known = {name: file.size for name, file in files.items()} or files_of(snapshot)
        variant = choose_variant(index, known, wanted)
        names = [component.name for component in components_of(index)]
        sizes = files_read(known, names, variant)

        def on_bytes(done: int, total: int) -> None:
            message = f"{repository}, {amount(done, total)}"
            on_progress("downloading", share(done, total), message)

        with downloading(snapshot.parents[1] / "blobs", _contents(files, sizes), on_bytes):
            folder = DiffusionPipeline.download(
                repository, revision=revision, variant=variant, **absent_components(index), **SAFELY
            )
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(_explained(error, revision)) from error
    return Path(folder), variant


def _contents(files: Mapping[str, RepoFile], sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes by the names that contents have in the cache: SHA-256 of large files, else git's id."""
    listed = ((files[name], size) for name, size in sizes.items() if name in files)
    return {file.lfs.sha256 if file.lfs else file.blob_id: size for file, size in listed}


def _explained(error: BaseException, revision: str | None) -> str:
    if isinstance(error, GatedRepoError):  # a RepositoryNotFoundError, too
        return "its repository is gated: accept its terms on the hub, and set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such repository, or none that HF_TOKEN may read"
    if isinstance(error, RevisionNotFoundError):
        return f"its repository has no commit STEPWEAVE_REVISION={revision!r}"
    if isinstance(error, RemoteEntryNotFoundError):
        return f"its repository has no {INDEX}: it is not that of a diffusers pipeline"
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return (
            "the hub cannot be reached, and its cache does not hold the model at "
            "STEPWEAVE_REVISION: see HF_HUB_OFFLINE, HF_ENDPOINT and HF_HOME"
        )
    return f"it cannot be downloaded from the hub: {reason_of(error)}"
