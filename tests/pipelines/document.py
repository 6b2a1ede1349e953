"""Writes the reports as docs/pipelines.md."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import groupby

from tests.pipelines.check import TAKES_TURNS, TOLERANCE, Report
from tests.pipelines.registry import CALLS, Entry

GROUPS: dict[str, tuple[str, ...]] = {  # title -> modules of this package
    "Stable Diffusion 1.5, 2 and XL, latent consistency models, Kolors": ("unets", "kolors"),
    "Stable Diffusion 3, Flux, Flux.2 and Chroma": ("transformers_flux",),
    "Qwen-Image, Z-Image and HunyuanImage": ("transformers_qwen",),
    "PixArt, Sana, Lumina, CogView, AuraFlow, HunyuanDiT, DiT and aMUSEd": ("transformers",),
    "Further transformers for images": ("transformers_more",),
    "Modular pipelines": ("modular",),
    "ControlNets, T2I-Adapters and IP-Adapters": ("adapters", "adapters_transformers"),
    "Variants of Stable Diffusion 1.5": ("unets_variants",),
    "Perturbed attention guidance": ("adapters_pag",),
    "Kandinsky, Stable Cascade, Wuerstchen and unCLIP": (
        "unets_priors",
        "unets_kandinsky",
        "unets_unclip",
    ),
    "Pixels without text, and DeepFloyd IF": ("unets_pixels",),
    "Video": ("unets_video", "video", "video_ltx2", "video_more"),
    "Sound": ("audio",),
}
_DIFFER = re.compile(r"differ by \S+ of the largest output")
LONGEST = 160  # characters of a reason

HEAD = """\
# Pipelines

Written by `.venv/bin/python -m tests.pipelines --write`, in some ten minutes; do not edit it. `.venv/bin/python -m tests.pipelines NAME`
checks the entry of that name. `make .venv/dev.stamp` installs what both need.

Each row is a pipeline class of diffusers, or a task or mode of one. The pipeline is a tiny one with random weights, made from the
configuration classes of diffusers and transformers. {calls} calls, which differ in prompt, seed, steps, guidance and, where the
pipeline takes them, image, video or mask, ran one after the other on the plain pipeline, and all at once in a `StepEngine` on another
instance. The results were compared number by number, in float32 on the CPU. So the table shows that results do not depend on what else
runs. It does not show the quality of images, or the speed.

- **Shared**: the share of calls of the denoisers (transformers, UNets, priors, ControlNets) whose forward also served other jobs. The
  first calls of each kind, which are run both ways as a test, count as not shared.
- **Error**: an upper bound, rounded up to a power of ten, of the largest difference from the plain call. Pixels are in [0, 1]; for
  results with numbers larger than 1, the difference is divided by the largest number. It must not be more than {tolerance}, or than
  twice what last bits change in the plain call, where that is more.
- **What ran alone**: calls that could not share a forward, with the reason; their results are correct as well. *(takes turns)* means that a
  call installs hooks on the shared modules or changes their mode, so the engine runs one job at a time.

Versions: {versions}.
"""
TAIL = """\
## Classes not checked

These classes of diffusers have no row. Nothing is known of them except what similar pipelines show: the engine has no code for
single pipelines, and tests each kind of call before it batches it.

