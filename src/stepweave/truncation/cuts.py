"""What tokenizers leave out of texts that are too long for them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

_Side = Literal["left", "right"]


@dataclass(frozen=True)
class Cut:
    """A text that a tokenizer did not read to its end (with `side` left: from its beginning)."""

    text: str  # as the tokenizer was given it
    index: int  # of the text among those of the call
    count: int  # texts of the call
    side: _Side  # where the part that was left out stood
    # characters of the text before the cut; None where the tokenizer does not tell
    position: int | None
    left_out: str  # as tokens read where the position is None
    tokens: int  # that the tokenizer gave, special ones included
    tokenizer: str  # its name in the pipeline


def cuts_of(
    tokenizer: Any, name: str, output: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> Iterator[Cut]:
    """The cuts that a tokenizer's call made; `output` is what it returned.

    A fast tokenizer keeps what it cut off beside each encoding, so that nothing is tokenized again.
    A slow one tokenizes the texts that filled its limit once more. Not seen are pairs of texts
    given to a slow tokenizer.
    """
    encodings = getattr(output, "encodings", None)
    if encodings is not None and not any(encoding.overflowing for encoding in encodings):
        return
    given = given_to(tokenizer, args, kwargs)
    if given.get("return_overflowing_tokens"):  # then the caller has all of the text
        return
    texts = texts_of(given)
    side: _Side = "left" if tokenizer.truncation_side == "left" else "right"
    for index, pair in enumerate(texts):
        found = (
            _slow(tokenizer, pair, side, given)
            if encodings is None
            else _fast(encodings[index], pair, side)
        )
        for text, position, left_out, tokens in found:
            yield Cut(text, index, len(texts), side, position, left_out, tokens, name)


_SIGNATURE = inspect.signature(PreTrainedTokenizerBase.__call__)
_Found = Iterator[tuple[str, int | None, str, int]]


def given_to(tokenizer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a tokenizer's call by name."""
    return _SIGNATURE.bind(tokenizer, *args, **kwargs).arguments


def texts_of(given: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """The texts of a tokenizer's call, each with the one it is paired with, or None."""
    text: Any = given.get("text")
    other: Any = given.get("text_pair")
    in_words = given.get("is_split_into_words", False)
    listed = text[0] if in_words and text else text
    if not isinstance(listed, (list, tuple)):
        return [(text, other)]
    if other is not None:
        return list(zip(text, other, strict=True))
    return [one if isinstance(one, tuple) and not in_words else (one, None) for one in text]


def _fast(encoding: Any, pair: tuple[Any, Any], side: _Side) -> _Found:
    parts = encoding.overflowing
    if not parts:
        return
    for sequence, given in enumerate(pair):
        if given is None:
            continue
        words = [given] if isinstance(given, str) else list(given)
        text = " ".join(words)
        starts = [0]
        if not isinstance(given, str):  # offsets count from the beginning of the word
            for word in words:
                starts.append(starts[-1] + len(word) + 1)
        kept = _spans(encoding, sequence, starts)
        gone = [span for part in parts for span in _spans(part, sequence, starts)]
        tokens = sum(encoding.attention_mask)
        # several tokens may make one character, and the cut go through it; of a pair, what was not
        # cut stands in each part again
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
    """Where the tokens of one of a pair's texts stand in it."""
    rows = zip(encoding.offsets, encoding.sequence_ids, encoding.word_ids, strict=True)
    split = len(starts) > 1
    shifted = (
        (starts[word] if split and word is not None else 0, span)
        for span, own, word in rows
        if own == sequence
    )
    return [(shift + start, shift + stop) for shift, (start, stop) in shifted if stop > start]


def _slow(tokenizer: Any, pair: tuple[Any, Any], side: _Side, given: dict[str, Any]) -> _Found:
    text, other = pair
    if (
        given.get("truncation") in (None, False, "do_not_truncate")
        or other is not None
        or not isinstance(text, str)
    ):
        return
    limit = given.get("max_length") or tokenizer.model_max_length
    special = tokenizer.num_special_tokens_to_add() if given.get("add_special_tokens", True) else 0
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    keep = max(limit - special, 0)
    if len(ids) <= keep:
        return
    left_out = tokenizer.decode(ids[: len(ids) - keep] if side == "left" else ids[keep:])
    position = None
    # where tokens read as the text does, as bytes do, they tell the place
    if left_out and side == "right" and text.endswith(left_out):
        position = len(text) - len(left_out)
    elif left_out and side == "left" and text.startswith(left_out):
        position = len(left_out)
    yield text, position, left_out, limit
