"""Serves an entry, and compares every answer with the plain pipeline's call."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tests.pipelines.registry import CALLS, Entry
from tests.served.candidates import Options, options
from tests.served.entries import UNWARMED
from tests.served.plain import Case, Plain, case
from tests.served.requests import Answer, NotAskedError, check_sayable
from tests.served.saving import fixed, save
from tests.served.server import NotServedError, Served, serving

TOLERANCE = 1  # of 255
LONGEST = 300  # characters of a reason


@dataclass(frozen=True)
class Report:
    """What came of one entry: plain data, as it is kept in a file."""

    name: str
    pipeline: str
    library: str = ""  # why diffusers alone does not load or run it
    failed: str = ""  # why it is not served
    wrong: tuple[str, ...] = ()  # requests with other answers, and how they differ
    merged_share: float | None = None  # of the denoisers' calls; None: it has no denoiser
    largest_error: int = 0  # of a pixel that was answered, of 255
    asked: tuple[str, ...] = ()  # arguments, besides those of the entry's own calls
    no_effect: tuple[str, ...] = ()  # not asked: they change nothing in the plain call
    refused: tuple[str, ...] = ()  # not asked: the plain call raises
    random: tuple[str, ...] = ()  # not asked: the plain call draws without its generator
    errors: int = 0  # of the engine itself

    @property
    def right(self) -> bool:
        """Whether it is served, with the right answer to every request."""
        return not (self.library or self.failed or self.wrong or self.errors)


def check(entry: Entry) -> Report:
    """Ask for the entry's own calls, and for every further input; each request alone and among
    others."""
    report = Report(entry.name, entry.pipeline)
    cases = [case(entry, number) for number in range(CALLS)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            save(entry, folder)
            plain = Plain(folder, cases[0])
            expected = [plain.images(each) for each in cases]
        except Exception as error:
            return replace(report, library=f"{type(error).__name__}: {error}"[:LONGEST])
        try:
            for each in cases:
                check_sayable(each)
        except NotAskedError as error:
            return replace(report, failed=str(error)[:LONGEST])
        found = options(entry, plain, cases[0], expected[0])
        report = replace(report, **_counts(found))
        cases += [each for each, _ in found.cases]
        expected += [images for _, images in found.cases]
        try:
            further = {"STEPWEAVE_WARMUP": "false"} if entry.name in UNWARMED else {}
            pixels = _pixels(cases, expected)
            with serving(folder, fixed(entry), pixels, **further) as served:
                return _asked(report, served, cases, expected)
        except NotServedError as error:
            return replace(report, failed=str(error)[:LONGEST])


def _pixels(cases: Sequence[Case], expected: Sequence[list[np.ndarray]]) -> int:
    """Of the largest image that is asked for, or made."""
    made = [image.shape[0] * image.shape[1] for images in expected for image in images]
    sizes = [(each.arguments.get("width", 0), each.arguments.get("height", 0)) for each in cases]
    return max(*made, *(width * height for width, height in sizes))


def _counts(found: Options) -> dict[str, tuple[str, ...]]:
    return {
        "asked": tuple(each.name for each, _ in found.cases),
        "no_effect": tuple(found.no_effect),
        "refused": tuple(found.refused),
        "random": tuple(found.random),
    }


def _asked(
    report: Report, served: Served, cases: Sequence[Case], expected: Sequence[list[np.ndarray]]
) -> Report:
    """The report with what the answers to all cases are; the first are the entry's own calls."""
    before = served.forwards()
    together = served.together(cases[:CALLS])
    calls, merged = (now - then for now, then in zip(served.forwards(), before, strict=True))
    together += served.together(cases[CALLS:])
    alone = served.alone(cases)
    wrong, worst = [], 0
    for company, answers in (("alone", alone), ("among others", together)):
        for each, answer, images in zip(cases, answers, expected, strict=True):
            error, why = compare(answer, images)
            worst = max(worst, error)
            if why:
                wrong.append(f"{each.name}, {company}: {why}"[:LONGEST])
    return replace(
        report,
        wrong=tuple(wrong),
        merged_share=merged / calls if calls else None,
        largest_error=worst,
        errors=served.engine.stats().errors,
    )


def compare(answer: Answer, images: Sequence[np.ndarray]) -> tuple[int, str]:
    """The largest difference of a pixel, and what is wrong with an answer, if anything."""
    if answer.error:
        return 0, answer.error
    if [image.shape for image in answer.images] != [image.shape for image in images]:
        return 0, f"{_sizes(answer.images)} instead of {_sizes(images)}"
    error = max(
        int(np.abs(image.astype(int) - other.astype(int)).max())
        for image, other in zip(answer.images, images, strict=True)
    )
    return error, f"differs by {error}/255" if error > TOLERANCE else ""


def _sizes(images: Sequence[np.ndarray]) -> str:
    return f"{len(images)} images ({', '.join('x'.join(map(str, one.shape)) for one in images)})"
