"""Pictures that clients send."""

from __future__ import annotations

from stepweave.generation import Sources


def read_sources(image: bytes, mask: bytes | None, *, max_pixels: int) -> Sources:
    """The pictures of an edit."""
    raise NotImplementedError
