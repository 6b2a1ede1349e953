"""The command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.ladder.runs import CLIENTS, LOAD
from benchmarks.ladder.scenarios import SCENARIOS
from benchmarks.locust.arguments import list_of, positive, some_of, whole
from benchmarks.measure import cpus


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ladder",
        description="Compare the server with other ways to serve the embedded model. Finished runs "
        "are kept: a second start with the same settings goes on with those that are missing.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("build/ladder"), help="folder of the runs and the summary")
    add("--tables", action="store_true", help="only write the tables of the runs in --out")
    add("--hours", type=positive, default=2.0, help="start no run after this time")
    add(
        "--scenarios",
        type=some_of(SCENARIOS),
        default=tuple(SCENARIOS),
        help=f"comma-separated scenarios, of {','.join(SCENARIOS)}",
    )
    add("--contestants", type=list_of(str), help="comma-separated contestants (default: all)")
    add("--seeds", type=list_of(int), default=(1, 2, 3), help="seeds of requests and arrivals")
    add(
        "--requests",
        type=whole(1),
        default=96,
        help=f"requests of a closed loop, from {CLIENTS} clients",
    )
    add("--limit", type=positive, default=300.0, help="seconds a closed loop may take")
    add(
        "--seconds",
        type=positive,
        default=40.0,
        help=f"arrivals of an open loop, at {LOAD:g} of a capacity",
    )
    add("--drain", type=positive, default=20.0, help="seconds to answer after the last arrival")
    add(
        "--checks", type=whole(1), default=24, help="images of each run compared with the reference"
    )
    add("--threads", type=whole(1), default=cpus(), help="torch's threads of each contestant")
    add(
        "--url",
        type=_named,
        action="append",
        default=[],
        help="NAME=http://... of a server that "
        "runs already and answers OpenAI's images route; may be repeated",
    )
    add("--diffusers-checkout", type=_folder, help="of diffusers' repository, for its examples")
    add(
        "--environment",
        type=Path,
        help="Python of an environment with "
        "benchmarks/ladder/requirements.txt (default: build/ladder-venv, if --install made it)",
    )
    add("--install", action="store_true", help="first make build/ladder-venv anew")
    return parser.parse_args(argv)


def _named(text: str) -> tuple[str, str]:
    name, _, url = text.partition("=")
    if not name or not url.startswith("http"):
        raise ValueError
    return name, url.rstrip("/")


def _folder(text: str) -> Path:
    path = Path(text).resolve()
    if not (path / "examples").is_dir():
        raise argparse.ArgumentTypeError(f"{text} has no folder `examples`")
    return path
