"""Downloads a model's files from the hub to its cache."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, hf_hub_download
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
    pipeline_class,
    read_index,
)
from stepweave.loading.files import files_of
from stepweave.loading.kinds import check_served
from stepweave.loading.variants import choose_variant
from stepweave.reasons import reason_of

logger = logging.getLogger(__name__)


def fetch(
    repository: str, revision: str | None, wanted: str | None, given: Collection[str] = ()
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
            files = HfApi().list_repo_files(repository, revision=revision)
        except Exception as error:
            logger.info(
                "the files of %s cannot be listed (%s); using those in the cache",
                repository,
                reason_of(error),
            )
            files = list(files_of(snapshot))
        variant = choose_variant(index, files, wanted)
        folder = DiffusionPipeline.download(
            repository, revision=revision, variant=variant, **absent_components(index), **SAFELY
        )
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(_explained(error, revision)) from error
    return Path(folder), variant


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
