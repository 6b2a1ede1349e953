"""Loras under attack: files that change, memory that is short, and many threads at once."""

from __future__ import annotations

import errno
import gc
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from stepweave import Loras, StepEngine
from stepweave.adapters import loras as module
from stepweave.errors import (
    DeadlineExceededError,
    EngineClosedError,
    LoadError,
    LoraError,
    LoraNotFoundError,
    OutOfMemoryError,
    RequestCancelledError,
    UnavailableError,
)
from tests.support.loras import hooks_of, plain, save_lora
from tests.support.tiny import FAMILIES
from tests.support.together import (
    SECONDS,
    TOLERANCE,
    Gate,
    difference,
    numbers,
    until_loaded,
)

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SD3 = FAMILIES["stable_diffusion_3"]
EFFECT = 0.01
TARGETS = {"transformer": ("to_q", "to_v", "ff.net.0.proj"), "text_encoder": ("q_proj", "v_proj")}


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Three adapters of one size."""
    folder = tmp_path_factory.mktemp("contents")
    first = save_lora(folder / "0.safetensors", SD3.build, TARGETS)
    return [first.read_bytes(), *(other(first, seed).read_bytes() for seed in (1, 2))]


def other(first: Path, seed: int) -> Path:
    """A file like the first one, with other numbers."""
    torch.manual_seed(seed)
    tensors = {
        key: value.std() * torch.randn(value.shape) for key, value in load_file(first).items()
    }
    file = first.with_name(f"{seed}.safetensors")
    save_file(tensors, file, metadata={"format": "pt"})
    return file


def request(seed: int = 0, **changes: Any) -> dict[str, Any]:
    return SD3.arguments("a red circle", seed=seed, steps=3, **changes)


@pytest.fixture(scope="module")
def expected(contents: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> list[torch.Tensor]:
    """What plain calls with each of them give."""
    folder = tmp_path_factory.mktemp("plain")
    files = {}
    for i, content in enumerate(contents):
        files[f"number{i}"] = folder / f"{i}.safetensors"
        files[f"number{i}"].write_bytes(content)
    using = plain(SD3.build(), files)
    results = [numbers(using([(name, 1.0)])(**request())) for name in files]
    assert min(difference(results[i], results[i - 1]) for i in range(3)) > EFFECT
    return results


def right(job: Any, expected: torch.Tensor) -> None:
    assert difference(numbers(job.result(SECONDS)), expected) <= TOLERANCE


def submit(engine: StepEngine, *names: str, **options: Any) -> Any:
    return engine.submit(**request(), lora=[(name, 1.0) for name in names], **options)


def loaded(job: Any) -> Any:
    """The job, once its adapters are in memory."""
    until_loaded([job])
    return job


def until(happened: Callable[[], Any]) -> None:
    for _ in range(100 * SECONDS):
        if happened():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it has not happened")


# Files that change


def replace(file: Path, content: bytes) -> None:
    """As careful programs do."""
    new = file.with_suffix(".new")
    new.write_bytes(content)
    new.replace(file)


def overwrite(file: Path, content: bytes) -> None:
    """As `cp` does."""
    with file.open("r+b") as stream:
        stream.write(content)
        stream.truncate()
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))


@pytest.mark.parametrize("change", [pytest.param(replace, marks=pytest.mark.full), overwrite])
def test_jobs_keep_the_weights_of_a_file_that_is_replaced(
    change: Callable[[Path, bytes], None], contents: list[bytes], expected: list[torch.Tensor],
    tmp_path: Path,
) -> None:  # fmt: skip
    """All have the same prompt, whose encoder is adapted, too, and its results cached."""
    file = tmp_path / "one.safetensors"
    file.write_bytes(contents[0])
    pipeline = SD3.build()
    loras = Loras(pipeline, tmp_path)
    with StepEngine(pipeline, loras=loras) as engine:
        gate = Gate()
        right(submit(engine, "one"), expected[0])
        old = loaded(submit(engine, "one", observer=gate))
        change(file, contents[1])
        new = loaded(submit(engine, "one"))
        change(file, contents[2])
        newest = loaded(submit(engine, "one"))
        change(file, contents[0])
        again = loaded(submit(engine, "one"))
        gate.open()
        for job, wanted in ((old, 0), (new, 1), (newest, 2), (again, 0)):
            right(job, expected[wanted])
        assert loras.stats().loads <= 4
        assert len(loras.loaded()) == 1


def test_a_file_that_is_cut_off_while_it_is_used_harms_nobody(
    contents: list[bytes], expected: list[torch.Tensor], tmp_path: Path
) -> None:
    """Were its weights mapped, the process would end."""
    file = tmp_path / "one.safetensors"
    file.write_bytes(contents[0])
    pipeline = SD3.build()
    with StepEngine(pipeline, loras=Loras(pipeline, tmp_path)) as engine:
        gate = Gate()
        old = loaded(submit(engine, "one", observer=gate))
        os.truncate(file, 100)
        with pytest.raises(
            LoraError, match="'one' cannot be used: one.safetensors: damaged or cut"
        ):
            try:
                loaded(submit(engine, "one"))
                submit(engine, "one")  # which is known to be no use by now
            finally:
                gate.open()
        right(old, expected[0])
        file.write_bytes(contents[1])
        right(submit(engine, "one"), expected[1])
        file.unlink()
        with pytest.raises(LoraNotFoundError):
            submit(engine, "one")


@pytest.mark.full
def test_a_file_that_changes_while_it_is_read_is_not_used(
    contents: list[bytes], expected: list[torch.Tensor], tmp_path: Path
) -> None:
    file = tmp_path / "one.safetensors"
    file.write_bytes(contents[0])
    pipeline = SD3.build()
    loras = Loras(pipeline, tmp_path)

    def changing(*args: Any, **kwargs: Any) -> Any:
        found = read(*args, **kwargs)
        replace(file, contents[1])
        return found

    read = module.read_lora
    with StepEngine(pipeline, loras=loras) as engine:
        with (
            mock.patch.object(module, "read_lora", changing),
            pytest.raises(LoraError, match="has changed while it was read; try again"),
        ):
            submit(engine, "one").result(SECONDS)
        right(submit(engine, "one"), expected[1])


@pytest.mark.parametrize("where", ["open", "shutil.copyfile"])
def test_a_file_that_cannot_be_read_for_a_while_is_tried_again(
    where: str, contents: list[bytes], tmp_path: Path
) -> None:
    file = tmp_path / "one.safetensors"
    file.write_bytes(contents[0])
    loras = Loras(SD3.build(), tmp_path)
    full = OSError(errno.ENOSPC, "No space left on device")
    patched = {
        "open": mock.patch.object(Path, "open", side_effect=full),
        "shutil.copyfile": mock.patch("shutil.copyfile", side_effect=full),
    }[where]
    with (
        patched,
        pytest.raises(UnavailableError, match=r"'one' cannot be read now: one\.safet.*: No"),
    ):
        loras.load("one")
    assert loras.load("one").name == "one"


def test_what_cannot_be_looked_at_for_a_while_is_not_thereby_gone(
    contents: list[bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i, name in enumerate(("one", "two")):
        (tmp_path / f"{name}.safetensors").write_bytes(contents[i])
    loras = Loras(SD3.build(), tmp_path)
    loras.load("one")
    stale, stat = OSError(errno.ESTALE, "Stale file handle"), Path.stat

    def failing(path: Path, **options: Any) -> Any:
        if path.name in ("one.safetensors", "two.safetensors", "new.safetensors"):
            raise stale
        return stat(path, **options)

    (tmp_path / "new.safetensors").write_bytes(contents[2])
    with mock.patch.object(Path, "stat", failing):
        for _ in range(2):
            assert loras.names() == ["one", "two"]
            assert loras.choose([("one", 1.0)]) is not None, "it is in memory"
            with pytest.raises(UnavailableError, match="'two' cannot be read now: Stale file"):
                loras.choose([("two", 1.0)])
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if path == tmp_path:
            raise stale
        return scandir(path)

    with mock.patch.object(os, "scandir", refusing):
        for _ in range(2):
            assert loras.names() == ["one", "two"]
            loras.choose([("two", 1.0)])
    assert sorted(loras.loaded()) == ["one", "two"]
    told = [record.message for record in caplog.records if "Stale" in record.message]
    assert len(told) == 4, "each once"
    assert loras.names() == ["new", "one", "two"]
    loras.load("new")


def test_entries_that_are_no_adapters_are_told_once(
    contents: list[bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "one.safetensors").write_bytes(contents[0])
    (tmp_path / "README.md").touch()
    for name in ("Upper.SafeTensors", "old.ckpt", "my moon.safetensors", "x" * 80 + ".safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    loras = Loras(SD3.build(), tmp_path)
    assert loras.names() == ["one"]
    assert loras.names() == ["one"]
    told = "\n".join(record.message for record in caplog.records if "is ignored" in record.message)
    assert told.count("\n") == 4
    for reason in (
        "'Upper.SafeTensors' is ignored: LoRAs are .safetensors files",
        "'empty' is ignored: a folder is a LoRA if it has one .safetensors file",
        "'my moon.safetensors' is ignored: use 1 to 64 letters",
    ):
        assert reason in told


def test_a_place_that_is_no_directory_is_refused(contents: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "one.safetensors").write_bytes(contents[0])
    for place in ("nowhere", "one.safetensors"):
        with pytest.raises(LoadError, match="is no directory"):
            Loras(SD3.build(), tmp_path / place)


def test_what_is_removed_while_it_is_read_is_not_kept(
    contents: list[bytes], expected: list[torch.Tensor], tmp_path: Path
) -> None:
    for i, name in enumerate(("one", "two")):
        (tmp_path / f"{name}.safetensors").write_bytes(contents[i])
    pipeline = SD3.build()
    loras = Loras(pipeline, tmp_path)

    def removing(*args: Any, **kwargs: Any) -> Any:
        found = read(*args, **kwargs)
        loras.remove("one")
        return found

    read = module.read_lora
    with StepEngine(pipeline, loras=loras) as engine:
        with mock.patch.object(module, "read_lora", removing):
            with pytest.raises(LoraNotFoundError):
                loras.load("one")
            assert (loras.loaded(), loras.stats().bytes) == ({}, 0)
            loras._removed.clear()
            right(submit(engine, "one"), expected[0])  # it was there when the job named it
        until(lambda: loras.stats().bytes == 0)
        loras._removed.clear()
        each = loras.load("one").bytes
        with mock.patch.object(module, "read_lora", removing):
            both = loras.choose([("one", 1.0), ("two", 1.0)])
        assert loras.stats().bytes == 2 * each, "a job has both of them"
        assert sorted(loras.loaded()) == ["two"]
        del both
        until(lambda: loras.stats().bytes == each)


def test_a_slow_look_does_not_undo_a_newer_one(contents: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "one.safetensors").write_bytes(contents[0])
    loras = Loras(SD3.build(), tmp_path, looks=False)
    scandir, looking, go_on = os.scandir, threading.Event(), threading.Event()

    def slow(path: Any) -> Any:
        entries = scandir(path)
        if path == tmp_path and threading.current_thread().name.startswith("stepweave-lora-look"):
            looking.set()
            assert go_on.wait(SECONDS)
        return entries

    with mock.patch.object(os, "scandir", slow), ThreadPoolExecutor(1) as threads:
        older = loras.looker.submit(loras.look)
        assert looking.wait(SECONDS)
        (tmp_path / "two.safetensors").write_bytes(contents[1])
        newer = threads.submit(loras.look)
        go_on.set()
        older.result(SECONDS)
        newer.result(SECONDS)
    assert loras.names() == ["one", "two"]
    before = time.monotonic()
    loras.look()
    (tmp_path / "three.safetensors").write_bytes(contents[2])
    loras.look(before)  # one has begun since
    assert loras.names() == ["one", "two"]
    loras.look(time.monotonic())
    assert loras.names() == ["one", "three", "two"]


@pytest.mark.parametrize("options", [{"priority": "urgent"}, {"closed": True}])
def test_nothing_is_read_for_a_job_that_was_not_accepted(
    options: dict[str, Any], contents: list[bytes], tmp_path: Path
) -> None:
    (tmp_path / "one.safetensors").write_bytes(contents[0])
    pipeline = SD3.build()
    loras = Loras(pipeline, tmp_path)
    engine = StepEngine(pipeline, loras=loras)
    if options.pop("closed", False):
        engine.close()
    with loras._reading:  # until it has failed
        with pytest.raises((KeyError, EngineClosedError)):
            submit(engine, "one", **options)
    loras.reader.submit(int).result(SECONDS)
    assert loras.stats().loads == 0
    engine.close()


def test_nothing_is_loaded_for_who_has_left(contents: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "one.safetensors").write_bytes(contents[0])
    loras = Loras(SD3.build(), tmp_path)
    with pytest.raises(LoraError, match="Nobody waits"):
        loras.reader.submit(loras.load, "one", lambda: True).result(SECONDS)
    assert loras.stats().loads == 0
    assert loras.reader.submit(loras.load, "one", lambda: False).result(SECONDS).name == "one"


def test_memory_that_runs_out_is_no_fault_of_the_file(
    contents: list[bytes], tmp_path: Path
) -> None:
    (tmp_path / "one.safetensors").write_bytes(contents[0])
    loras = Loras(SD3.build(), tmp_path)
    ran_out = torch.OutOfMemoryError("CUDA out of memory")
    with (
        mock.patch("stepweave.adapters.lora_files.adapter_layer", side_effect=ran_out),
        pytest.raises(OutOfMemoryError, match=r"one\.safetensors does not fit into memory"),
    ):
        loras.load("one")
    assert loras.load("one").name == "one"


def test_an_adapter_is_removed_and_loaded_again_while_jobs_use_it(
    contents: list[bytes], expected: list[torch.Tensor], tmp_path: Path
) -> None:
    (tmp_path / "one.safetensors").write_bytes(contents[0])
    pipeline = SD3.build()
    loras = Loras(pipeline, tmp_path)
    with StepEngine(pipeline, loras=loras) as engine:
        gates = [Gate(), Gate()]
        first = loaded(submit(engine, "one", observer=gates[0]))
        bytes = loras.stats().bytes
        loras.remove("one")
        assert loras.names() == []
        with pytest.raises(LoraNotFoundError):
            submit(engine, "one")
        with pytest.raises(LoraNotFoundError):
            loras.remove("one")
        assert loras.stats().bytes == bytes  # which the job still uses
        loras.load("one")
        second = submit(engine, "one", observer=gates[1])
        assert loras.stats().bytes == bytes
        loras.remove("one")
        gc.collect()
        gates[0].open()
        gates[1].open()
        right(first, expected[0])
        right(second, expected[0])
        until(lambda: loras.stats().bytes == 0)
        loras.load("one")
        right(submit(engine, "one"), expected[0])


def test_only_regular_files_are_adapters(contents: list[bytes], tmp_path: Path) -> None:
    """Who opens a pipe waits for its writer."""
    loras = Loras(SD3.build(), tmp_path)
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "nowhere.safetensors").symlink_to(tmp_path / "no-such-file")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / "pytorch_lora_weights.safetensors")
    (tmp_path / "one.safetensors").write_bytes(contents[0])
    assert loras.names() == ["one"]
    for name in ("pipe", "nowhere", "folder", "folder.safetensors"):
        with pytest.raises(LoraNotFoundError):
            loras.load(name)
    loras.load("one")
    (tmp_path / "one.safetensors").unlink()
    os.mkfifo(tmp_path / "one.safetensors")
    with pytest.raises(LoraNotFoundError):
        loras.load("one")


def test_an_adapter_whose_file_is_gone_takes_no_memory(
    contents: list[bytes], tmp_path: Path
) -> None:
    loras = Loras(SD3.build(), tmp_path)
    (tmp_path / "one.safetensors").write_bytes(contents[0])
    loras.load("one")
    (tmp_path / "one.safetensors").unlink()
    assert loras.names() == [] and loras.loaded() == {} and loras.stats().bytes == 0


def test_an_adapter_that_cannot_be_loaded_again_stays_removed(
    contents: list[bytes], tmp_path: Path
) -> None:
    loras = Loras(SD3.build(), tmp_path)
    (tmp_path / "one.safetensors").write_bytes(contents[0])
    loras.remove("one")
    (tmp_path / "one.safetensors").write_bytes(b"damaged")
    with pytest.raises(LoraError, match="'one' cannot be used"):
        loras.load("one")
    assert loras.names() == []


# Memory


@pytest.fixture
def three(contents: list[bytes], tmp_path: Path) -> tuple[Path, int]:
    """A directory of four adapters, and the memory for three."""
    for i in range(4):
        (tmp_path / f"number{i}.safetensors").write_bytes(contents[i % 3])
    loras = Loras(SD3.build(), tmp_path)
    return tmp_path, 3 * loras.load("number0").bytes + 5000


@pytest.mark.full
def test_the_least_recently_used_leaves_but_none_in_use(
    three: tuple[Path, int], expected: list[torch.Tensor]
) -> None:
    folder, max_bytes = three
    pipeline = SD3.build()
    loras = Loras(pipeline, folder, max_bytes=max_bytes)
    with StepEngine(pipeline, loras=loras) as engine:
        gate = Gate()
        held = loaded(submit(engine, "number0", observer=gate))
        loras.load("number1")
        loras.load("number2")
        loras.load("number1")
        loras.load("number3")
        assert sorted(loras.loaded()) == ["number0", "number1", "number3"]
        assert loras.stats().evictions == 1
        gate.open()
        right(held, expected[0])
        right(submit(engine, "number2"), expected[2])


@pytest.mark.full
def test_what_never_fits_into_memory_is_refused_by_name(
    three: tuple[Path, int], expected: list[torch.Tensor]
) -> None:
    folder, max_bytes = three
    pipeline = SD3.build()
    with StepEngine(pipeline, loras=Loras(pipeline, folder, max_bytes=5000)) as engine:
        with pytest.raises(LoraError, match="'number1' cannot be used: it has .* bytes; the limit"):
            submit(engine, "number1")
        submit(engine).result(SECONDS)
    pipeline = SD3.build()
    loras = Loras(pipeline, folder, max_bytes=max_bytes)
    with StepEngine(pipeline, loras=loras) as engine:
        with pytest.raises(LoraError, match="The LoRAs .*number3.* bytes together; the limit is"):
            submit(engine, "number0", "number1", "number2", "number3").result(SECONDS)
        right(submit(engine, "number1"), expected[1])
        submit(engine, "number3", "number2", "number1").result(SECONDS)


def test_what_is_in_use_is_at_hand_while_another_waits_and_who_gives_up_waits_no_more(
    three: tuple[Path, int], expected: list[torch.Tensor]
) -> None:
    folder, max_bytes = three
    pipeline = SD3.build()
    loras = Loras(pipeline, folder, max_bytes=max_bytes)
    with StepEngine(pipeline, loras=loras) as engine, ThreadPoolExecutor(1) as threads:
        gate, left = Gate(), threading.Event()
        jobs = [loaded(submit(engine, f"number{i}", observer=gate)) for i in range(3)]
        try:
            waiting = threads.submit(loras.choose, [("number3", 1.0)], left.is_set)
            until(lambda: loras._waiting)
            jobs.append(submit(engine, "number1"))
            (folder / "long.safetensors").write_bytes(bytes(max_bytes + 1))
            with pytest.raises(LoraError, match="'long' cannot be used: it has .* bytes"):
                submit(engine, "long")
            assert not waiting.done()
            left.set()
            with pytest.raises(LoraError, match="Nobody waits"):
                waiting.result(SECONDS)
            assert loras._waiting is None
        finally:
            gate.open()
        for job, wanted in zip(jobs, [*expected, expected[1]], strict=True):
            right(job, wanted)
        right(submit(engine, "number3"), expected[0])


def test_who_waits_for_memory_goes_on_when_jobs_end_or_are_cancelled(
    three: tuple[Path, int], expected: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.0)
    folder, max_bytes = three
    pipeline = SD3.build()
    loras = Loras(pipeline, folder, max_bytes=max_bytes)
    with StepEngine(pipeline, loras=loras) as engine:
        for end in ("ends", "is cancelled"):
            gate = Gate()
            jobs = [loaded(submit(engine, f"number{i}", observer=gate)) for i in range(3)]
            try:
                waiting = [submit(engine, "number3")]
                until(lambda: loras._waiting)
                waiting.append(submit(engine, "number1"))
                if end == "is cancelled":
                    for job in jobs:
                        job.cancel()
                assert all(job.loading and not job.done() for job in waiting)
                assert engine.waiting >= 2
            finally:
                gate.open()
            right(waiting[0], expected[0])
            right(waiting[1], expected[1])
            for job, wanted in zip(jobs, expected, strict=True):
                if end == "ends":
                    right(job, wanted)
                else:
                    assert isinstance(job.exception(SECONDS), RequestCancelledError)


@pytest.mark.full
def test_an_engine_that_closes_ends_the_wait_for_memory(three: tuple[Path, int]) -> None:
    folder, max_bytes = three
    pipeline = SD3.build()
    loras = Loras(pipeline, folder, max_bytes=max_bytes)
    engine = StepEngine(pipeline, loras=loras)
    gate = Gate()
    jobs = [loaded(submit(engine, f"number{i}", observer=gate)) for i in range(3)]
    waiting = submit(engine, "number3")
    with ThreadPoolExecutor(1) as threads:
        try:
            until(lambda: loras._waiting)
            closing = threads.submit(engine.close)
        finally:
            gate.open()
        closing.result(SECONDS)
    assert isinstance(waiting.exception(SECONDS), RequestCancelledError)
    assert all(job.done() for job in jobs)
    until(lambda: loras._waiting is None)


@pytest.mark.full
def test_an_engines_own_thread_does_not_wait_for_its_jobs(
    three: tuple[Path, int], expected: list[torch.Tensor]
) -> None:
    folder, max_bytes = three
    pipeline = SD3.build()
    loras = Loras(pipeline, folder, max_bytes=max_bytes)
    errors: list[BaseException] = []
    later: list[Any] = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        for _ in range(2):
            try:
                loras.load("number3")
            except LoraError as error:
                errors.append(error)
            if not later:
                later.append(submit(engine, "number3"))
                until(lambda: loras._waiting)
        return tensors

    with StepEngine(pipeline, loras=loras) as engine:
        names = [(f"number{i}", 0.0 if i else 1.0) for i in range(3)]
        right(engine.submit(**request(callback_on_step_end=callback), lora=names), expected[0])
        for job in later:
            right(job, expected[0])
    assert "All memory for LoRAs is in use by jobs that wait for this thread" in str(errors[0])
    assert "Another LoRA is read, perhaps until jobs end that wait for this thread" in str(
        errors[1]
    )


@pytest.mark.full
@pytest.mark.parametrize("mode", ["step", "threads"])
def test_many_adapters_pass_through_a_memory_of_three(
    mode: Any, contents: list[bytes], tmp_path: Path
) -> None:
    first = tmp_path / "0.safetensors"
    first.write_bytes(contents[0])
    count = 100
    files = {f"number{i}": other(first, i) for i in range(1, count + 1)}
    pipeline = SD3.build()
    wanted = {}
    for name, file in files.items():
        wanted[name] = numbers(plain(pipeline, {name: file})([(name, 0.9)])(**request()))
        pipeline.delete_adapters([name])
    pipeline = SD3.build()
    max_bytes = 3 * Loras(pipeline, tmp_path).load("0").bytes + 5000
    loras = Loras(pipeline, files=files, max_bytes=max_bytes)
    most = []

    def one(seed: int) -> None:
        name = f"number{1 + seed * 37 % count}"
        job = engine.submit(**request(), lora=[(name, 0.9)])
        most.append(loras.stats().bytes)
        right(job, wanted[name])

    with StepEngine(pipeline, mode, loras=loras) as engine, ThreadPoolExecutor(5) as threads:
        list(threads.map(one, range(2 * count)))
        stats = loras.stats()
    assert max(most) <= max_bytes
    assert stats.evictions >= count - 3
    assert stats.failures == 0
    assert stats.loaded <= 3


# Threads and engines


@pytest.mark.full
def test_others_run_on_while_an_adapter_is_read(
    three: tuple[Path, int], expected: list[torch.Tensor]
) -> None:
    folder, _ = three
    pipeline = SD3.build()
    loras = Loras(pipeline, folder)
    reading, go_on = threading.Event(), threading.Event()
    threads_of_reading = []

    def slow(file: Path, name: str, *args: Any, **kwargs: Any) -> Any:
        threads_of_reading.append(threading.current_thread().name)
        reading.set()
        assert go_on.wait(SECONDS)
        return read(file, name, *args, **kwargs)

    read = module.read_lora
    with StepEngine(pipeline, loras=loras) as engine:
        loras.load("number0")
        with mock.patch.object(module, "read_lora", slow):
            late = submit(engine, "number1")
            try:
                assert reading.wait(SECONDS)
                right(submit(engine, "number0"), expected[0])
                submit(engine).result(SECONDS)
                assert late.loading
                assert not late.done()
            finally:
                go_on.set()
            right(late, expected[1])
    assert not any("engine" in name for name in threads_of_reading)


@pytest.mark.parametrize("mode", ["step", "threads"])
def test_a_job_ends_though_its_adapter_is_still_read(mode: Any, three: tuple[Path, int]) -> None:
    folder, _ = three
    pipeline = SD3.build()
    loras = Loras(pipeline, folder)
    go_on, read = threading.Event(), []

    def slow(file: Path, name: str, *args: Any, **kwargs: Any) -> Any:
        read.append(name)
        assert go_on.wait(SECONDS)
        return actual(file, name, *args, **kwargs)

    actual = module.read_lora
    with StepEngine(pipeline, mode, loras=loras) as engine:
        try:
            with mock.patch.object(module, "read_lora", slow):
                cancelled = submit(engine, "number0")
                until(lambda: read)
                skipped = submit(engine, "number1")
                late = submit(engine, "number2", deadline=0.05)
                assert cancelled.loading and late.loading and engine.waiting >= 2
                assert engine.stalled() == 0.0, "it waits for no forward"
                cancelled.cancel()
                skipped.cancel()
                assert isinstance(cancelled.exception(SECONDS), RequestCancelledError)
                assert isinstance(late.exception(SECONDS), DeadlineExceededError)
                submit(engine).result(SECONDS)
                assert engine.waiting == 0
                go_on.set()
                loras.load("number0")
        finally:
            go_on.set()
        assert set(read) == {"number0"}, "nothing is read for jobs that have ended"


@pytest.mark.full
def test_engines_of_one_process_do_not_know_each_others_adapters(
    three: tuple[Path, int], expected: list[torch.Tensor]
) -> None:
    """Those of the second are let go of while the first one's are in use."""
    folder, _ = three
    pipelines = [SD3.build(), SD3.build()]
    sources = [Loras(pipeline, folder) for pipeline in pipelines]
    with StepEngine(pipelines[0], loras=sources[0]) as one:
        gate = Gate()
        held = submit(one, "number0", observer=gate)
        with StepEngine(pipelines[1], loras=sources[1]) as two:
            right(submit(two, "number1"), expected[1])
            right(submit(two, "number0"), expected[0])
            for name in ("number0", "number1"):
                sources[1].remove(name)
            gc.collect()
        gate.open()
        right(held, expected[0])
        assert one.stats().errors == 0


