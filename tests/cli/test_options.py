"""Options, environment variables and files: one setting."""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from stepweave.cli.main import COMMANDS, main
from stepweave.config import GROUPS, Settings


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def printed(*arguments: str) -> dict[str, object]:
    result = run("serve", *arguments, "--print-config")
    assert result.exit_code == 0, result.output
    settings: dict[str, object] = yaml.safe_load(result.output)
    return settings


def refused(*arguments: str) -> str:
    result = run("serve", *arguments, "--print-config")
    assert result.exit_code == 2, result.output
    assert len(result.output.splitlines()) == 1, result.output
    return result.output


def config(tmp_path: Path, text: str) -> str:
    path = tmp_path / "stepweave.yaml"
    path.write_text(text)
    return str(path)


def test_every_setting_is_in_one_group_and_has_an_option() -> None:
    assert sorted(chain(*GROUPS.values())) == sorted(Settings.model_fields)
    text = run("serve", "--help").output
    for group, names in GROUPS.items():
        assert f"\n{group}:\n" in text
        for name in set(names) - {"model"}:
            assert f"--{name.replace('_', '-')}" in text
            assert f"STEPWEAVE_{name.upper()}" in text.replace("\n", "").replace(" ", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    result = run(command, "-h")
    assert result.exit_code == 0 and result.output.startswith(f"Usage: main {command} ")


def test_a_flag_has_precedence_over_a_variable_and_that_over_a_file(tmp_path: Path) -> None:
    file = config(tmp_path, "max_rows: 8\nmax_jobs: 8\nmax-queue: 8\nport: 3108\n")
    os.environ["STEPWEAVE_MAX_ROWS"] = os.environ["STEPWEAVE_MAX_JOBS"] = "9"
    found = printed("--config", file, "--max-rows", "10")
    assert [found[name] for name in ("max_rows", "max_jobs", "max_queue", "threads", "port")] == [
        10, 9, 8, 4, 3108,
    ]  # fmt: skip


def test_values_of_all_kinds_are_read(tmp_path: Path) -> None:
    text = (
        "warmup: false\nmodel_names: [one, two]\nbase_url: http://example.org\n"
        "preset: {num_inference_steps: 8}\nmax_wait: 2.5\nstate_dir: null\n"
    )
    found = printed("--config", config(tmp_path, text), "--no-compile", "--vae-tiling")
    assert found["warmup"] is False and found["compile"] is False and found["vae_tiling"] is True
    assert found["model_names"] == ["one", "two"] and found["max_wait"] == 2.5
    assert found["preset"] == '{"num_inference_steps": 8}' and found["state_dir"] is None


def test_what_is_printed_is_a_file_of_the_same_settings(tmp_path: Path) -> None:
    arguments = ("--max-rows", "5", "--cors-origins", "http://a.org,http://b.org", "--port", "3111")
    result = run("serve", *arguments, "--print-config")
    assert printed("--config", config(tmp_path, result.output)) == yaml.safe_load(result.output)
    assert "max_rows: 5  # --max-rows\n" in result.output


@pytest.mark.parametrize("variable", ["STEPWEAVE_API_KEYS", "stepweave_api_keys"])
def test_keys_are_not_printed_and_not_replaced_by_something_else(
    variable: str, tmp_path: Path
) -> None:
    os.environ[variable] = "secret-one,secret-two"
    result = run("serve", "--print-config")
    assert result.exit_code == 0 and "secret" not in result.output
    assert "# api_keys is set, and not shown\n" in result.output
    del os.environ[variable]
    os.environ.pop("STEPWEAVE_API_KEYS", None)
    assert printed("--config", config(tmp_path, result.output))["api_keys"] == []


def test_a_variable_in_small_letters_has_precedence_over_a_file(tmp_path: Path) -> None:
    os.environ["stepweave_max_rows"] = "9"
    assert printed("--config", config(tmp_path, "max_rows: 7\n"))["max_rows"] == 9


def test_a_clients_variables_are_none_of_the_servers() -> None:
    os.environ["STEPWEAVE_CLIENT_KEY"], os.environ["STEPWEAVE_URL"] = "k", "http://a.org"
    assert printed()["api_keys"] == []


@pytest.mark.parametrize("text", ["api_keys: [hunter2", "hunter2 hunter2", "- hunter2"])
def test_a_wrong_file_is_not_quoted(text: str, tmp_path: Path) -> None:
    assert "hunter2" not in refused("--config", config(tmp_path, text))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--max-rows", "0"), "--max-rows='0': Input should be greater than or equal to 1"),
        (("--device", "tpu"), "--device='tpu': `auto`"),
        (("nowhere",), "MODEL='nowhere' is neither an existing directory nor a hub id"),
        (("owner/name",), "set STEPWEAVE_REVISION to its commit"),
        (("owner/name", "--revision", "main"), "--revision='main'"),
        (("--port", "99999"), "--port='99999': a port is a number, 1 to 65535"),
        (("--port", "abc"), "--port='abc': a port is a number, 1 to 65535"),
        (("--host", "localhost"), "--host='localhost': it must be an IP address"),
    ],
)
def test_a_wrong_value_is_named_as_it_was_given(arguments: tuple[str, ...], said: str) -> None:
    assert said in refused(*arguments)


def test_a_wrong_value_of_a_variable_or_a_file_is_named_as_such(tmp_path: Path) -> None:
    file = config(tmp_path, "max_rows: many\n")
    assert f"max_rows in {file}='many'" in refused("--config", file)
    os.environ["STEPWEAVE_MAX_JOBS"] = "none"
    assert "STEPWEAVE_MAX_JOBS='none'" in refused()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_row: 1", "there is no setting 'max_row' (did you mean max_rows?)"),
        ("just text", "it must be like `max_rows: 16`"),
        ("a: [1", "is not YAML"),
        ("1: 2", "there is no setting 1"),
        ("\x00", "is not YAML"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(text: str, said: str, tmp_path: Path) -> None:
    assert said in refused("--config", config(tmp_path, text))


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in run("serve", "--config", str(tmp_path / "none.yaml")).output
    (tmp_path / "raw.yaml").write_bytes(b"\xff\xfe\x00")
    assert "--config" in refused("--config", str(tmp_path / "raw.yaml"))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_get_a_script(shell: str) -> None:
    result = run("completion", shell)
    assert result.exit_code == 0 and "_STEPWEAVE_COMPLETE" in result.output


def test_options_of_settings_are_completed() -> None:
    words = {"_STEPWEAVE_COMPLETE": "bash_complete", "COMP_WORDS": "stepweave serve --max-r"}
    result = CliRunner().invoke(main, env={**words, "COMP_CWORD": "2"}, prog_name="stepweave")
    assert "--max-rows" in result.output
