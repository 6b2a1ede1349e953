"""The profile of the embedded model, in small."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest

from benchmarks import profile
from benchmarks.simulation.curves import DENOISER, Curves


def test_a_profile_is_a_curve_that_the_simulator_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], one_torch_thread: None
) -> None:
    out = tmp_path / "deep" / "curve.json"
    command = ["profile", "--sizes", "64x64", "--rounds", "1", "--out", str(out)]
    with patch.multiple(profile, COUNTS=(1, 2), STEPS=2), patch("sys.argv", command):
        profile.main()
    curves = Curves.read(out)
    assert {key.module for key in curves.seconds} >= {DENOISER, "vae.decode"}
    assert all(took > 0 for seconds in curves.seconds.values() for took in seconds.values())
    job = curves.demand("64x64", 20)
    assert [load.key.module for load in job.step] == [DENOISER]
    assert [load.key.module for load in job.after] == ["vae.decode"]
    assert curves.name in capsys.readouterr().out
