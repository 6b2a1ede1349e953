from __future__ import annotations

import re
from pathlib import Path

import pytest

from stepweave.config import EMBEDDED_MODEL, GROUPS, PREFIX, Settings, removed_settings
from stepweave.errors import ConfigError
from tests.support.environment import ROOT

pytestmark = pytest.mark.usefixtures("no_settings")


def test_defaults_serve_the_embedded_model() -> None:
    assert Settings.load().model_directory() == EMBEDDED_MODEL == ROOT / "models" / "shapes"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("STEPWEAVE_MAX_STEPS", "many", "STEPWEAVE_MAX_STEPS='many'"),
        (
            "STEPWEAVE_MAX_STEPS",
            "0",
            "STEPWEAVE_MAX_STEPS='0': Input should be greater than or equal to 1",
        ),
        ("STEPWEAVE_DTYPE", "int8", "STEPWEAVE_DTYPE='int8'"),
        (
            "STEPWEAVE_DEVICE",
            "tpu",
            "STEPWEAVE_DEVICE='tpu': `auto` (first GPU, else CPU), `cpu`, `cuda`",
        ),
        ("STEPWEAVE_REVISION", "main", "STEPWEAVE_REVISION='main'"),
        (
            "STEPWEAVE_API_KEYS",
            " , ",
            "STEPWEAVE_API_KEYS=...: the list has no values",
        ),
        ("STEPWEAVE_API_KEY", "sk-secret", "STEPWEAVE_API_KEY=...: there is no such setting"),
        ("STEPWEAVE_BASE_URL", "notaurl", "STEPWEAVE_BASE_URL='notaurl': must be like https://"),
        (
            "STEPWEAVE_MAX_STEP",
            "5",
            r"STEPWEAVE_MAX_STEP='5': there is no such setting (did you mean STEPWEAVE_MAX_STEPS?)",
        ),
        ("stepweave_modell", "x", "stepweave_modell='x': there is no such setting"),
        (
            "STEPWEAVE_MODEL",
            "/no/such/place",
            "STEPWEAVE_MODEL='/no/such/place' is neither an existing directory nor a hub id",
        ),
        ("STEPWEAVE_MODEL", "owner/name", "set STEPWEAVE_REVISION to its commit"),
        ("STEPWEAVE_REVISION", "0" * 40, "is a directory"),
    ],
)
def test_wrong_settings_are_refused_by_name_and_value(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        Settings.load()
    assert expected in caught.value.message


def test_a_removed_setting_is_ignored_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert removed_settings() == []
    monkeypatch.setenv("STEPWEAVE_POLICY", "fifo")
    assert Settings.load() == Settings()
    [message] = removed_settings()
    assert message.startswith("STEPWEAVE_POLICY is ignored:") and "Unset it" in message
    monkeypatch.setenv("STEPWEAVE_POLICY", "")
    assert removed_settings() == []


def test_every_problem_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPWEAVE_MAX_QUEUE", "-1")
    monkeypatch.setenv("STEPWEAVE_NONSENSE", "1")
    with pytest.raises(ConfigError, match=r"NONSENSE.*MAX_QUEUE"):
        Settings.load()


def test_values_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STEPWEAVE_MODEL", str(tmp_path))
    monkeypatch.setenv("STEPWEAVE_MAX_QUEUE", "3")
    monkeypatch.setenv("STEPWEAVE_WARMUP", "false")
    settings = Settings.load()
    assert (settings.model_directory(), settings.max_queue, settings.warmup) == (tmp_path, 3, False)


def test_kubernetes_service_links_are_not_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "SERVICE_HOST",
        "SERVICE_PORT",
        "SERVICE_PORT_HTTP",
        "PORT",
        "PORT_3000_TCP",
        "PORT_3000_TCP_ADDR",
        "PREDICTOR_SERVICE_HOST",
        "METRICS_PORT_8080_TCP",
    ):
        monkeypatch.setenv(f"STEPWEAVE_{name}", "tcp://10.0.0.1:3000")
    Settings.load()


def test_the_documented_table_is_the_code() -> None:
    rows = re.findall(
        r"^\| `(STEPWEAVE_\w+)` \| (.*?) \| (.*?) \|$",
        (ROOT / "docs/configure.md").read_text(),
        re.MULTILINE,
    )
    fields = ((name, Settings.model_fields[name]) for names in GROUPS.values() for name in names)
    # else: python -m tools.settings_table
    assert rows == [
        (
            f"{PREFIX}{name.upper()}",
            "" if field.default in (None, ()) else f"`{str(field.default).lower()}`",
            field.description,
        )
        for name, field in fields
    ]
