"""Checks that tokenizers have their vocabularies: without one, a tokenizer still loads, but gives
every prompt the same tokens."""

from __future__ import annotations

from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from stepweave.errors import LoadError

PROMPTS = ("a red circle above a blue square", "ocean waves at night, oil painting")
_END = "</w>"  # of a word, in vocabularies as CLIP's
WORDS = 64  # words of its vocabulary that are tried


def check_tokenizers(components: dict[str, Any]) -> list[str]:
    """Check the tokenizers among components, those of processors too, and return their names.
    Raises LoadError for one that gives different prompts the same tokens, or that does not find the
    words of its vocabulary."""
    names = []
    for name, component in components.items():
        own = isinstance(component, PreTrainedTokenizerBase)
        tokenizer = component if own else getattr(component, "tokenizer", None)
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            try:
                problem = _problem(tokenizer)
            except Exception as error:  # such as one without an unknown token
                problem = f"it cannot read a prompt ({type(error).__name__})"
            if problem is not None:
                kind = type(tokenizer).__name__
                raise LoadError(f"{name}/: the vocabulary of {kind} is incomplete: {problem}")
            names.append(name)
    return names


def _problem(tokenizer: Any) -> str | None:
    words = _words(tokenizer)
    spread = words[:: max(1, len(words) // WORDS)][:WORDS]
    found = [(text, tuple(_tokens(tokenizer, text)), number) for text, number in spread]
    lost = [text for text, tokens, number in found if number not in tokens]
    if found and len(lost) == len(found):  # such as without its merges
        return f"it finds none of its own words in a text ({', '.join(map(repr, lost[:3]))}, ...)"
    told_apart = len({tuple(_tokens(tokenizer, text)) for text in PROMPTS}) > 1
    if not told_apart and len({tokens for _, tokens, _ in found}) < 2:
        return "every prompt gives the same tokens, except unknown and special ones"
    return None


def _words(tokenizer: Any) -> list[tuple[str, int]]:
    """The longest words of its vocabulary, as text, which need merges, and their numbers."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    vocabulary = (
        (token, number) for token, number in tokenizer.get_vocab().items() if number not in special
    )
    longest = sorted(vocabulary, key=lambda item: (-len(item[0]), item[0]))
    texts = ((tokenizer.convert_tokens_to_string([token]), number) for token, number in longest)
    plain = ((text.removesuffix(_END).strip(), number) for text, number in texts)
    lower = ((text, number) for text, number in plain if text.isalpha() and text == text.lower())
    words = list(islice(lower, WORDS * 4))
    return [(text, number) for text, number in words if len(text) > 1] or words


def _tokens(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, without special and unknown ones."""
    # twice, with a space: words of some vocabularies begin with one
    numbers = tokenizer(f"{text} {text}", verbose=False).input_ids
    special = set(tokenizer.all_special_ids)
    return [number for number in numbers if number not in special]
