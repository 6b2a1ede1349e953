"""Tokenizers under threads."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from stepweave.scope.proxy import Proxy
from stepweave.truncation.cuts import current_report, cuts_of
from stepweave.truncation.tokens import current_count, readings_of

logger = logging.getLogger(__name__)


class LockedTokenizer(Proxy):
    """A transparent proxy that lets one thread at a time tokenize, and reports texts that are cut
    (`cuts.reporting`) and how many tokens it reads (`tokens.counting`).

    Fast tokenizers set padding and truncation on a shared Rust object before each call: without the
    lock, threads corrupt each other's padding, and lengths that should be equal differ. `name` is
    the tokenizer's in its pipeline; `made` is given what it makes, and what it returns is given on.

    >>> tokenizer = LockedTokenizer(pipeline.tokenizer, threading.RLock())
    """

    def __init__(
        self,
        tokenizer: Any,
        lock: Any,
        name: str = "tokenizer",
        made: Callable[[Any], Any] = lambda output: output,
    ) -> None:
        super().__init__(
            tokenizer.__wrapped__ if isinstance(tokenizer, LockedTokenizer) else tokenizer
        )
        self._self_lock = lock
        self._self_name = name
        self._self_made = made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._self_lock:
            output = self.__wrapped__(*args, **kwargs)
            self._self_report("__call__", output, args, kwargs)
            return self._self_made(output)

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if name not in _LOCKED:
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            with self._self_lock:
                output = value(*args, **kwargs)
                self._self_report(name, output, args, kwargs)
                return self._self_made(output)

        return call

    def _self_report(
        self, method: str, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Report what a call read and what it cut, if anybody wants to know of it."""
        self._self_count(method, output, args, kwargs)
        self._self_check(method, output, args, kwargs)

    def _self_count(
        self, method: str, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        count = current_count()
        if count is None or method not in _CUTTING:
            return
        try:
            for reading in readings_of(
                self.__wrapped__, self._self_name, method, output, args, kwargs
            ):
                count(reading)
        except Exception:  # as below
            logger.warning("cannot tell how many tokens %s read", self._self_name, exc_info=True)

    def _self_check(
        self, method: str, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        report = current_report()
        if report is None or method not in _CUTTING:
            return
        tokenizer = self.__wrapped__
        try:
            if method == "apply_chat_template":
                if not kwargs.get("tokenize", True) or not kwargs.get("truncation"):
                    return
                rendered = tokenizer.apply_chat_template(
                    *args, **_without(kwargs, _OF_TOKENS), tokenize=False
                )
                args, kwargs = (rendered,), {"add_special_tokens": False, **_only(kwargs, _OF_CUTS)}
            elif method == "encode":  # it gives nothing but numbers
                if not kwargs.get("truncation"):
                    return
                args, kwargs = (
                    args[:2],
                    _only(kwargs, _OF_CUTS | {"text", "text_pair", "add_special_tokens"}),
                )
            if method != "__call__" and getattr(output, "encodings", None) is None:
                output = tokenizer(*args, **kwargs)
            for cut in cuts_of(tokenizer, self._self_name, output, args, kwargs):
                report(cut)
        except Exception:  # a tokenizer with ways of its own; its output is none the worse
            logger.warning("cannot tell whether %s cut a text", self._self_name, exc_info=True)


# methods that set padding or truncation, or read through them
_LOCKED = frozenset(
    (
        "tokenize",
        "encode",
        "encode_plus",
        "batch_encode_plus",
        "pad",
        "decode",
        "batch_decode",
        "apply_chat_template",
        "prepare_for_model",
        "add_tokens",
        "add_special_tokens",
    )
)
_CUTTING = frozenset(("__call__", "encode", "apply_chat_template"))
_OF_CUTS = frozenset(("truncation", "max_length"))
_OF_TOKENS = (
    frozenset(
        (
            "tokenize",
            "padding",
            "return_tensors",
            "return_dict",
            "return_assistant_tokens_mask",
            "tokenizer_kwargs",
        )
    )
    | _OF_CUTS
)


def _only(kwargs: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name in names}


def _without(kwargs: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in names}
