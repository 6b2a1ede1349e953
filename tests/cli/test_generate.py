"""`stepweave generate`: by a server, and in this process."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from stepweave.cli.main import main
from tests.support.environment import clean_environment, free_port
from tests.support.served import PROMPT, Served, metric
from tests.support.waiting import SECONDS, wait_until
from tools.shapes.checker import wrong_parts

QUICK = ("--steps", "2")


def generate(*arguments: str, text: str | None = None) -> Result:
    return CliRunner().invoke(main, ["generate", *arguments], input=text)


def test_a_server_makes_several_prompts_images(served: Served, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "images"
    result = generate(
        PROMPT, "a small green square", "--url", served.url, "--out", str(out), "--seed", "7"
    )
    assert result.exit_code == 0, result.output
    first, second = sorted(out.iterdir())
    assert first.name == "001-a-large-red-circle-on-a-blue-background-7.png"
    assert sorted(result.stdout.splitlines()) == [str(first), str(second)]
    with Image.open(first) as image:
        assert wrong_parts(image, PROMPT) == []
        assert json.loads(image.info["stepweave"])["seed"] == 7


def test_files_that_exist_are_kept(served: Served, tmp_path: Path) -> None:
    arguments = (PROMPT, "--url", served.url, "--out", str(tmp_path), "--seed", "7", *QUICK)
    for _ in range(2):
        assert generate(*arguments).exit_code == 0
    assert len(list(tmp_path.iterdir())) == 2


def test_prompts_of_a_file_may_have_fields_of_their_own(served: Served, tmp_path: Path) -> None:
    lines = ["a ring", "", json.dumps({"prompt": "a star", "seed": 5, "n": 2})]
    result = generate(
        "--file", "-", "--url", served.url, "--out", str(tmp_path), "--json", "--seed", "3",
        "--format", "jpeg", "--set", "guidance_scale=1.5", *QUICK, text="\n".join(lines),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    ring, star = sorted(map(json.loads, result.stdout.splitlines()), key=lambda one: one["prompt"])
    assert (ring["parameters"]["seed"], star["parameters"]["seed"]) == (3, 5)
    assert ring["parameters"]["guidance_scale"] == 1.5
    assert [Path(file).name for file in star["files"]] == [
        "002-a-star-5-1.jpeg",
        "002-a-star-6-2.jpeg",
    ]


def test_a_refusal_is_told_and_the_others_are_made(served: Served, tmp_path: Path) -> None:
    text = json.dumps({"prompt": "a ring", "num_inference_steps": 100_000}) + "\na star\n"
    result = generate("--file", "-", "--url", served.url, "--out", str(tmp_path), *QUICK, text=text)
    assert result.exit_code == 1
    assert "num_inference_steps is 100000" in result.stderr
    assert "1 of 2 prompts failed" in result.stderr
    assert len(list(tmp_path.iterdir())) == 1


def test_a_prompt_that_cannot_be_sent_does_not_harm_the_others(
    served: Served, tmp_path: Path
) -> None:
    lines = [
        '{"prompt": "a", "guidance_scale": NaN}',
        '{"prompt": "b", "n": null}',
        json.dumps({"prompt": "\U0001f534" * 100}),
    ]
    arguments = ("--url", served.url, "--out", str(tmp_path), *QUICK)
    result = generate("--file", "-", *arguments, text="\n".join(lines))
    assert result.exit_code == 1 and "1 of 3 prompts failed" in result.stderr
    assert "Traceback" not in result.output
    assert len(list(tmp_path.iterdir())) == 2


def test_nobody_who_reads_does_not_keep_images_from_being_made(
    served: Served, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "stepweave", "generate", "a ring", "a star", *QUICK]
    shell = f"{shlex.join([*command, '--url', served.url, '--out', str(tmp_path)])} | true"
    ended = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {shell}"],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert len(list(tmp_path.iterdir())) == 2


def test_settings_of_a_server_are_refused_with_its_url(tmp_path: Path) -> None:
    result = generate("a ring", "--url", "http://127.0.0.1:1", "--max-rows", "2")
    assert result.exit_code == 2 and "--max-rows: not with --url" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give at least one prompt"),
        (("a ring", "--url", "http://127.0.0.1:1", "--api-key", "ключ"), "--api-key has"),
        (
            ("a ring", "--url", "localhost:3000"),
            "--url='localhost:3000': it must begin with http://",
        ),
        (("a ring", "--set", "seed"), "--set 'seed'"),
        (("a ring", "--steps", "0"), "--steps"),
        (("a ring", "--max-rows", "0"), "--max-rows='0'"),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    result = generate(*arguments, "--out", str(tmp_path))
    assert result.exit_code == 2 and said in result.stderr


def test_a_server_that_is_not_there_is_told(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    result = generate("a ring", "--url", url, "--out", str(tmp_path))
    assert result.exit_code == 1 and f"{url} cannot be reached" in result.stderr


def test_a_folder_that_cannot_be_written_is_told(served: Served, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = generate("a ring", "--url", served.url, "--out", str(tmp_path / "file" / "below"))
    assert result.exit_code == 1 and "--out: " in result.stderr


def heed_interrupts() -> None:
    """As at a terminal: shells' background processes ignore them, and what these start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_interrupted_command_cancels_what_it_asked_for(served: Served, tmp_path: Path) -> None:
    def saved() -> float:
        return metric(served.url, "stepweave_steps_saved_total")

    before = saved()
    command = [sys.executable, "-m", "stepweave", "generate", PROMPT, "--steps", "150", "-n", "4"]
    with subprocess.Popen(
        [*command, "--url", served.url, "--out", str(tmp_path)],
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    ) as process:
        wait_until(
            lambda: metric(served.url, "stepweave_requests_in_flight") or process.poll() is not None
        )
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 130, errors
    assert output == "" and "Traceback" not in errors
    wait_until(lambda: saved() > before)