| reason | classes |
| --- | --- |
"""


# around the section that `tests.served` writes
BEGIN, END = "<!-- served: begin -->", "<!-- served: end -->"


def section_of(text: str) -> str:
    """What stands between the marks in a document."""
    return text.partition(BEGIN)[2].partition(END)[0].strip("\n")


def with_section(text: str, section: str) -> str:
    """The document with another text between the marks."""
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{section}\n\n{END}{rest.partition(END)[2]}"


def document(
    reports: Sequence[Report],
    entries: Mapping[str, Entry],
    not_built: Mapping[str, str],
    versions: Mapping[str, str],
    served: str = "",
) -> str:
    """The whole document; `served` is its section about the server."""
    parts = [
        HEAD.format(
            calls={6: "Six"}.get(CALLS, str(CALLS)),
            tolerance=f"{TOLERANCE:g}",
            versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        ),
        _summary(reports, not_built),
    ]
    for title, modules in GROUPS.items():
        rows = [
            _row(one, entries[one.name])
            for module in modules
            for one in reports
            if entries[one.name].module == module
        ]
        if rows:
            parts.append(f"## {title}\n\n{HEADER}\n" + "\n".join(rows) + "\n")
    by_reason = sorted(not_built.items(), key=lambda item: (item[1].lower(), item[0]))
    missing = [
        f"| {cell(reason)} | {', '.join(f'`{name}`' for name, _ in group)} |"
        for reason, group in groupby(by_reason, key=lambda item: item[1])
    ]
    parts.append(f"{BEGIN}\n\n{END}\n")
    parts.append(TAIL + "\n".join(missing) + "\n")
    return with_section("\n".join(parts), served)


HEADER = "| class | entry | shared | error | what ran alone |\n| --- | --- | --- | --- | --- |"


def classes(reports: Sequence[Report]) -> dict[str, bool | None]:
    """Whether a class merges, which it does if it does in any of its entries; None if it has no
    denoiser."""
    found: dict[str, bool | None] = {}
    for one in reports:
        if one.merged_share is None and not one.failed:
            found.setdefault(one.pipeline, None)
        else:
            found[one.pipeline] = one.merges or bool(found.get(one.pipeline))
    return found


def _summary(reports: Sequence[Report], not_built: Mapping[str, str]) -> str:
    found = classes(reports)
    merging = sum(one is True for one in found.values())
    denoising = sum(one is not None for one in found.values())
    turns = {one.pipeline for one in reports if TAKES_TURNS in one.alone}
    others = [name for name, merges in found.items() if merges is False and name not in turns]
    rows = {
        "pipeline classes in diffusers": len(found) + len(not_built),
        "classes checked": len(found),
        "entries: classes, with their tasks and modes": len(reports),
        "entries with the results of the plain call": sum(one.right for one in reports),
        "largest error": f"{max((one.largest_error for one in reports), default=0.0):.0e}",
        "classes that share forwards": (
            f"{merging} of {denoising} with a denoiser ({percent(merging / max(denoising, 1))})"
        ),
        "classes that run one job at a time (takes turns)": len(turns),
        "other classes that share no forward": ", ".join(f"`{name}`" for name in others) or "none",
    }
    wrong = [f"`{one.name}`" for one in reports if not one.right]
    if wrong:
        rows["entries with other results"] = ", ".join(wrong)
    return (
        "| | |\n| --- | --- |\n"
        + "\n".join(f"| {name} | {value} |" for name, value in rows.items())
        + "\n"
    )


def _row(report: Report, entry: Entry) -> str:
    name = f"`{report.name}`" + (f": {entry.note}" if entry.note else "")
    share = "no denoiser" if report.merged_share is None else percent(report.merged_share)
    error = _bound(report.largest_error)
    # how much they differ is another number on every machine
    notes = list(dict.fromkeys(_DIFFER.sub("differ", note) for note in report.alone))
    if report.merged_share == 0 and not notes:
        notes = ["no two calls were of one kind"]
    if report.failed:
        share = error = ""
        notes = [f"**failed**: {report.failed}"]
    elif not report.right:
        error = f"**{report.largest_error:.1e}**"
        notes += [f"**{report.errors} errors of the engine**"] * bool(report.errors)
    why = "; ".join("(takes turns)" if note == TAKES_TURNS else short(note) for note in notes)
    return f"| `{report.pipeline}` | {cell(name)} | {share} | {error} | {cell(why)} |"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _bound(error: float) -> str:
    """The next power of ten, so that a run on another machine says the same."""
    if error == 0:
        return "0"
    return f"1e{math.ceil(math.log10(error)):d}" if math.isfinite(error) else "not finite"


def short(reason: str) -> str:
    return reason if len(reason) <= LONGEST else reason[: LONGEST - 1].rstrip() + "…"


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
