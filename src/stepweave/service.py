"""The BentoML service of an installed package: `bentoml serve stepweave.service:Stepweave`."""

from __future__ import annotations

from stepweave.api import bento

__all__ = ["Stepweave"]

Stepweave = bento.complete(bento.service(bento.Stepweave))
