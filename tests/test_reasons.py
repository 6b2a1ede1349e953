from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stepweave.reasons import LONGEST, reason_of
from stepweave.serving.jobs import Jobs
from tests.support.fake_pipeline import FakePipeline
from tests.support.in_process import InProcess
from tests.support.waiting import wait_until


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            ValueError("/srv/models/mine/unet/config.json is\n  not a valid file"),
            "unet/config.json is not a valid file",
        ),
        (
            ValueError("see file:///srv/secret/a.json or at:/srv/secret/c.json"),
            "see a.json or at:c.json",
        ),
        (
            ValueError("https://host/a/b.json is not D:\\models\\secret\\d.json"),
            "https://host/a/b.json is not d.json",
        ),
        (ValueError("red \x1b[31m, NUL \0, half \ud800"), "red [31m, NUL , half"),
        (
            OSError(28, "No space left on device", "/srv/models/mine/a.json"),
            "a.json: No space left on device",
        ),
        (PermissionError(13, "Permission denied", "/home/me/.cache/hub/x"), "x: Permission denied"),
        (
            RuntimeError("cannot open /opt/secret place/file, nor ~/private/key"),
            "cannot open secret place/file, nor key",
        ),
        (OSError("see https://example.com/a/b for more"), "see https://example.com/a/b for more"),
        (OSError("in /srv/models/mine: no such file"), "in the model's directory: no such file"),
        (KeyError("weight_map"), "there is no 'weight_map'"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_a_reason_is_one_line_without_paths_of_the_server(error: Exception, told: str) -> None:
    assert reason_of(error, Path("/srv/models/mine")) == told


def test_a_long_reason_is_cut() -> None:
    reason = reason_of(ValueError("x" * 10_000))
    assert len(reason) == LONGEST and reason.endswith("...")


def failing(app: InProcess) -> tuple[int, str]:
    app.server.start()
    wait_until(lambda: app.server.status.stage == "failed")
    answer = app.client.get("/readyz")
    return answer.status_code, answer.json()["error"]["message"]


def test_a_failing_warm_up_is_told_in_its_own_words(in_process: Callable[..., InProcess]) -> None:
    pipeline = FakePipeline()
    pipeline.record.error = RuntimeError("expected scalar type Float but found Half")
    told = "failed, warming_up failed: expected scalar type Float but found Half."
    status, message = failing(in_process(pipeline, ready=False))
    assert status == 503 and message.endswith(told)


def test_a_state_directory_that_breaks_is_told_and_reported(
    in_process: Callable[..., InProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Any:
        raise OSError(28, "No space left on device", "/var/lib/stepweave/state.sqlite")

    monkeypatch.setattr(Jobs, "open", broken)
    app, reported = in_process(ready=False), []
    app.server._on_failure = reported.append
    status, message = failing(app)
    assert status == 503 and "STEPWEAVE_STATE_DIR: state.sqlite: No space left on device" in message
    assert reported == ["STEPWEAVE_STATE_DIR: state.sqlite: No space left on device"]
