"""What is told while a model is downloaded and read."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from stepweave.config import EMBEDDED_MODEL, Settings
from stepweave.errors import LoadError
from stepweave.loading.loader import load_pipeline
from stepweave.loading.progress import Components, amount, downloading
from tests.support.hub import COMMIT, PIECE, hub, point_to
from tests.support.waiting import SECONDS, wait_until

CPU = torch.device("cpu")
REPOSITORY = "owner/shapes"
Told = list[tuple[str, float, str]]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", PIECE)
    return Settings(model=REPOSITORY, revision=COMMIT)


def test_bytes_of_a_download_and_of_the_components_are_told(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: Told = []

    with ThreadPoolExecutor(1) as pool, hub(EMBEDDED_MODEL, REPOSITORY) as served:
        point_to(served, monkeypatch)
        loading = pool.submit(
            load_pipeline, settings, CPU, torch.float32, lambda *one: told.append(one)
        )
        # half of each file with weights comes
        wait_until(lambda: any(share > 0.3 for _, share, _ in told) or loading.done())
        assert not loading.done(), loading.exception()
        served.let_go.set()
        loading.result(SECONDS)
    downloads = [(share, message) for stage, share, message in told if stage == "downloading"]
    reads = [(share, message) for stage, share, message in told if stage == "loading"]
    assert [stage for stage, _, _ in told] == ["downloading"] * len(downloads) + ["loading"] * len(
        reads
    )
    for shares in ([share for share, _ in downloads], [share for share, _ in reads]):
        assert shares == sorted(shares) and shares[0] == 0 and shares[-1] <= 1
    assert any(
        message.startswith(f"{REPOSITORY}, ") and " MB" in message for _, message in downloads
    )
    assert {message.partition(",")[0] for _, message in reads} == {
        "transformer",
        "text_encoder",
        "text_encoder_2",
        "vae",
    }


def test_a_download_ends_its_thread_also_if_it_fails(tmp_path: Path) -> None:
    before = threading.active_count()
    with pytest.raises(OSError, match="no network"), downloading(tmp_path, {"a": 3}, print):
        raise OSError("no network")
    assert threading.active_count() == before


def test_a_server_that_shuts_down_is_no_error_of_the_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepweave.loading.progress.POLL_SECONDS", 0.001)
    calls = []

    def refuse(done: int, total: int) -> None:
        calls.append((done, total))
        raise LoadError("the server was shut down while it was loading")

    (tmp_path / "a.incomplete").write_bytes(b"12")
    (tmp_path / "other").write_bytes(b"12345")
    with downloading(tmp_path, {"a": 3, "b": 4}, refuse):
        wait_until(lambda: calls)
    assert calls == [(2, 7)]


def test_a_component_without_files_is_told_as_well() -> None:
    told: list[tuple[float, str]] = []
    components = Components({"vae/a": 1, "unet/b": 2, "unet/c": 1}, lambda *one: told.append(one))
    for name in ("unet", "other", "vae"):
        components.begin(name)
    assert told == [
        (0, "unet, 0.0 of 0.0 kB"),
        (0.75, "other, 0.0 of 0.0 kB"),
        (0.75, "vae, 0.0 of 0.0 kB"),
    ]


@pytest.mark.parametrize(
    ("done", "total", "text"),
    [(0, 5e9, "0.0 of 5.0 GB"), (1.5e6, 2e6, "1.5 of 2.0 MB"), (10, 999, "0.0 of 1.0 kB")],
)
def test_an_amount_has_the_unit_of_the_whole(done: float, total: float, text: str) -> None:
    assert amount(done, total) == text
