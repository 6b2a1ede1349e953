"""The parts of the full test run: `make test-full` runs them one after the other, `make test-full
PART=memory` runs one.

A part that has passed is not run again while no file has changed, so that an interrupted run goes
on where it stood.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "test-full"
FULL = ("-m", "full and not gpu")
NAMED = {
    "pipelines": ["tests/pipelines/test_pipelines.py"],
    "served": ["tests/served"],
    "parity": [
        "tests/engine/test_parity.py",
        "tests/engine/test_reproducible.py",
        "tests/engine/test_edits.py",
        "tests/engine/test_lora_company.py",
        "tests/engine/test_lora_families.py",
        "tests/engine/test_loras.py",
        "tests/engine/test_schedulers.py",
    ],
    "memory": ["tests/memory/test_memory.py"],
    "openapi": ["tests/api/test_openapi.py"],
    "shapes": ["tests/model"],
    "adversarial": ["tests/adversarial"],
    "install": ["tests/install"],
}
# pytest's arguments. What is in no other part is in `others`, so that nothing is left out.
PARTS = {
    "quick": ["-m", "not full and not gpu"],
    **{name: [*FULL, *paths] for name, paths in NAMED.items()},
    "others": [*FULL, *(f"--ignore={path}" for paths in NAMED.values() for path in paths)],
}
PROCESSES = ["--numprocesses", "2", "--dist", "loadscope"]  # see support.distribution
NO_TESTS = 5  # pytest's exit status where it has found none


def state() -> str:
    """A name for what all files hold, of those that git does not ignore, committed or not; for
    nothing else than it."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"GIT_INDEX_FILE": str(FOLDER / f"index-{os.getpid()}")}
    try:
        for command in (["add", "--all"], ["write-tree"]):
            ended = subprocess.run(
                ["git", *command],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            )
        return ended.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return f"unknown-{time.time_ns()}"  # not in a clone: nothing is remembered
    finally:
        Path(environment["GIT_INDEX_FILE"]).unlink(missing_ok=True)


def run(name: str, options: list[str]) -> int:
    """pytest's exit status for a part."""
    paths = [argument for argument in PARTS[name] if argument.startswith("tests/")]
    if paths and not any((ROOT / path).exists() for path in paths):
        return 0
    status = subprocess.call(
        [sys.executable, "-m", "pytest", *PROCESSES, *PARTS[name], *options], cwd=ROOT
    )
    return 0 if status == NO_TESTS else status


def main(arguments: list[str]) -> int:
    """Run the part that comes first in the arguments, or all; the others are pytest's."""
    chosen = [arguments[0]] if arguments and arguments[0] else list(PARTS)
    unknown = [name for name in chosen if name not in PARTS]
    if unknown:
        print(f"There is no part {unknown[0]!r}; there are {', '.join(PARTS)}.", file=sys.stderr)  # noqa: T201
        return 2
    failed = []
    for name in chosen:
        passed = FOLDER / state() / name
        if passed.exists() and len(chosen) > 1:
            print(f"{name}: {passed.read_text().strip()}, and nothing has changed", flush=True)  # noqa: T201
            continue
        began = time.monotonic()
        status = run(name, arguments[1:])
        took = f"{'failed' if status else 'passed'} in {(time.monotonic() - began) / 60:.1f} min"
        print(f"{name}: {took}", flush=True)  # noqa: T201
        if status:
            failed.append(name)
        elif passed.parent.name == state():  # else somebody has changed a file meanwhile
            passed.parent.mkdir(exist_ok=True)
            passed.write_text(f"{took}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
