"""Finds the parts of long texts that tokenizers cut off."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

_Side = Literal["left", "right"]


@dataclass(frozen=True)
class Cut:
    """A text that a tokenizer has truncated."""

    text: str  # as passed to the tokenizer
    index: int  # of the text in the call
    count: int  # texts of the call
    side: _Side  # of the text that was cut off
    position: int | None  # characters before the cut; None if the tokenizer does not report it
    left_out: str  # decoded from tokens if the position is None
    tokens: int  # of the result, with special ones
    tokenizer: str  # its name in the pipeline


def cuts_of(
    tokenizer: Any, name: str, output: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> Iterator[Cut]:
    """Yield the cuts of a tokenizer's call, which returned `output`.

    A fast tokenizer keeps the tokens that it cut off with each encoding. A slow one must tokenize
    its texts again; pairs of texts are not supported there.
    """
    encodings = getattr(output, "encodings", None)
    if encodings is not None and not any(encoding.overflowing for encoding in encodings):
        return
    arguments = arguments_of_call(tokenizer, args, kwargs)
    if arguments.get("return_overflowing_tokens"):  # then the caller gets the whole text
        return
    texts = texts_of(arguments)
    side: _Side = "left" if tokenizer.truncation_side == "left" else "right"
    for index, pair in enumerate(texts):
        if encodings is None:
            cuts = _slow(tokenizer, pair, side, arguments)
        else:
            cuts = _fast(encodings[index], pair, side)
        for text, position, left_out, tokens in cuts:
            yield Cut(text, index, len(texts), side, position, left_out, tokens, name)


_SIGNATURE = inspect.signature(PreTrainedTokenizerBase.__call__)
_Cuts = Iterator[tuple[str, int | None, str, int]]  # text, position, left out, tokens


def arguments_of_call(
    tokenizer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a tokenizer's call by name."""
    return _SIGNATURE.bind(tokenizer, *args, **kwargs).arguments


def texts_of(arguments: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """The texts of a tokenizer's call, each with its paired text, or None."""
    text: Any = arguments.get("text")
    other: Any = arguments.get("text_pair")
    in_words = arguments.get("is_split_into_words", False)
    listed = text[0] if in_words and text else text
    if not isinstance(listed, (list, tuple)):
        return [(text, other)]
    if other is not None:
        return list(zip(text, other, strict=True))
    return [item if isinstance(item, tuple) and not in_words else (item, None) for item in text]


def _fast(encoding: Any, pair: tuple[Any, Any], side: _Side) -> _Cuts:
    parts = encoding.overflowing
    if not parts:
        return
    for sequence, words in enumerate(pair):
        if words is None:
            continue
        split = not isinstance(words, str)
        text = " ".join(words) if split else words
        # of the words, from whose beginnings offsets count
        starts = [0, *itertools.accumulate(len(word) + 1 for word in words)] if split else [0]
        kept = _spans(encoding, sequence, starts)
        gone = [span for part in parts for span in _spans(part, sequence, starts)]
        tokens = sum(encoding.attention_mask)
        # the cut may divide a character of several tokens; of a pair, the text that was not cut is
        # repeated in each part
        alone = pair[1] is None
        if side == "right":
            last = max((stop for _, stop in kept), default=0)
            beyond = [start for start, stop in gone if stop > last or (alone and stop == last)]
            if beyond:
                position = min(last, *beyond)
                yield text, position, text[position:], tokens
        else:
            first = min((start for start, _ in kept), default=len(text))
            beyond = [stop for start, stop in gone if start < first or (alone and start == first)]
            if beyond:
                position = max(first, *beyond)
                yield text, position, text[:position], tokens


def _spans(encoding: Any, sequence: int, starts: list[int]) -> list[tuple[int, int]]:
    """The positions of tokens in one of a pair's texts, by `starts` of its words."""
    rows = zip(encoding.offsets, encoding.sequence_ids, encoding.word_ids, strict=True)
    split = len(starts) > 1
    shifted = (
        (starts[word] if split and word is not None else 0, span)
        for span, own, word in rows
        if own == sequence
    )
    return [(shift + start, shift + stop) for shift, (start, stop) in shifted if stop > start]


def _slow(tokenizer: Any, pair: tuple[Any, Any], side: _Side, arguments: dict[str, Any]) -> _Cuts:
    text, other = pair
    truncates = arguments.get("truncation") not in (None, False, "do_not_truncate")
    if not truncates or other is not None or not isinstance(text, str):
        return
    limit = arguments.get("max_length") or tokenizer.model_max_length
    adds_special = arguments.get("add_special_tokens", True)
    special = tokenizer.num_special_tokens_to_add() if adds_special else 0
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    keep = max(limit - special, 0)
    if len(ids) <= keep:
        return
    left_out = tokenizer.decode(ids[: len(ids) - keep] if side == "left" else ids[keep:])
    position = None
    # if the decoded tokens are a part of the text, its position is known
    if left_out and side == "right" and text.endswith(left_out):
        position = len(text) - len(left_out)
    elif left_out and side == "left" and text.startswith(left_out):
        position = len(left_out)
    yield text, position, left_out, limit
