"""Policies that were tried against the default; docs/experiments.md says what came."""

from __future__ import annotations

from stepweave.scheduling.policy import Policy

VARIANTS: dict[str, Policy] = {}
