"""The pipelines of tests/pipelines: that none is forgotten, that what is written of them is so, and
some of them for real."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.pipelines import processes
from tests.pipelines.catalog import NOT_BUILT, entries, exported
from tests.pipelines.check import TAKES_TURNS, Report
from tests.pipelines.document import GROUPS, classes, document
from tests.pipelines.registry import Entry
from tests.pipelines.run import RUNS, load, run, save
from tests.support.environment import ROOT

ENTRIES = entries()
VERSIONS = {"diffusers": "0.42.1", "torch": "2.13.0"}
LEAST_CLASSES = 50
LEAST_MERGING = 0.95  # of the classes with a denoiser; measured: 0.98


# That none is forgotten


def test_every_class_that_diffusers_exports_is_built_or_has_a_reason_not_to_be() -> None:
    built = {entry.pipeline for entry in ENTRIES.values()}
    # write an entry, or say in the catalog why not
    assert sorted(exported() - built - set(NOT_BUILT)) == []
    assert sorted(built & set(NOT_BUILT)) == []
    assert sorted(set(NOT_BUILT) - exported()) == []
    assert sorted(built - exported()) == []
    assert len(built) >= LEAST_CLASSES


def test_every_module_has_its_place_in_the_document() -> None:
    modules = [module for group in GROUPS.values() for module in group]
    assert sorted(modules) == sorted({entry.module for entry in ENTRIES.values()})


def test_the_document_names_every_entry_and_every_class() -> None:
    text = (ROOT / "docs/pipelines.md").read_text()
    found = {name: kind for kind, name in re.findall(r"^\| `(\w+)` \| `(\w+)`", text, re.MULTILINE)}
    # else: python -m tests.pipelines --write
    assert found == {name: entry.pipeline for name, entry in ENTRIES.items()}
    missing = text.partition("## Classes not checked")[2]
    assert set(re.findall(r"`(\w+Pipeline\w*)`", missing)) == set(NOT_BUILT)


def test_the_document_says_what_the_writer_would() -> None:
    """All but the results, which take minutes: the text, the notes on entries, the reasons."""
    text = (ROOT / "docs/pipelines.md").read_text()
    versions = dict(
        re.findall(r"(\w+) (\d[\w.+]*)", re.findall(r"^Versions: (.*)\.$", text, re.M)[0])
    )
    fresh = document([], ENTRIES, NOT_BUILT, versions)
    first, last = "| | |\n", "## Classes not checked"
    assert text.partition(first)[0] == fresh.partition(first)[0]
    assert text.partition(last)[2] == fresh.partition(last)[2]
    notes = dict(re.findall(r"^\| `\w+` \| `(\w+)`(?:: (.*?))? \|", text, re.M))
    assert notes == {name: entry.note for name, entry in ENTRIES.items()}


# The writer


def made_up() -> dict[str, Entry]:
    return {
        name: Entry(name, pipeline, note, module, lambda: None, {})
        for name, pipeline, note, module in (
            ("plain", "OnePipeline", "", "unets"),
            ("masked", "OnePipeline", "With a mask | of its own.", "unets"),
            ("swapping", "TurnsPipeline", "", "adapters_pag"),
            ("sounding", "SoundPipeline", "", "audio"),
            ("crashing", "CrashPipeline", "", "audio"),
            ("embedding", "EmbeddingPipeline", "", "audio"),
        )
    }


DIFFERING = tuple(
    f"unet: merged and alone differ by {error} of the largest output"
    for error in ("0.0013", "2e-4")
)


def reports(**changes: Report) -> list[Report]:
    made = {
        "plain": Report("plain", "OnePipeline", 0.0, 0.0),
        "masked": Report(
            "masked", "OnePipeline", 0.834, 3e-7, ("vae.decode: a | b\nc", *DIFFERING)
        ),
        "swapping": Report("swapping", "TurnsPipeline", 0.0, 0.0, (TAKES_TURNS,)),
        "sounding": Report("sounding", "SoundPipeline", 0.5, 2e-6),
        "crashing": Report("crashing", "CrashPipeline", 0.25, 1e-5),
        "embedding": Report("embedding", "EmbeddingPipeline", None, 0.0),
    }
    return list((made | changes).values())


def rows(text: str) -> dict[str, list[str]]:
    """The tables' rows by their second cell's first word."""
    lines = [
        re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("| `")
    ]
    cells = [[cell.strip() for cell in line] for line in lines]
    return {line[1].partition("`:")[0].strip("`"): line for line in cells}


def summary(text: str) -> dict[str, str]:
    table = text.partition("| | |\n| --- | --- |\n")[2].partition("\n\n")[0]
    return dict(line.strip("| ").split(" | ") for line in table.splitlines())


def test_what_agrees_is_written_with_its_share_and_a_bound_of_its_error() -> None:
    text = document(reports(), made_up(), {"OldPipeline": "too old"}, VERSIONS)
    assert "diffusers 0.42.1, torch 2.13.0" in text
    found = rows(text)
    assert found["masked"] == [
        "`OnePipeline`", "`masked`: With a mask \\| of its own.", "83 %", "1e-6",
        "vae.decode: a \\| b c; unet: merged and alone differ",
    ]  # fmt: skip
    assert found["plain"] == [
        "`OnePipeline`",
        "`plain`",
        "0 %",
        "0",
        "no two calls were of one kind",
    ]
    assert found["swapping"][4] == "(takes turns)"
    assert found["embedding"][2] == "no denoiser"
    assert summary(text) == {
        "pipeline classes in diffusers": "6",
        "classes checked": "5",
        "entries: classes, with their tasks and modes": "6",
        "entries with the results of the plain call": "6",
        "largest error": "1e-05",
        "classes that share forwards": "3 of 4 with a denoiser (75 %)",
        "classes that run one job at a time (takes turns)": "1",
        "other classes that share no forward": "none",
    }
    assert "| too old | `OldPipeline` |" in text
    sections = re.split(r"^## ", text, flags=re.MULTILINE)
    (sound,) = [part for part in sections if part.startswith("Sound")]
    assert sound.count("\n| `") == 3
    assert {len(row) for row in found.values()} == {5}


def test_what_differs_and_what_fails_is_shown() -> None:
    wrong = Report("sounding", "SoundPipeline", 0.5, 0.03, errors=2)
    failed = Report("crashing", "CrashPipeline", failed="took more than 300 s")
    text = document(reports(sounding=wrong, crashing=failed), made_up(), {}, VERSIONS)
    found = rows(text)
    assert found["sounding"] == [
        "`SoundPipeline`",
        "`sounding`",
        "50 %",
        "**3.0e-02**",
        "**2 errors of the engine**",
    ]
    assert found["crashing"] == [
        "`CrashPipeline`",
        "`crashing`",
        "",
        "",
        "**failed**: took more than 300 s",
    ]
    told = summary(text)
    assert told["entries with the results of the plain call"] == "4"
    assert told["entries with other results"] == "`sounding`, `crashing`"
    assert told["classes that share forwards"] == "2 of 4 with a denoiser (50 %)"
    assert told["largest error"] == "3e-02"
    assert told["other classes that share no forward"] == "`CrashPipeline`"


def test_a_report_is_right_only_if_it_agrees_and_the_engine_had_no_error() -> None:
    assert Report("a", "A", 0.5, 1e-4).right
    assert not Report("a", "A", 0.5, 1.1e-4).right
    assert Report("a", "A", 0.5, 1.1e-4, noise=6e-5).right
    assert not Report("a", "A", 0.5, 1.1e-4, noise=5e-5).right
    assert not Report("a", "A", 0.5, 2e-3, noise=1.0).right
    assert not Report("a", "A", 0.5, float("nan")).right
    assert not Report("a", "A", 0.5, 0.0, errors=1).right
    assert not Report("a", "A", failed="it fell").right


# Runs


@pytest.mark.parametrize(
    "name", ["flux_modular", pytest.param("flux_true_cfg", marks=pytest.mark.full)]
)
def test_some_agree_and_share_forwards(tmp_path: Path, name: str) -> None:
    (report,) = run([name], tmp_path)
    assert report.right, report
    assert report.merged_share is not None
    assert report.merged_share > 0.5
    assert load(report.name, tmp_path) == report
    assert load("stable_diffusion_xl_text", tmp_path) is None


def test_what_crashes_hangs_or_raises_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (late,) = run(["ddpm"], tmp_path, seconds=0.001)
    assert late.failed == "took more than 0.001 s"
    assert load("ddpm", tmp_path) == late
    monkeypatch.setitem(
        ENTRIES, "gone", Entry("gone", "GonePipeline", "", "unets", lambda: None, {})
    )
    (crashed,) = run(["gone"], tmp_path)  # the process does not know it, and ends with a KeyError
    assert crashed.failed == "its process ended with status 1"
    assert "KeyError" in (tmp_path / "gone.log").read_text()
    broken = tmp_path / "ddim.json"
    broken.write_text("{")
    assert load("ddim", tmp_path) is None


def test_reports_of_other_versions_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(Report("ddpm", "DDPMPipeline", 0.5), tmp_path / "ddpm.json")
    assert load("ddpm", tmp_path) == Report("ddpm", "DDPMPipeline", 0.5)
    monkeypatch.setattr(processes, "versions", lambda: {"diffusers": "0.1"})
    assert load("ddpm", tmp_path) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the reports of this run are kept, by all of its processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "pipelines"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ENTRIES)
def test_every_entry_agrees_with_its_plain_calls(name: str, folder: Path) -> None:
    (report,) = run([name], folder)
    assert report.right, (report, (folder / f"{name}.log").read_text()[-2000:])


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_nearly_all_classes_share_forwards(folder: Path, request: pytest.FixtureRequest) -> None:
    test = test_every_entry_agrees_with_its_plain_calls.__name__
    reports = RUNS.reports(ENTRIES, folder, request.session.items, test)
    found = {name: merges for name, merges in classes(reports).items() if merges is not None}
    alone = [name for name, merges in found.items() if not merges]
    assert len(found) - len(alone) >= LEAST_CLASSES
    assert len(alone) <= (1 - LEAST_MERGING) * len(found), alone
