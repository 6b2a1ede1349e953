"""Runs the real server with another policy: `python -m benchmarks.serving.server --policy fifo`.
Further arguments, such as `--port 3001`, are passed to `bentoml serve`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.policies import POLICIES
from benchmarks.serving.contestants import POLICY, ROOT


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving.server",
        description="Run the real server with a policy of benchmarks/policies.py.",
        epilog="Further arguments are passed to `bentoml serve`.",
        allow_abbrev=False,
    )
    parser.add_argument("--policy", choices=POLICIES, default="srpt", help="(default: %(default)s)")
    arguments, others = parser.parse_known_args()
    os.environ[POLICY] = arguments.policy
    os.chdir(ROOT)
    bentoml = str(Path(sys.executable).with_name("bentoml"))
    service = "benchmarks.serving.service:Stepweave"
    # the last --host has precedence
    os.execv(bentoml, [bentoml, "serve", service, "--host", "127.0.0.1", *others])


if __name__ == "__main__":
    main()
