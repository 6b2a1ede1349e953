"""Locks around tokenizers and autoencoders, which only one thread may use at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from stepweave.compat.proxy import Proxy

# Called with a tokenizer's method, its output, args and kwargs; returns the output for the caller.
Tokenized = Callable[[str, Any, tuple[Any, ...], dict[str, Any]], Any]

# methods that set or use padding or truncation
_LOCKED = frozenset(
    (
        "tokenize", "encode", "encode_plus", "batch_encode_plus", "pad", "decode", "batch_decode",
        "apply_chat_template", "prepare_for_model", "add_tokens", "add_special_tokens",
    )
)  # fmt: skip


def as_it_is(method: str, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return output


class LockedTokenizer(Proxy):
    """A transparent proxy that lets one thread at a time tokenize.

    Fast tokenizers set padding and truncation on a shared Rust object before each call: without the
    lock, threads corrupt each other's padding, and lengths that should be equal differ. `tokenized`
    is called with each output, with the lock held.

    >>> tokenizer = LockedTokenizer(pipeline.tokenizer, threading.RLock())
    """

    def __init__(self, tokenizer: Any, lock: Any, tokenized: Tokenized = as_it_is) -> None:
        super().__init__(
            tokenizer.__wrapped__ if isinstance(tokenizer, LockedTokenizer) else tokenizer
        )
        self._self_lock = lock
        self._self_tokenized = tokenized

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._self_lock:
            output = self.__wrapped__(*args, **kwargs)
            return self._self_tokenized("__call__", output, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if name not in _LOCKED:
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            with self._self_lock:
                return self._self_tokenized(name, value(*args, **kwargs), args, kwargs)

        return call


class LockedAutoencoder(Proxy):
    """A transparent proxy that lets one thread at a time encode or decode: autoencoders keep state
    between tiles and frames."""

    def __init__(self, autoencoder: torch.nn.Module, lock: Any) -> None:
        super().__init__(autoencoder)
        self._self_lock = lock

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        with self._self_lock:
            return self.__wrapped__.encode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        with self._self_lock:
            return self.__wrapped__.decode(*args, **kwargs)


def is_autoencoder(component: Any) -> bool:
    """Whether a component is a module that encodes and decodes; tokenizers are not modules."""
    methods = (getattr(component, name, None) for name in ("encode", "decode"))
    return isinstance(component, torch.nn.Module) and all(map(callable, methods))
