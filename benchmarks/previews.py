"""What previews cost, and how much they resemble the images, on the embedded model: `python -m
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

COUNT = 3  # previews of an image
JOBS = 8  # at a time
STRIDE = 1009  # prime: prompts one after the other differ in all their words
PROMPTS = 48


class Watcher:
    """Has images made of the steps it is for, on the threads of a pool."""

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
    """Jobs with previews, PNG files included as a server makes them, and jobs without, in turn
    through one engine."""
    steps = preview_steps(shapes.steps, COUNT)
    made: list[int] = []

    def make(step: int, latents: Latents) -> None:
        made.append(len(encode(previewer.image(latents, 64, 64), "png", None, "shapes")))

    with StepEngine(shapes.pipeline, cache_bytes=0) as engine:

        def run(jobs: int, watched: bool, number: int) -> Timing:
            calls = [shapes.call(STRIDE * (FRESH + jobs * number + i)) for i in range(jobs)]

            def through() -> None:
                with ThreadPoolExecutor(2) as pool:  # its end waits for the previews, too
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
        made.clear()
        timings = alternate(contestants, rounds)
    assert len(made) == rounds * (1 + JOBS) * COUNT
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
                [*(found[step] for step in chosen), image]
                for found, image in zip(previews, images, strict=True)
            ],
            sheet,
        )
    rows = []
    for step in steps:
        found = [
            _correlation(one[step], image) for one, image in zip(previews, images, strict=True)
        ]
        tenth = float(np.percentile(found, 10))
        rows.append({"step": step, "correlation": Spread.of(found), "of nine in ten above": tenth})
    return Part(
        f"Pearson's correlation over the RGB values of preview and image, {prompts} prompts. "
        f"{COUNT} previews are made after steps {', '.join(map(str, chosen))}. The map explains "
        f"{previewer.explained:.0%} of unseen pixels.",
        (rows,),
    )


def _correlation(preview: Image.Image, image: Image.Image) -> float:
    one, other = (np.asarray(each, dtype=float).ravel() for each in (preview, image))
    return float(np.corrcoef(one, other)[0, 1])


def _draw(rows: list[list[Image.Image]], path: Path) -> None:
    """Two prompts a line: the previews, and the image."""
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
    parser.add_argument("--repeats", type=int, default=15, help="rounds (default: %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="a few seconds' worth, to see that it works"
    )
    parser.add_argument(
        "--sheet", type=Path, help="where to draw previews beside their images, as a PNG file"
    )
    parser.add_argument(
        "--json", type=Path, default=Path("build/previews.json"), help="(default: %(default)s)"
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