@pytest.mark.full
def test_threads_that_start_jobs_at_once_add_an_adapter_once(
    three: tuple[Path, int], expected: list[torch.Tensor]
) -> None:
    folder, _ = three
    for _ in range(3):
        pipeline = SD3.build()
        loras = Loras(pipeline, folder)
        loras.load("number0")
        with StepEngine(pipeline, "threads", threads=4, loras=loras) as engine:
            jobs = [submit(engine, "number0") for _ in range(4)]
            for job in jobs:
                right(job, expected[0])
            layers = [part for part in pipeline.transformer.modules() if part._forward_hooks]
            assert layers
            assert all(len(layer._forward_hooks) == 1 for layer in layers)


@pytest.mark.full
@pytest.mark.parametrize("mode", ["step", "threads", "off", "request"])
def test_nothing_is_left_behind(
    mode: Any, three: tuple[Path, int], expected: list[torch.Tensor]
) -> None:
    """Neither adapters, nor hooks, nor the pipeline itself."""
    folder, max_bytes = three
    pipeline = SD3.build()
    before = numbers(pipeline(**request()))
    loras = Loras(pipeline, folder, max_bytes=max_bytes)
    for _ in range(2):  # a second engine of the same pipeline, too
        with StepEngine(pipeline, mode, loras=loras) as engine:
            jobs = [submit(engine, "number0"), submit(engine, "number1"), submit(engine)]
            right(jobs[0], expected[0])
            right(jobs[1], expected[1])
            assert difference(numbers(jobs[2].result(SECONDS)), before) <= TOLERANCE
            failing = engine.submit(**request(height=-1), lora=[("number2", 1.0)])
            assert failing.exception(SECONDS) is not None
            adapters = [weakref.ref(adapter) for adapter in loras.loaded().values()]
            weights = [
                weakref.ref(part)
                for adapter in adapters
                for part in adapter().layers.values()  # type: ignore[union-attr]
            ]
            for name in ("number0", "number1", "number2"):
                loras.remove(name)
            assert loras.stats().bytes == 0  # although the callers have their jobs
            gc.collect()
            assert len(adapters) == 3
            assert not any(adapter() for adapter in adapters)
            assert not any(part() for part in weights)
            for name in ("number0", "number1", "number2"):
                loras.load(name)
        assert hooks_of(pipeline) == []
    assert torch.equal(numbers(pipeline(**request())), before)
    kept = weakref.ref(pipeline.transformer)
    del pipeline, loras, engine, jobs, failing
    gc.collect()
    assert kept() is None
