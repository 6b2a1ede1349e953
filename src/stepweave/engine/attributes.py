"""Attributes of a view's parts that are replaced for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def replaced(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute, and what takes it back: a method of its own, which is bound to it, would be a reference cycle."""
    before = owner.__dict__.get(name)
    owner.__dict__[name] = value

    def put_back() -> None:
        if owner.__dict__.get(name) is value:
            del owner.__dict__[name]
            if before is not None:
                owner.__dict__[name] = before

    return put_back
