"""Whether a tokenizer reads prompts: one that has lost its vocabulary still loads, and gives every
prompt the same tokens."""

from __future__ import annotations

from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from stepweave.errors import LoadError

PROMPTS = ("a red circle above a blue square", "ocean waves at night, oil painting")
_END = "</w>"  # of a word, in vocabularies as CLIP's
WORDS = 64  # of its own vocabulary that it is asked for


def check_tokenizers(components: dict[str, Any]) -> list[str]:
    """The names of the tokenizers among components, those of processors too, which all tell prompts
    apart.

    Raises LoadError for one that does not, or that does not find the words of its own vocabulary.
    """
    names = []
    for name, component in components.items():
        tokenizer = (
            component
            if isinstance(component, PreTrainedTokenizerBase)
            else getattr(component, "tokenizer", None)
        )
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            try:
                problem = _problem(tokenizer)
            except Exception as error:  # as of one that has no unknown token
                problem = f"it cannot read a prompt ({type(error).__name__})"
            if problem is not None:
                raise LoadError(
                    f"{name}/: {type(tokenizer).__name__} has not got its vocabulary whole: "
                    f"{problem}"
                )
            names.append(name)
    return names


def _problem(tokenizer: Any) -> str | None:
    words = _words(tokenizer)
    spread = words[:: max(1, len(words) // WORDS)][:WORDS]
    found = [(text, tuple(_tokens(tokenizer, text)), number) for text, number in spread]
    lost = [text for text, tokens, number in found if number not in tokens]
    if found and len(lost) == len(found):  # as without the merges that put them together
        return f"it finds none of its own words in a text ({', '.join(map(repr, lost[:3]))}, ...)"
    told_apart = len({tuple(_tokens(tokenizer, text)) for text in PROMPTS}) > 1
    if not told_apart and len({tokens for _, tokens, _ in found}) < 2:
        return "every prompt gives the same tokens, but for unknown and special ones"
    return None


def _words(tokenizer: Any) -> list[tuple[str, int]]:
    """Words of its vocabulary, as text, and their numbers: the longest, in which parts have to be
    put together."""
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
    """Without those that say nothing of it: unknown words differ in their number at most."""
    # the space is for vocabularies whose words begin with one
    numbers, empty = (
        tokenizer(f"{text} {text}", verbose=False).input_ids,
        set(tokenizer.all_special_ids),
    )
    return [number for number in numbers if number not in empty]
