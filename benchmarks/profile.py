"""Measures step-time curves of the embedded model on this machine, for `python -m
benchmarks.simulate --curve`.

    python -m benchmarks.profile --out build/curve.json

Each size has its own engine: a single job shows which calls a job makes, growing numbers of jobs
their seconds by rows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import environment
from stepweave.config import Settings
from stepweave.engine import StepEngine
from stepweave.loading.device import set_cpu_threads
from stepweave.loading.loader import load_pipeline
from stepweave.parameters import ImageRequest
from stepweave.serving.model import ServedModel

DENOISER = "transformer"
COUNTS = (1, 2, 4, 8, 16)  # concurrent jobs
STEPS = 12

Step = tuple[str, int]  # module, rows


def run(engine: StepEngine, model: ServedModel, size: str, count: int, first: int) -> None:
    """Run jobs with different prompts, since encodings are cached."""
    parameters = [
        model.resolve(
            ImageRequest(prompt=f"{first + i} red rings", size=size, num_inference_steps=STEPS)
        )
        for i in range(count)
    ]
    for job in [engine.submit(**model.call(each)) for each in parameters]:
        job.result()


def calls_of(steps: list[Step], sizes: dict[str, int]) -> dict[str, list[dict[str, Any]]]:
    """The calls of a job alone, before its first step, in each step, and after the last."""
    places = [i for i, (module, _) in enumerate(steps) if module == DENOISER]
    parts = {
        "before": steps[: places[0]],
        "step": [steps[places[0]]],
        "after": steps[places[-1] + 1 :],
    }
    return {
        part: [{"module": module, "size": sizes[module], "rows": rows} for module, rows in calls]
        for part, calls in parts.items()
    }


def profile(
    model: ServedModel, size: str, rounds: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Curves of a size, and a job's calls."""
    seen: list[Step] = []
    with StepEngine(
        model.pipeline,
        knee=False,
        on_step=lambda module, rows, cap, took: seen.append((module, rows)),
    ) as engine:
        for count in COUNTS:  # to certify, and for first calls
            run(engine, model, size, count, 100 * count)
        seen.clear()
        run(engine, model, size, 1, 99)
        alone = list(seen)
        for number in range(rounds):
            for count in COUNTS:
                run(engine, model, size, count, 1000 * (number + 1) + 100 * count)
        curves = engine.curves()
    sizes = {key.module: key.size for key in curves}
    measured = [
        {
            "module": key.module,
            "size": key.size,
            "seconds": {str(rows): round(took, 6) for rows, took in seconds.items()},
        }
        for key, seconds in curves.items()
    ]
    return measured, calls_of(alone, sizes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="64x64,128x128", help="(default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=2, help="rounds of each size (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("build/curve.json"),
        help="file to write (default: %(default)s)",
    )
    arguments = parser.parse_args()
    settings = Settings()
    set_cpu_threads(settings)
    pipeline, preset = load_pipeline(settings, torch.device("cpu"), torch.float32)
    model = ServedModel(pipeline, preset, settings)
    facts = environment()
    content: dict[str, Any] = {
        "name": f"the embedded model, {facts['cpu']}, {facts['torch_threads']} threads",
        "source": (
            "measured by benchmarks/profile.py: "
            f"{', '.join(f'{name} {value}' for name, value in facts.items())}"
        ),
        "curves": [],
        "jobs": {},
    }
    for size in arguments.sizes.split(","):
        curves, content["jobs"][size] = profile(model, size, arguments.rounds)
        content["curves"] += [curve for curve in curves if curve not in content["curves"]]
    by_key: dict[tuple[str, int], dict[str, Any]] = {}
    for curve in content["curves"]:  # encoders are measured with each size; keep the first
        by_key.setdefault((curve["module"], curve["size"]), curve)
    content["curves"] = list(by_key.values())
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(content, indent=2) + "\n")
    print(arguments.out.read_text())


if __name__ == "__main__":
    main()
