"""`stepweave generate`: images from prompts, in this process or by a server."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import click
import httpx
from tqdm import tqdm

from stepweave.cli.connection import POLL_SECONDS, in_process, lost, over_http, told
from stepweave.cli.failures import INTERRUPTED, Failed, Usage
from stepweave.cli.options import Grouped, export, given_settings, setting_options
from stepweave.config import PREFIX
from stepweave.errors import shown
from stepweave.reasons import reason_of

GENERATIONS = "/v1/images/generations"
ASYNC = {"Prefer": "respond-async"}
BUSY = (429, 503)
NAME_BYTES = 60  # of the prompt, in a file's name
LEAVING_SECONDS = 10.0  # for the answer to a request that is interrupted
AGAIN_SECONDS = 2.0  # until a busy server is asked again, if it does not say
# settings of servers that answer other people, which are of no use in this process
SERVING = ("api_keys", "api_keys_file", "exit_on_failure", "state_dir")


@dataclass
class Task:
    """One request for images, and what came of it."""

    index: int
    body: dict[str, Any]
    files: list[str] = field(default_factory=list)
    answer: dict[str, Any] | None = None
    error: str | None = None

    def record(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "prompt": self.body["prompt"],
            "files": self.files,
            "error": self.error,
            **{
                name: None if self.answer is None else self.answer[name]
                for name in ("parameters", "timings", "warnings")
            },
        }


@click.command("generate", short_help="Make images, in this process or by a server.", cls=Grouped)
@click.argument("prompts", nargs=-1, metavar="PROMPT...")
@click.option(
    "--file",
    type=click.File("r"),
    help="File of prompts, one a line (- is standard input). A line that is a JSON object has the "
    'fields of a request: {"prompt": "a ring", "seed": 7}.',
)
@click.option("--url", help="URL of a server to ask, instead of loading the model here.")
@click.option(
    "--api-key", envvar="STEPWEAVE_CLIENT_KEY", show_envvar=True, help="Key of the server at --url."
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("images"),
    show_default=True,
    help="Folder of the images. Files that exist are kept.",
)
@click.option("-n", "count", type=click.IntRange(1), default=1, help="Images of each prompt.")
@click.option("--size", help="WIDTHxHEIGHT in pixels.")
@click.option("--seed", type=click.IntRange(0), help="Same seed, same image.")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps.")
@click.option("--guidance", type=float, help="Classifier-free guidance; 1 turns it off.")
@click.option("--negative-prompt", help="What the images should not show.")
@click.option("--format", "output_format", type=click.Choice(["png", "jpeg", "webp"]))
@click.option(
    "--set",
    "more",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Any other field of a request, as JSON or text; may be repeated.",
)
@click.option(
    "--at-once",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Requests in flight.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each prompt.")
@setting_options(without=SERVING)
def command(
    prompts: tuple[str, ...],
    file: TextIO | None,
    url: str | None,
    api_key: str | None,
    out: Path,
    count: int,
    size: str | None,
    seed: int | None,
    steps: int | None,
    guidance: float | None,
    negative_prompt: str | None,
    output_format: str | None,
    more: tuple[str, ...],
    at_once: int,
    as_json: bool,
    config: Path | None,
    **flags: Any,
) -> None:
    """Make an image of each PROMPT, in this process, or by the server at --url.

    The files, named after prompt and seed, have the parameters of their images within. Exit
    status 1 if a prompt failed; the others have their images then.
    """
    fields = {
        "n": count,
        "size": size,
        "seed": seed,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "negative_prompt": negative_prompt,
        "output_format": output_format,
        **_fields(more),
    }
    usual = {name: value for name, value in fields.items() if value is not None}
    bodies = [{"prompt": prompt} for prompt in prompts]
    bodies += [] if file is None else list(_read(file))
    if not bodies:
        raise Usage("give at least one prompt, as an argument or with --file")
    tasks = [Task(index, usual | body) for index, body in enumerate(bodies, 1)]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failed(f"--out: {out} cannot be made: {error.strerror}") from None
    if not os.access(out, os.W_OK | os.X_OK):
        raise Failed(f"--out: {out} cannot be written to")
    connection = _connection(url, api_key, config, flags)
    # ends as on Ctrl-C
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        asyncio.run(_run(tasks, connection, out, at_once, as_json))
    except KeyboardInterrupt:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED)  # the interpreter would wait for the hub's threads that download
    finally:
        signal.signal(signal.SIGTERM, before)
    failed = sum(task.error is not None for task in tasks)
    if failed:
        raise Failed(f"{failed} of {len(tasks)} prompts failed")


def _fields(more: Sequence[str]) -> dict[str, Any]:
    fields = {}
    for text in more:
        name, equals, value = text.partition("=")
        if not equals:
            raise Usage(f"--set {shown(text)}: it must be like true_cfg_scale=2.5")
        fields[name] = _json(value)
    return fields


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _read(file: TextIO) -> Iterator[dict[str, Any]]:
    try:
        lines = file.readlines()
    except UnicodeError as error:
        raise Usage(f"--file: {file.name} is not UTF-8: {error}") from None
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text:
            continue
        body = _json(text) if text.startswith("{") else {"prompt": text}
        if not isinstance(body, dict) or not isinstance(body.get("prompt"), str):
            raise Usage(f"--file: line {number} is {shown(text)}; an object needs a prompt")
        yield body


@contextlib.asynccontextmanager
async def _connection(
    url: str | None, key: str | None, config: Path | None, flags: Mapping[str, Any]
) -> AsyncIterator[httpx.AsyncClient]:
    if url is not None:
        named = [f"--{name.replace('_', '-')}" for name in flags if flags[name] is not None]
        named += [] if config is None else ["--config"]
        if named:
            raise Usage(f"{', '.join(named)}: not with --url, whose server has its own settings")
        async with over_http(url, key) as client:
            yield client
        return
    given = given_settings(flags, config)
    for name in SERVING:
        given.pop(name, None)
        os.environ.pop(f"{PREFIX}{name.upper()}", None)
    with _bar(100, "loading", unit="%") as bar:

        def on_stage(progress: float, message: str) -> None:
            bar.update(round(100 * progress) - bar.n)
            bar.set_postfix_str(message[:60])

        async with in_process(export(given), on_stage) as client:
            bar.close()
            yield client


def _bar(total: int, about: str, **options: Any) -> tqdm[Any]:
    """A progress bar on standard error, if that is a terminal."""
    return tqdm(
        total=total, desc=about, file=sys.stderr, disable=None, leave=False, dynamic_ncols=True,
        **options,
    )  # fmt: skip


async def _run(
    tasks: Sequence[Task],
    connection: contextlib.AbstractAsyncContextManager[httpx.AsyncClient],
    out: Path,
    at_once: int,
    as_json: bool,
) -> None:
    places = asyncio.Semaphore(at_once)
    async with connection as client:
        with _bar(len(tasks), "prompts", position=0) as all_of_them:

            async def one(task: Task) -> None:
                async with places:
                    try:
                        await _generate(client, task, out)
                    except Failed as error:
                        task.error = error.message
                    except httpx.HTTPError as error:
                        task.error = lost(error, client.base_url)
                    except Exception as error:  # others' images are made
                        task.error = reason_of(error)
                    _tell(task, as_json)
                    all_of_them.update()

            async with asyncio.TaskGroup() as group:
                for task in tasks:
                    group.create_task(one(task))


async def _generate(client: httpx.AsyncClient, task: Task, out: Path) -> None:
    """Make a task's images. Raises Failed."""
    job, location = await _accepted(client, task)
    about = task.body["prompt"][:30]
    with _bar(job["total_steps"], about, unit="step") as bar:
        try:
            while job["state"] in ("queued", "running"):
                await asyncio.sleep(POLL_SECONDS)
                response = await client.get(location)
                if response.status_code != 200:
                    raise Failed(told(response))
                job = response.json()
                bar.total = job["total_steps"]
                bar.update(job["step"] - bar.n)
        except asyncio.CancelledError:
            await asyncio.shield(client.delete(location))  # interrupted: it would go on
            raise
    if job["state"] != "succeeded":
        raise Failed(job["error"]["message"] if job["error"] else f"the job was {job['state']}")
    task.answer = job["result"]
    for number, image in enumerate(job["result"]["data"], 1):
        place = number if len(job["result"]["data"]) > 1 else None
        name = _name(task, image["seed"], place, job["result"]["output_format"])
        task.files.append(str(_write(out, name, base64.b64decode(image["b64_json"]))))


