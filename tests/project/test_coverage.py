"""Coverage is measured as pyproject.toml says, and that is right for fibers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.environment import ROOT, clean_environment
from tests.support.project import PROJECT
from tests.support.waiting import SECONDS

SETTINGS = PROJECT["tool"]["coverage"]
WAIT = """\
import greenlet

def wait(value):
    return greenlet.getcurrent().parent.switch(value)
"""
JOB = """\
from waiting import wait

def job(value):
    for _ in range(2):
        got = wait(value)
    if got:
        value = got
    return value
"""
# Two jobs take turns, as fibers do; each is suspended in a function that it calls
MEASURE = """\
import json, sys
import coverage

measured = coverage.Coverage(
    data_file=None, config_file=False, source=["."], concurrency=json.loads(sys.argv[1])
)
measured.start()
import greenlet, first, second

jobs = [greenlet.greenlet(module.job) for module in (first, second)]
for _ in range(3):
    for job in jobs:
        job.switch(1)
assert all(job.dead for job in jobs)
measured.stop()
print(json.dumps([measured.analysis2(f"{name}.py")[3] for name in ("first", "second", "waiting")]))
"""


def missed(folder: Path, concurrency: list[str]) -> list[list[int]]:
    """The lines of three modules that coverage takes for not run; all are."""
    files = {"waiting": WAIT, "first": JOB, "second": f"# elsewhere\n\n{JOB}", "measure": MEASURE}
    for name, code in files.items():
        (folder / f"{name}.py").write_text(code)
    ended = subprocess.run(
        [sys.executable, "measure.py", json.dumps(concurrency)],
        cwd=folder,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert ended.returncode == 0, ended.stderr
    lines: list[list[int]] = json.loads(ended.stdout)
    return lines


def test_lines_that_fibers_run_in_turns_are_all_counted(tmp_path: Path) -> None:
    concurrency = SETTINGS["run"]["concurrency"]
    assert missed(tmp_path, concurrency) == [[], [], []]
    assert any(missed(tmp_path, ["thread"])), "else greenlets need not be named, which costs time"
    assert "thread" in concurrency


def test_nine_lines_in_ten_must_be_run_by_the_quick_tests(pytestconfig: pytest.Config) -> None:
    assert SETTINGS["report"]["fail_under"] >= 90
    assert SETTINGS["run"]["source_pkgs"] == ["stepweave"]
    (command,) = re.findall(r"^coverage:.*\n\t(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    (tests,) = re.findall(r"^test:.*\n\t(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert f"{tests} --cov" in command
    assert pytestconfig.pluginmanager.hasplugin("pytest_cov")
