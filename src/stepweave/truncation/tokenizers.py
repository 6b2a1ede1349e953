"""Reports the texts that tokenizers read, and the parts that they cut off, to a listener."""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from stepweave.truncation.cuts import Cut, cuts_of
from stepweave.truncation.tokens import Reading, readings_of

logger = logging.getLogger(__name__)

_READING = frozenset(("__call__", "encode", "apply_chat_template"))
_OF_CUTS = frozenset(("truncation", "max_length"))
_OF_TOKENS = _OF_CUTS | {
    "tokenize",
    "padding",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
}


class Listener(NamedTuple):
    """Functions to call with texts that are cut, and with all that are read; or None."""

    cut: Callable[[Cut], None] | None
    read: Callable[[Reading], None] | None


NOBODY = Listener(None, None)

_listener: contextvars.ContextVar[Listener] = contextvars.ContextVar(
    "stepweave_tokenizers", default=NOBODY
)


@contextlib.contextmanager
def listening(
    *, cut: Callable[[Cut], None] | None = None, read: Callable[[Reading], None] | None = None
) -> Iterator[None]:
    """Within the block, in this context, call `cut` with every text that a view's tokenizers cut,
    and `read` with every text that they read."""
    before = _listener.set(Listener(cut, read))
    try:
        yield
    finally:
        _listener.reset(before)


def listener() -> Listener:
    """The listener of this context."""
    return _listener.get()


class Reporter:
    """Reports the calls of a LockedTokenizer around `tokenizer` to the listener. `name` is the
    tokenizer's in its pipeline; `made` maps its output to the one to return."""

    def __init__(
        self, tokenizer: Any, name: str, made: Callable[[Any], Any] = lambda output: output
    ) -> None:
        self._tokenizer = tokenizer
        self._name = name
        self._made = made

    def __call__(
        self, method: str, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        cut, read = listener()
        if method in _READING:
            # errors, as of unusual tokenizers, do not affect the output
            try:
                if read is not None:
                    made = readings_of(self._tokenizer, self._name, method, output, args, kwargs)
                    for reading in made:
                        read(reading)
            except Exception:
                logger.warning("cannot count the tokens of %s", self._name, exc_info=True)
            try:
                if cut is not None:
                    for text in self._cuts(method, output, args, kwargs):
                        cut(text)
            except Exception:
                logger.warning("cannot check for truncation by %s", self._name, exc_info=True)
        return self._made(output)

    def _cuts(
        self, method: str, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[Cut]:
        tokenizer = self._tokenizer
        if method == "apply_chat_template":
            if not kwargs.get("tokenize", True) or not kwargs.get("truncation"):
                return
            rest = {name: value for name, value in kwargs.items() if name not in _OF_TOKENS}
            rendered = tokenizer.apply_chat_template(*args, **rest, tokenize=False)
            args, kwargs = (rendered,), {"add_special_tokens": False, **_only(kwargs, _OF_CUTS)}
        elif method == "encode":  # it returns only token ids
            if not kwargs.get("truncation"):
                return
            names = _OF_CUTS | {"text", "text_pair", "add_special_tokens"}
            args, kwargs = args[:2], _only(kwargs, names)
        if method != "__call__" and getattr(output, "encodings", None) is None:
            output = tokenizer(*args, **kwargs)
        yield from cuts_of(tokenizer, self._name, output, args, kwargs)


def _only(kwargs: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name in names}