async def _accepted(client: httpx.AsyncClient, task: Task) -> tuple[dict[str, Any], str]:
    """The accepted job and its URL; waits while the server is busy. Raises Failed."""
    while True:
        body = task.body | {"response_format": "b64_json"}
        response = await _posted(client, body)
        if response.status_code not in BUSY:
            break
        await asyncio.sleep(_after(response))
    if response.status_code != 202:
        raise Failed(told(response))
    return response.json(), _location(response)


async def _posted(client: httpx.AsyncClient, body: dict[str, Any]) -> httpx.Response:
    """The answer to a request; if this task is cancelled meanwhile, the job is, too."""
    post = asyncio.ensure_future(client.post(GENERATIONS, json=body, headers=ASYNC))
    try:
        return await asyncio.shield(post)
    except asyncio.CancelledError:
        with contextlib.suppress(httpx.HTTPError, TimeoutError):
            response = await asyncio.wait_for(post, LEAVING_SECONDS)
            if response.status_code == 202:
                await client.delete(_location(response))
        raise


def _location(response: httpx.Response) -> str:
    """An accepted job's URL; a proxy may have put a path before it."""
    return str(response.url.join(response.headers["Location"]))


def _after(response: httpx.Response) -> float:
    """Seconds until a busy server may be asked again. Raises Failed if never."""
    text = response.headers.get("Retry-After", "")
    if response.status_code == 503 and not text:
        raise Failed(told(response))
    return float(text) if text.isdecimal() else AGAIN_SECONDS


def _name(task: Task, seed: int, number: int | None, kind: str) -> str:
    text = re.sub(r"[^\w-]+", "-", task.body["prompt"]).strip("-")
    # file systems allow 255 bytes
    words = text.encode()[:NAME_BYTES].decode(errors="ignore") or "image"
    several = "" if number is None else f"-{number}"
    return f"{task.index:03d}-{words}-{seed}{several}.{kind}"


def _write(out: Path, name: str, content: bytes) -> Path:
    """Write a file that does not exist yet: a number is added if it does. Raises Failed."""
    path, number = out / name, 1
    while True:
        try:
            with path.open("xb") as file:
                file.write(content)
            return path
        except FileExistsError:
            number += 1
            path = (out / name).with_stem(f"{Path(name).stem}_{number}")
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)  # what was written of it
            raise Failed(f"{path} cannot be written: {error.strerror}") from None


def _tell(task: Task, as_json: bool) -> None:
    try:
        _print(task, as_json)
    except BrokenPipeError:  # nobody reads any more; images are still written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print(task: Task, as_json: bool) -> None:
    with tqdm.external_write_mode(file=sys.stdout):
        if as_json:
            click.echo(json.dumps(task.record(), ensure_ascii=False))
        elif task.error is not None:
            click.echo(f"stepweave: {shown(task.body['prompt'])}: {task.error}", err=True)
        for file in () if as_json else task.files:
            click.echo(file)
