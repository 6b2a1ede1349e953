"""Strict JSON schemas of the custom kinds that the manifests use."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.support.environment import ROOT

SCHEMAS = Path(os.environ.get("STEPWEAVE_K8S_SCHEMAS") or ROOT.parent / "shared" / "k8s-schemas")


@functools.cache
def _validator(name: str) -> jsonschema.protocols.Validator:
    schema = json.loads((SCHEMAS / name).read_text())
    return jsonschema.validators.validator_for(schema)(schema)


def validate_custom(document: dict[str, Any]) -> None:
    """Validate a document. Raises jsonschema.ValidationError; skips if there are no schemas."""
    group, version = document["apiVersion"].split("/")
    if not SCHEMAS.is_dir():
        pytest.skip(
            f"NOT CHECKED: no schemas of custom kinds in {SCHEMAS}; STEPWEAVE_K8S_SCHEMAS names "
            f"another place"
        )
    _validator(f"{document['kind'].lower()}-{group}-{version}.json").validate(document)
