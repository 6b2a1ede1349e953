"""How many tokens tokenizers read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepweave.truncation.cuts import given_to, texts_of


@dataclass(frozen=True)
class Reading:
    """A text that a tokenizer read."""

    text: str  # as the tokenizer was given it; of anything but a string, its representation
    index: int  # of the text among those of the call
    count: int  # texts of the call
    tokens: int  # special ones included, padding and what was cut off not
    tokenizer: str  # its name in the pipeline


def readings_of(
    tokenizer: Any,
    name: str,
    method: str,
    output: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Iterator[Reading]:
    """The texts that a tokenizer's call read; `output` is what its `method` returned, nothing if
    that is text."""
    rows = _tokens(tokenizer, output)
    if not rows:
        return
    if method == "__call__":
        texts = [_text(pair) for pair in texts_of(given_to(tokenizer, args, kwargs))]
    else:  # of one text, or of a conversation
        texts = [repr(args[0] if args else kwargs.get("text", kwargs.get("conversation")))]
    if len(texts) != len(rows):  # a long text may be several rows
        texts, rows = [repr(texts)], [sum(rows)]
    for index, (text, tokens) in enumerate(zip(texts, rows, strict=True)):
        yield Reading(text, index, len(texts), tokens, name)


def _text(pair: tuple[Any, Any]) -> str:
    text, other = pair
    return text if isinstance(text, str) and other is None else repr(pair)


def _tokens(tokenizer: Any, output: Any) -> list[int]:
    """The number of tokens of each row of an output, without padding."""
    encodings = getattr(output, "encodings", None)
    if encodings:
        return [sum(encoding.attention_mask) for encoding in encodings]
    known = output if isinstance(output, Mapping) else {"input_ids": output}
    mask = _rows(known.get("attention_mask"))
    if mask:
        return [sum(row) for row in mask]
    return [
        _unpadded(row, tokenizer.pad_token_id, tokenizer.eos_token_id)
        for row in _rows(known.get("input_ids"))
    ]


def _rows(values: Any) -> list[list[int]]:
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list) or not values or isinstance(values[0], str):
        return []
    return values if isinstance(values[0], list) else [values]


def _unpadded(row: list[int], padding: int | None, end: int | None) -> int:
    """The length of a row less the padding at its ends; where the end's own token pads, one of them
    is the end."""
    first, last = 0, len(row)
    while last > first and row[last - 1] == padding:
        last -= 1
    if padding == end and last < len(row):
        last += 1
    while first < last and row[first] == padding:
        first += 1
    return last - first
