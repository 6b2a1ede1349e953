"""Another autoencoder for a model: for all requests, or for those that name it."""

from __future__ import annotations

from typing import Any

from stepweave.config.components import VAE
from stepweave.errors import LoadError


def fit_in(pipeline: Any, model: Any) -> None:
    """Prepare an autoencoder to take the place of a pipeline's own: it tiles and slices images if
    that one does. Raises LoadError if it has another kind of latents."""
    own = getattr(pipeline, VAE, None)
    if own is None:
        raise LoadError(f"{type(pipeline).__name__} has no autoencoder that it could replace")
    if type(own) is not type(model):
        kind, wanted = type(model).__name__, type(own).__name__
        raise LoadError(f"it is an {kind}, and the model's autoencoder an {wanted}")
    for name in ("latent_channels", "in_channels", "out_channels"):
        value, wanted = model.config.get(name), own.config.get(name)
        if value != wanted:
            raise LoadError(f"its {name} is {value}; that of the model's autoencoder is {wanted}")
    levels = [len(one.config.get("block_out_channels", ())) for one in (model, own)]
    if levels[0] != levels[1]:
        raise LoadError(f"it has {levels[0]} levels; the model's autoencoder has {levels[1]}")
    for flag, enable in (("use_tiling", "enable_tiling"), ("use_slicing", "enable_slicing")):
        if getattr(own, flag, False):
            getattr(model, enable)()
