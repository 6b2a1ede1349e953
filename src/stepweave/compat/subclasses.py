"""Other methods for single objects of a library's classes, without a change of these."""

from __future__ import annotations

from typing import Any


def like(kind: type, **members: Any) -> type:
    """A subclass of the same name with other `members`, which objects of `kind` may change to."""
    same = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (kind,), {**members, **same})
