"""The scripts of `examples/`, run as their README says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.support.environment import ROOT, clean_environment
from tests.support.served import Served
from tests.support.waiting import SECONDS
from tools.shapes.checker import wrong_parts

EXAMPLES = ROOT / "examples"
# the files that each example writes, with the prompt of those that must show it
RING = "a large blue ring on a yellow background"
CIRCLE = "a large red circle on a blue background"
STAR = "a small green star on a white background"
SQUARE = "a large yellow square on a blue background"
PROMPTS = (CIRCLE, STAR)
MADE = {
    "library.py": {"library-1.png": CIRCLE, "library-2.png": None},
    "openai_client.py": {"openai-1.png": CIRCLE, "openai-2.png": CIRCLE},
    "stream.py": {f"stream-{index}.png": None for index in range(3)} | {"stream-final.png": CIRCLE},
    "edit.py": {"edit.png": SQUARE},
    "many_prompts.py": {"prompt-1.png": CIRCLE, "prompt-2.png": STAR},
    "jobs.py": {"job.png": RING},
}
QUICK = ("stream.py", "jobs.py")
NOTEBOOK = "notebook.ipynb"
# of the notebook: its kernel, and what runs it without a browser
KERNEL = ("ipykernel>=7", "nbclient>=0.10", "httpx>=0.28")


def run(command: list[str], folder: Path, url: str) -> str:
    ended = subprocess.run(
        command,
        cwd=folder,
        env=clean_environment(STEPWEAVE_URL=url, PYTHONPATH=str(ROOT / "src")),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.full) for name in MADE],
)
def test_an_example_makes_its_images(name: str, served: Served, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    arguments = ["prompts.txt"] if name == "many_prompts.py" else []
    told = run([sys.executable, str(EXAMPLES / name), *arguments], tmp_path, served.url)
    assert {file.name for file in tmp_path.glob("*.png")} == set(MADE[name])
    for file, prompt in MADE[name].items():
        if name != "library.py":
            assert file in told
        with Image.open(tmp_path / file) as image:
            image.load()
            if prompt is not None:
                # it sends no seeds, and the model draws one outline of twelve wrong
                tolerated = {"shape"} if name == "many_prompts.py" else set()
                assert set(wrong_parts(image, prompt)) <= tolerated, file


@pytest.mark.full
def test_the_notebook_shows_progress_and_the_image(served: Served, tmp_path: Path) -> None:
    """In an environment of its own: a kernel is not among the development packages."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", *KERNEL], check=True)
    script = (
        "import nbformat, nbclient, sys; book = nbformat.read(sys.argv[1], as_version=4); "
        "nbclient.NotebookClient(book, timeout=600, kernel_name='python3').execute(); "
        "print(nbformat.writes(book))"
    )
    told = run([python, "-c", script, str(EXAMPLES / NOTEBOOK)], tmp_path, served.url)
    outputs = [output for cell in json.loads(told)["cells"] for output in cell.get("outputs", ())]
    shown = [output.get("data", {}) for output in outputs]
    assert any("image/png" in data for data in shown)
    assert any("step 20 of 20" in "".join(data.get("text/plain", "")) for data in shown)


def test_the_readme_lists_every_example() -> None:
    listed = re.findall(r"^\| \[([\w.]+)\]\(\1\) \|", (EXAMPLES / "README.md").read_text(), re.M)
    assert listed == [*MADE, NOTEBOOK]
    assert sorted(listed) == sorted(
        name for name in os.listdir(EXAMPLES) if name.endswith((".py", ".ipynb"))
    )
