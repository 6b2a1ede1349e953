"""The contestants: how each is started, and the form in which it takes a request."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.serving.contestants import ROOT

PATH = "/v1/images/generations"
OURS = "step"
FORWARDS = "LADDER_FORWARDS"  # the environment variable with the file of our forwards
RECORDED = "benchmarks.ladder.recorded:Stepweave"
PACKAGES = ("torch", "diffusers", "transformers", "bentoml", "litserve", "fastapi", "uvicorn")
BATCHING = (OURS, "request", "threads", "off")
EXAMPLES = {"server": PATH, "server-async": "/api/diffusers/inference"}
NO_CHECKOUT = "no checkout given (--diffusers-checkout)"
NO_ENVIRONMENT = "no environment with {0} (--install, or --environment)"

Body = dict[str, Any]


def as_it_is(body: Body) -> Body:
    return body


def batch_of_one(body: Body) -> Body:
    """As BentoML's client does for an API that takes batches."""
    return {"requests": [body]}


def in_the_prompt(body: Body) -> Body:
    """For servers that pass on nothing but the prompt and the number of steps."""
    return {
        "model": "shapes",
        "prompt": json.dumps(body),
        "num_inference_steps": body["num_inference_steps"],
    }


@dataclass(frozen=True)
class Contestant:
    """A way to serve the model."""

    name: str
    about: str
    command: tuple[str, ...] = ()  # the port is appended; empty: it runs already, at `url`
    settings: Mapping[str, str] = field(default_factory=dict)  # environment variables
    ready: str = "/readyz"
    path: str = PATH
    form: Callable[[Body], Body] = as_it_is
    url: str = ""
    why_not: str = ""  # it cannot run

    @property
    def stepweave(self) -> bool:
        return self.name in BATCHING


def contestants(
    environment: Path | None, checkout: Path | None, urls: Mapping[str, str]
) -> dict[str, Contestant]:
    """All contestants by name.

    Args:
        environment: the Python of an environment that has LitServe and what diffusers' examples
            need.
        checkout: of diffusers' repository.
        urls: of servers that run already and answer OpenAI's route, by name.
    """
    python, bentoml = sys.executable, str(Path(sys.executable).with_name("bentoml"))
    servers = "benchmarks.ladder.servers"
    other = str(environment or "")
    loop = (python, "-m", f"{servers}.loop", "--rule")
    bento = (bentoml, "serve", "--host", "127.0.0.1")
    every = [
        *(
            Contestant(
                mode,
                f"Stepweave, STEPWEAVE_BATCHING={mode}",
                (*bento, RECORDED if mode == OURS else "service.py", "--port"),
                {"STEPWEAVE_BATCHING": mode},
            )
            for mode in BATCHING
        ),
        Contestant(
            "litserve",
            "LitServe, batches of requests",
            (other, "-m", f"{servers}.lit", "--port"),
            ready="/health",
            why_not="" if environment else NO_ENVIRONMENT.format("LitServe"),
        ),
        Contestant(
            "bentoml", "BentoML, one at a time", (*bento, f"{servers}.bento:Plain", "--port")
        ),
        Contestant(
            "bentoml-batches",
            "BentoML, adaptive batches of requests",
            (*bento, f"{servers}.bento:Adaptive", "--port"),
            form=batch_of_one,
        ),
        Contestant(
            "steps-equal",
            "a loop that batches steps of requests of one number of steps, size and guidance",
            (*loop, "equal", "--port"),
        ),
        Contestant(
            "steps-size",
            "a loop that batches steps of requests of one size, as Xinference does for FLUX",
            (*loop, "size", "--port"),
        ),
        *(
            Contestant(
                f"diffusers-{name}",
                f"diffusers' examples/{name}",
                (
                    *(other, "-m", f"{servers}.diffusers_examples"),
                    *("--folder", str(checkout and checkout / "examples" / name), "--port"),
                ),
                ready="/",
                path=path,
                form=in_the_prompt,
                why_not=""
                if checkout and environment
                else NO_ENVIRONMENT.format("FastAPI")
                if checkout
                else NO_CHECKOUT,
            )
            for name, path in EXAMPLES.items()
        ),
        *(Contestant(name, f"the server at {url}", url=url) for name, url in urls.items()),
    ]
    return {contestant.name: contestant for contestant in every}


def common(threads: int) -> dict[str, str]:
    """The environment variables of all processes that run the model."""
    return {
        "PYTHONPATH": str(ROOT),
        "OMP_WAIT_POLICY": "passive",
        "OMP_NUM_THREADS": str(threads),
        "LADDER_THREADS": str(threads),
    }


def forwards_of(temporary: Path) -> Path:
    """The file of our forwards, in the folder of temporary files."""
    return temporary / "forwards.txt"


def environment_of(contestant: Contestant, threads: int, temporary: Path) -> dict[str, str]:
    """The environment variables of a contestant's server: without settings of Stepweave's of the
    caller, and with the same number of threads for all."""
    inherited = {
        key: value for key, value in os.environ.items() if not key.startswith("STEPWEAVE_")
    }
    return {
        **inherited,
        **common(threads),
        "TMPDIR": str(temporary),
        "BENTOML_DO_NOT_TRACK": "True",
        "STEPWEAVE_CPU_THREADS": str(threads),
        FORWARDS: str(forwards_of(temporary)),
        **contestant.settings,
    }


def versions(python: Path | None) -> dict[str, str]:
    """The versions of the packages that contestants use, in an environment."""
    code = (
        "import importlib.metadata as m, json; print(json.dumps({d.name: d.version "
        "for d in m.distributions()}))"
    )
    command = [str(python or sys.executable), "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    found = {name.lower(): version for name, version in json.loads(ended.stdout).items()}
    return {name: found[name] for name in PACKAGES if name in found}
