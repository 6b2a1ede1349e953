"""The commands know modular pipelines by their files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from stepweave.cli.inspection import inspect_model, is_model
from stepweave.loading.modular import MODULAR_INDEX
from tests.pipelines.modular import flux_modular
from tests.support.hub import COMMIT


def test_files_are_counted_wherever_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = tmp_path / "flux", tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    flux_modular().save_pretrained(str(folder), overwrite_modular_index=True)
    assert is_model(folder)
    whole = inspect_model(folder)
    assert (whole.pipeline, whole.problem) == ("FluxModularPipeline", None)
    assert whole.numbers > 100_000
    path = folder / MODULAR_INDEX
    index = json.loads(path.read_text())
    index["vae"][2] |= {"pretrained_model_name_or_path": "owner/vae", "revision": COMMIT}
    path.write_text(json.dumps(index))
    snapshot = cache / "models--owner--vae" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    shutil.move(folder / "vae", snapshot / "vae")
    there = inspect_model(folder)
    assert (there.pipeline, there.numbers, there.problem) == (whole.pipeline, whole.numbers, None)
    shutil.rmtree(cache)
    absent = inspect_model(folder)
    assert absent.incomplete and str(absent.problem).startswith("vae/ is missing")
