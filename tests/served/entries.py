"""Which entries of tests/pipelines are served, and which are not, by name, with the reason."""

from __future__ import annotations

from tests.pipelines.catalog import entries
from tests.pipelines.registry import Entry

# modules whose pipelines make no images
NOT_IMAGES = {
    "unets_video": "it makes videos",
    "video": "it makes videos",
    "video_ltx2": "it makes videos",
    "video_more": "it makes videos",
    "audio": "it makes sound",
}
_REASONS: dict[str, tuple[str, ...]] = {
    "it makes sound": ("dance_diffusion",),
    "its results are embeddings": (
        "flux_prior_redux",
        "kandinsky_prior",
        "kandinsky_v22_prior",
        "kandinsky_v22_prior_emb2emb",
        "stable_cascade_prior",
        "stable_cascade_prior_images",
        "wuerstchen_prior_stage",
    ),
}
# served without a warm-up: the tiny model lacks what makes a tensor that its requests have
UNWARMED = ("glm_image",)
NOT_SERVED = {name: reason for reason, names in _REASONS.items() for name in names}


def excluded() -> dict[str, str]:
    """Why an entry is not asked, by name."""
    return {
        name: reason
        for name, entry in entries().items()
        if (reason := NOT_SERVED.get(name) or NOT_IMAGES.get(entry.module))
    }


def served() -> dict[str, Entry]:
    """The entries that are asked, by name."""
    others = excluded()
    return {name: entry for name, entry in entries().items() if name not in others}
