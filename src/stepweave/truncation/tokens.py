"""Counts the tokens that tokenizers read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepweave.truncation.cuts import arguments_of_call, texts_of


@dataclass(frozen=True)
class Reading:
    """A text that a tokenizer read."""

    text: str  # as passed to the tokenizer; the `repr` of anything but a string
    index: int  # of the text in the call
    count: int  # texts of the call
    tokens: int  # with special ones, without padding and those cut off
    tokenizer: str  # its name in the pipeline


def readings_of(
    tokenizer: Any,
    name: str,
    method: str,
    output: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Iterator[Reading]:
    """Yield the texts that a tokenizer's call read. `output` is the result of its `method`; if that
    is text, nothing is yielded."""
    rows = _tokens(tokenizer, output)
    if not rows:
        return
    if method == "__call__":
        texts = [_text(pair) for pair in texts_of(arguments_of_call(tokenizer, args, kwargs))]
    else:  # one text, or a conversation
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
    values = output if isinstance(output, Mapping) else {"input_ids": output}
    mask = _rows(values.get("attention_mask"))
    if mask:
        return [sum(row) for row in mask]
    padding, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    return [_unpadded(row, padding, end) for row in _rows(values.get("input_ids"))]


def _rows(values: Any) -> list[list[int]]:
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list) or not values or isinstance(values[0], str):
        return []
    return values if isinstance(values[0], list) else [values]


def _unpadded(row: list[int], padding: int | None, end: int | None) -> int:
    """The length of a row without padding at its ends. If the end token pads, one of them counts as
    the end."""
    first, last = 0, len(row)
    while last > first and row[last - 1] == padding:
        last -= 1
    if padding == end and last < len(row):
        last += 1
    while first < last and row[first] == padding:
        first += 1
    return last - first
