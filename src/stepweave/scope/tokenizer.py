"""Tokenizers under threads."""

from __future__ import annotations

from typing import Any

from stepweave.scope.proxy import Proxy


class LockedTokenizer(Proxy):
    """A transparent proxy that lets one thread at a time tokenize.

    Fast tokenizers set padding and truncation on a shared Rust object before each call: without the lock, threads corrupt each
    other's padding, and lengths that should be equal differ.

    >>> tokenizer = LockedTokenizer(pipeline.tokenizer, threading.RLock())
    """

    def __init__(self, tokenizer: Any, lock: Any) -> None:
        super().__init__(tokenizer.__wrapped__ if isinstance(tokenizer, LockedTokenizer) else tokenizer)
        self._self_lock = lock

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._self_lock:
            return self.__wrapped__(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return _locked(value, self._self_lock) if name in _LOCKED else value


# methods that set padding or truncation, or read through them
_LOCKED = frozenset(
    (
        "tokenize", "encode", "encode_plus", "batch_encode_plus", "pad", "decode", "batch_decode", "apply_chat_template",
        "prepare_for_model", "add_tokens", "add_special_tokens",
    )
)  # fmt: skip


def _locked(method: Any, lock: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return method(*args, **kwargs)

    return call
