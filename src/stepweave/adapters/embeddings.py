"""Loads textual inversions: files with embeddings of a new word, which prompts then use.

The word (token) is the name of its file without the ending, as in other servers' folders of
embeddings; a name inside the file is ignored. It is found in prompts as it is spelled, in capital
or small letters.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from safetensors.torch import load_file
from transformers import AddedToken, CLIPTextModel, CLIPTextModelWithProjection

from stepweave.config.settings import SAFETENSORS
from stepweave.errors import LoadError, shown
from stepweave.loading.checkpoint import read_header
from stepweave.loading.reading import listed
from stepweave.reasons import reason_of

logger = logging.getLogger(__name__)

SETTING = "STEPWEAVE_EMBEDDINGS"
MOST_VECTORS = 75  # CLIP reads 77 tokens, two of which are special
_CLIP = (CLIPTextModel, CLIPTextModelWithProjection)
_ENCODERS = (("text_encoder", "tokenizer", "clip_l"), ("text_encoder_2", "tokenizer_2", "clip_g"))
_OTHER = ("text_encoder_3", "text_encoder_4")
_TOKEN = re.compile(r"[^\s,()\[\]:|]{1,100}")
_WORD_END = "</w>"
_OLD_END = 2


@dataclass(frozen=True)
class Embedding:
    """A textual inversion: its token in prompts, and how many tokens of the text encoder it is."""

    token: str
    vectors: int


@dataclass(frozen=True)
class _Encoder:
    """A text encoder with its tokenizer, and the name of its tensor in files for two encoders."""

    model: Any
    tokenizer: Any
    key: str

    @property
    def width(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[-1])


def load_embeddings(pipeline: Any, folder: str | None) -> tuple[Embedding, ...]:
    """Add the textual inversions in a directory to a pipeline's tokenizers and text encoders, in
    the order of their names. Raises LoadError, naming the file, for one that cannot be used, and
    for a pipeline that takes none."""
    if folder is None:
        return ()
    place = Path(folder).expanduser()
    try:
        files = [file for file in sorted(place.iterdir()) if _is_one(file)]
        encoders = _encoders(pipeline)
        vectors: dict[str, list[torch.Tensor]] = {}
        for file in files:
            _check_token(file.stem, encoders)
            vectors[file.stem] = _vectors(file, encoders)
        embeddings = tuple(Embedding(token, len(own[0])) for token, own in vectors.items())
        _check_apart(embeddings)
    except OSError as error:
        raise LoadError(f"{SETTING}: {reason_of(error, place)}") from None
    except LoadError as error:
        raise LoadError(f"{SETTING}: {error.message}") from None
    if not embeddings:
        logger.warning("%s=%s has no %s files", SETTING, shown(folder), SAFETENSORS)
        return ()
    for number, encoder in enumerate(encoders):
        _add(encoder, {token: own[number] for token, own in vectors.items()})
    listed_ = ", ".join(f"{one.token} ({one.vectors})" for one in embeddings)
    logger.info("textual inversions, with their numbers of vectors: %s", listed_)
    return embeddings


def _add(encoder: _Encoder, vectors: Mapping[str, torch.Tensor]) -> None:
    """As `load_textual_inversion`, whose tokens are found in any case of letters, but of whose
    further vectors none is used if the name has a capital letter: CLIP's tokenizer makes it small,
    and diffusers then does not know it again. Here, tokens are found as they are spelled."""
    rows = {
        name: row
        for token, own in vectors.items()
        for name, row in zip(_names(token, len(own)), own, strict=True)
    }
    encoder.tokenizer.add_tokens([AddedToken(name, normalized=False) for name in rows])
    encoder.model.resize_token_embeddings(len(encoder.tokenizer), mean_resizing=False)
    table = encoder.model.get_input_embeddings().weight.data
    for name, row in rows.items():
        table[encoder.tokenizer.convert_tokens_to_ids(name)] = row.to(table)
    _end_where_the_prompt_ends(encoder)


def _names(token: str, vectors: int) -> list[str]:
    """The tokens of each vector, as diffusers replaces the first by all of them in prompts."""
    return [token, *(f"{token}_{number}" for number in range(1, vectors))]


def _end_where_the_prompt_ends(encoder: _Encoder) -> None:
    """Old configurations of CLIP (end token 2) take the token of the highest number for a prompt's
    end, which would be a textual inversion now. Without one, the result is the same."""
    model = getattr(encoder.model, "text_model", encoder.model)
    if model.eos_token_id == _OLD_END:
        model.eos_token_id = encoder.tokenizer.eos_token_id


def _is_one(file: Path) -> bool:
    if file.name.startswith(".") or not file.is_file():
        return False
    if file.suffix in (".pt", ".bin", ".ckpt", ".pth"):
        raise LoadError(
            f"{file.name} is not a {SAFETENSORS} file, the only kind that is read (pickles can run "
            "code)"
        )
    return file.suffix == SAFETENSORS


def _encoders(pipeline: Any) -> list[_Encoder]:
    kind = type(pipeline).__name__
    if not isinstance(pipeline, TextualInversionLoaderMixin):
        raise LoadError(f"{kind} has no textual inversions")
    encoders = []
    for name, tokenizer, key in _ENCODERS:
        model = getattr(pipeline, name, None)
        if model is None:
            continue
        if not isinstance(model, _CLIP):
            raise LoadError(
                f"textual inversions are for pipelines whose text encoders are all "
                f"CLIP's; {name} of {kind} is {type(model).__name__}"
            )
        if hasattr(model, "_hf_hook"):
            raise LoadError(f"{name} of {kind} is offloaded already; load them before that")
        encoders.append(_Encoder(model, getattr(pipeline, tokenizer), key))
    if not encoders or any(getattr(pipeline, name, None) is not None for name in _OTHER):
        raise LoadError(f"{kind} has other text encoders than textual inversions need")
    return encoders


def _check_token(token: str, encoders: Sequence[_Encoder]) -> None:
    if not _TOKEN.fullmatch(token):
        raise LoadError(
            f"{token}{SAFETENSORS}: the file's name is the token in prompts, of 1 to 100 "
            "characters without spaces, commas, brackets, colons and bars; rename it"
        )
    for encoder in encoders:
        words = encoder.tokenizer.get_vocab()
        taken = {word.lower() for word in encoder.tokenizer.added_tokens_encoder}
        low = token.lower()
        if low in taken or not words.keys().isdisjoint((token, low, low + _WORD_END)):
            raise LoadError(
                f"{token}{SAFETENSORS}: the tokenizer has the token {shown(token)} already; "
                "rename the file"
            )


def _check_apart(embeddings: Sequence[Embedding]) -> None:
    """Raise LoadError for tokens that prompts could not tell apart. One of several vectors, `a`,
    is `a a_1 a_2` for the tokenizer, by which diffusers replaces each `a` in a prompt."""
    for one in embeddings:
        for other in embeddings:
            if one is not other and one.vectors > 1 and one.token in other.token:
                raise LoadError(
                    f"the tokens {shown(one.token)} and {shown(other.token)} cannot be told apart: "
                    "one is a part of the other; rename a file"
                )


def _vectors(file: Path, encoders: Sequence[_Encoder]) -> list[torch.Tensor]:
    """The vectors of a file for each encoder, (number, width). Raises LoadError."""
    shapes, _ = read_header(file)
    names, keys = sorted(shapes), [encoder.key for encoder in encoders]
    if len(encoders) == 1 and len(names) == 1:
        keys = names  # such as emb_params, or the token
    elif names != sorted(keys):
        wanted = "one tensor" if len(keys) == 1 else f"the tensors {' and '.join(keys)}"
        raise LoadError(
            f"{file.name} has the tensors {listed(names)}; a textual inversion "
            f"for this model has {wanted}"
        )
    tensors: Mapping[str, torch.Tensor] = load_file(file)
    vectors = [tensors[key][None] if tensors[key].ndim == 1 else tensors[key] for key in keys]
    numbers = {len(tensor) for tensor in vectors}
    for tensor, encoder in zip(vectors, encoders, strict=True):
        shape = tuple(tensor.shape)
        if len(shape) != 2 or shape[1] != encoder.width or not tensor.is_floating_point():
            raise LoadError(
                f"{file.name} has vectors of shape {shape} in {tensor.dtype}; the text encoder "
                f"takes numbers of shape (vectors, {encoder.width}), so it is for another model"
            )
        if not math.isfinite(float(tensor.double().sum())):
            raise LoadError(f"{file.name} has values that are not finite")
    if len(numbers) > 1 or not 1 <= max(numbers) <= MOST_VECTORS:
        raise LoadError(
            f"{file.name} has {' and '.join(map(str, sorted(numbers)))} vectors; it must be 1 to "
            f"{MOST_VECTORS}, as many for each text encoder"
        )
    return vectors
