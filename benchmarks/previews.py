"""Cost of previews, and their likeness to the images, with the embedded model: `python -m
benchmarks.previews`."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.calls import FRESH, SECONDS
from benchmarks.measure import Part, Report, Spread, Timing, alternate, clock, ratio, seconds
from benchmarks.shapes import Shapes
from stepweave import StepEngine
from stepweave.config import Settings
from stepweave.engine import Job, Latents
from stepweave.images.encode import encode
from stepweave.loading.device import set_cpu_threads
from stepweave.previews.decoder import Previewer, preview_steps

COUNT = 3  # previews per image
JOBS = 8  # concurrent
STRIDE = 1009  # a prime, so that consecutive prompts differ in all words
PROMPTS = 48


class Watcher:
    """Makes previews at the given steps, on the threads of a pool."""

    def __init__(
        self, steps: list[int], make: Callable[[int, Latents], object], pool: ThreadPoolExecutor
    ) -> None:
        self._steps = steps
        self._make = make
        self._pool = pool

    def progressed(self, job: Job) -> None: ...

    def wants(self, step: int, total: int) -> bool:
        return step in self._steps

    def denoised(self, job: Job, latents: Latents) -> None:
        self._pool.submit(self._make, job.progress.step, latents)


def cost(shapes: Shapes, previewer: Previewer, rounds: int) -> Part:
    """Jobs with previews, encoded as PNG like in the server, and jobs without, in turn through one
    engine."""
    steps = preview_steps(shapes.steps, COUNT)
    sizes: list[int] = []

    def make(step: int, latents: Latents) -> None:
        sizes.append(len(encode(previewer.image(latents, 64, 64), "png", None, "shapes")))

    with StepEngine(shapes.pipeline, cache_bytes=0) as engine:

        def run(jobs: int, watched: bool, number: int) -> Timing:
            calls = [shapes.call(STRIDE * (FRESH + jobs * number + i)) for i in range(jobs)]

            def through() -> None:
                with ThreadPoolExecutor(2) as pool:  # its exit waits for the previews
                    watcher = Watcher(steps, make, pool) if watched else None
                    submitted = [engine.submit(**call, observer=watcher) for call in calls]
                    for job in submitted:
                        job.result(SECONDS)

            return clock(through)

        contestants = {}
        for jobs in (1, JOBS):
            for watched in (True, False):
                name = f"{jobs} job{'s' if jobs > 1 else ''}, {'previews' if watched else 'none'}"
                contestants[name] = functools.partial(run, jobs, watched)
        for contestant in contestants.values():
            contestant(-1)
        sizes.clear()
        timings = alternate(contestants, rounds)
    assert len(sizes) == rounds * (1 + JOBS) * COUNT
    one, one_none, many, many_none = timings.values()
    return Part(
        f"{COUNT} previews of each image of {shapes.steps} steps, made into PNG files, against "
        f"none; the same calls.",
        (
            seconds(timings),
            [
                ratio("time: previews / none, 1 job", one, one_none, "<= 1.02"),
                ratio(f"time: previews / none, {JOBS} jobs", many, many_none, "<= 1.02"),
            ],
        ),
    )


def likeness(shapes: Shapes, previewer: Previewer, prompts: int, sheet: Path | None) -> Part:
    """How previews after each step correlate with the image."""
    steps = list(range(1, shapes.steps + 1))
    previews: list[dict[int, Image.Image]] = [{} for _ in range(prompts)]

    def keep(number: int, step: int, latents: Latents) -> None:
        previews[number][step] = previewer.image(latents, 64, 64)

    with StepEngine(shapes.pipeline) as engine, ThreadPoolExecutor(1) as pool:
        jobs = [
            engine.submit(
                **shapes.call(STRIDE * number),
                observer=Watcher(steps, functools.partial(keep, number), pool),
            )
            for number in range(prompts)
        ]
        images = [job.result(SECONDS).images[0] for job in jobs]
    chosen = preview_steps(shapes.steps, COUNT)
    if sheet is not None:
        _draw(
            [
                [*(made[step] for step in chosen), image]
                for made, image in zip(previews, images, strict=True)
            ],
            sheet,
        )
    rows = []
    for step in steps:
        correlations = [
            _correlation(made[step], image) for made, image in zip(previews, images, strict=True)
        ]
        rows.append(
            {
                "step": step,
                "correlation": Spread.of(correlations),
                "10th percentile": float(np.percentile(correlations, 10)),
            }
        )
    return Part(
        f"Pearson's correlation of the RGB values of preview and image, {prompts} prompts. "
        f"{COUNT} previews are made after steps {', '.join(map(str, chosen))}. The linear decoder "
        f"explains {previewer.explained:.0%} of the variance of unseen pixels.",
        (rows,),
    )


def _correlation(preview: Image.Image, image: Image.Image) -> float:
    values = [np.asarray(each, dtype=float).ravel() for each in (preview, image)]
    return float(np.corrcoef(values)[0, 1])


def _draw(rows: list[list[Image.Image]], path: Path) -> None:
    """Draw previews and image of two prompts per line."""
    across, side = 2 * len(rows[0]), rows[0][0].width
    cells = [image for row in rows for image in row]
    sheet = Image.new("RGB", (across * (side + 2), -(-len(cells) // across) * (side + 2)))
    for i, image in enumerate(cells):
        sheet.paste(image, (i % across * (side + 2), i // across * (side + 2)))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.previews", description=__doc__.partition(":")[0]
    )
    parser.add_argument(
        "--repeats", type=int, default=15, help="rounds of the cost (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test of a few seconds")
    parser.add_argument(
        "--sheet", type=Path, help="PNG file to write, with previews next to their images"
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("build/previews.json"),
        help="report file (default: %(default)s)",
    )
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error(f"--repeats is {arguments.repeats}; it must be at least 1")
    set_cpu_threads(Settings())
    torch.set_grad_enabled(False)
    shapes = Shapes()
    previewer = Previewer.fit(shapes.pipeline)
    assert previewer is not None
    report = Report(arguments.json, repeats=arguments.repeats, quick=arguments.quick)
    report.add(
        "likeness", likeness(shapes, previewer, 8 if arguments.quick else PROMPTS, arguments.sheet)
    )
    report.add("cost", cost(shapes, previewer, 2 if arguments.quick else arguments.repeats))
    report.close()


if __name__ == "__main__":
    main()
