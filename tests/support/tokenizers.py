"""A tokenizer of each kind that pipelines use."""

from __future__ import annotations

from typing import Any

import transformers

from tests.support.tiny import clip, qwen


def t5() -> Any:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *map(chr, range(ord("!"), ord("~") + 1))]
    return transformers.T5Tokenizer(vocab=[(piece, -2.0) for piece in pieces], extra_ids=0)


MAKERS = {
    "clip": lambda: clip()["tokenizer"],
    "qwen": lambda: qwen()["tokenizer"],
    "t5": t5,
    "byt5": transformers.ByT5Tokenizer,
}
