"""CLIP's tokenizer from the vocabulary in this package, for models in a single file.

`configs/merges.txt` is OpenAI's (MIT, `configs/LICENSE`); `tools/clip_merges.py` makes it. The
vocabulary follows from it, as in `SimpleTokenizer` of github.com/openai/CLIP: the bytes, the bytes
at the end of a word, what each merge makes, and two special tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

MERGES = Path(__file__).parent / "configs" / "merges.txt"
_END = "</w>"  # of a word
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
# bytes that stand for themselves; others stand for characters from 256 on
_PRINTABLE = (range(ord("!"), ord("~") + 1), range(0xA1, 0xAC + 1), range(0xAE, 0xFF + 1))


def clip_tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer with the `tokenizer_config.json` of a folder."""
    config = json.loads((folder / "tokenizer_config.json").read_bytes())
    merges = merges_of(MERGES.read_text(encoding="utf-8"))
    return CLIPTokenizer(vocab=vocabulary(merges), merges=merges, **config)


def merges_of(text: str) -> list[tuple[str, str]]:
    """The merges of a `merges.txt`, in order."""
    pairs = (line.split(" ") for line in text.rstrip("\n").split("\n")[1:])  # without the version
    return [(first, second) for first, second in pairs]


def vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """The tokens and their numbers."""
    plain = [chr(code) for codes in _PRINTABLE for code in codes]
    symbols = [*plain, *(chr(256 + index) for index in range(256 - len(plain)))]
    made = [first + second for first, second in merges]
    tokens = [*symbols, *(symbol + _END for symbol in symbols), *made, *_SPECIAL]
    return {token: number for number, token in enumerate(tokens)}
