"""Requests of several LoRAs on one server: shared steps, against batches of one adapter each, with
the embedded model: `python -m benchmarks.loras`."""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model_state_dict

from benchmarks.calls import FRESH, SECONDS, Call, run, twin
from benchmarks.measure import Part, Report, Row, Spread
from benchmarks.shapes import Shapes
from stepweave import Loras, StepEngine
from stepweave.config import Settings
from stepweave.loading.device import set_cpu_threads

JOBS, ADAPTERS, RANK = 16, 4, 8
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"]
NAMES = [f"style{number}" for number in range(ADAPTERS)]
BATCHES = (1, 2, 4)  # sizes that batches of one adapter may have; the best counts
GAPS = (0.0, 0.1)  # seconds between two arrivals


def save(shapes: Shapes, folder: Path, name: str, seed: int) -> Path:
    """A random adapter of the attention."""
    pipeline = twin(shapes.pipeline)
    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS, init_lora_weights=False)
    pipeline.transformer.add_adapter(config, name)
    tensors = get_peft_model_state_dict(pipeline.transformer, adapter_name=name)
    StableDiffusion3Pipeline.save_lora_weights(folder / name, transformer_lora_layers=tensors)
    return folder / name


class Arrivals:
    """Jobs that arrive one after another, from a start on."""

    def __init__(self, calls: Sequence[Call], gap: float) -> None:
        self.calls = calls
        self._gap = gap
        self.began = time.perf_counter()

    def at(self, number: int) -> float:
        """When a job arrives."""
        return self.began + number * self._gap

    def wait(self, number: int) -> None:
        time.sleep(max(0.0, self.at(number) - time.perf_counter()))


class Run:
    """Seconds from the first arrival to the end of the last job, and the mean of all from their
    own."""

    def __init__(self, arrivals: Arrivals, ends: Sequence[float]) -> None:
        self.total = max(ends) - arrivals.began
        latencies = [end - arrivals.at(number) for number, end in enumerate(ends)]
        self.mean = sum(latencies) / len(latencies)

    def total_of(self) -> float:
        return self.total

    def mean_of(self) -> float:
        return self.mean


def on_engine(engine: StepEngine, calls: Sequence[Call], gap: float) -> Run:
    ends = [0.0] * len(calls)
    done = threading.Semaphore(0)

    def ended(number: int) -> Callable[[Any], None]:
        def note(job: Any) -> None:
            ends[number] = time.perf_counter()
            done.release()

        return note

    arrivals = Arrivals(calls, gap)
    jobs = []
    for number, call in enumerate(calls):
        arrivals.wait(number)
        job = engine.submit(**call)
        job.add_done_callback(ended(number))
        jobs.append(job)
    for job in jobs:
        job.result(SECONDS)
        done.acquire()
    return Run(arrivals, ends)


def in_groups(pipeline: Any, calls: Sequence[Call], gap: float, size: int) -> Run:
    """Batches of at most `size` jobs of one adapter, that of the job which waits longest; those
    that have arrived join, as they do in servers with one adapter at a time."""
    waiting = list(range(len(calls)))
    ends = [0.0] * len(calls)
    arrivals = Arrivals(calls, gap)
    while waiting:
        arrivals.wait(waiting[0])
        now = time.perf_counter()
        lora = calls[waiting[0]]["lora"]
        batch = [
            number
            for number in waiting
            if arrivals.at(number) <= now and calls[number]["lora"] == lora
        ][:size]
        if lora:
            pipeline.enable_lora()
            pipeline.set_adapters([name for name, _ in lora], [scale for _, scale in lora])
        else:
            pipeline.disable_lora()
        chosen = [calls[number] for number in batch]
        rest = {name: value for name, value in chosen[0].items() if name != "lora"}
        rest |= {name: [call[name] for call in chosen] for name in ("prompt", "generator")}
        pipeline(**rest)
        for number in batch:
            ends[number] = time.perf_counter()
            waiting.remove(number)
    return Run(arrivals, ends)


def calls_of(shapes: Shapes, first: int, *, adapted: bool) -> list[Call]:
    """Jobs whose adapters take turns."""
    return [
        {**shapes.call(first + number), "lora": [(NAMES[number % ADAPTERS], 1.0)] * adapted}
        for number in range(JOBS)
    ]


def throughput(shapes: Shapes, folder: Path, rounds: int) -> list[Part]:
    """16 jobs over 4 adapters, the same without any, and in groups by adapter."""
    plain, own = twin(shapes.pipeline), twin(shapes.pipeline)
    for name in NAMES:
        plain.load_lora_weights(str(folder / name), adapter_name=name)
    parts = []
    with StepEngine(own, loras=Loras(own, folder)) as engine:
        for again in range(3):  # proofs, and adapters
            for adapted in (True, False):
                run(engine, calls_of(shapes, JOBS * again, adapted=adapted))
        for gap in GAPS:
            runs: dict[str, list[Run]] = {}
            for number in range(rounds):
                first = FRESH + JOBS * number
                for adapted, name in ((True, "shared"), (False, "without adapters")):
                    calls = calls_of(shapes, first, adapted=adapted)
                    runs.setdefault(name, []).append(on_engine(engine, calls, gap))
                for size in BATCHES:
                    calls = calls_of(shapes, first, adapted=True)
                    taken = in_groups(plain, calls, gap, size)
                    runs.setdefault(f"groups of {size}", []).append(taken)
            parts.append(_compared(runs, gap))
    return parts


def _compared(runs: dict[str, list[Run]], gap: float) -> Part:
    groups = [name for name in runs if name.startswith("groups")]
    totals = {name: Spread.of([one.total for one in taken]) for name, taken in runs.items()}
    best = min(groups, key=lambda name: totals[name].median)
    table: list[Row] = [
        {
            "contestant": name,
            "all s": totals[name],
            "mean latency s": Spread.of([one.mean for one in taken]),
        }
        for name, taken in runs.items()
    ]
    ratios: list[Row] = []
    for what, of in (("all", Run.total_of), ("mean latency", Run.mean_of)):
        shared, others, bare = (
            [of(one) for one in runs[name]] for name in ("shared", best, "without adapters")
        )
        for label, above, below in (
            (f"{what}: shared / without adapters", shared, bare),
            (f"{what}: {best} / shared", others, shared),
        ):
            pairs = zip(above, below, strict=True)
            ratios.append({"ratio": label, "wall": Spread.of([one / two for one, two in pairs])})
    arrivals = "at once" if not gap else f"{gap:g} s apart"
    return Part(
        f"{JOBS} jobs over {ADAPTERS} adapters of rank {RANK}, arriving {arrivals}: shared steps, "
        f"the same jobs without adapters, and batches of one adapter each, as servers with one "
        f"adapter at a time make them (best size: {best}).",
        (table, ratios),
    )


def first_step(shapes: Shapes, folder: Path, rounds: int) -> Part:
    """From the first request of an adapter to its first forward, and the memory of one."""
    pipeline = twin(shapes.pipeline)
    loads, begins = [], []
    with StepEngine(pipeline, loras=(loras := Loras(pipeline, folder))) as engine:
        run(engine, calls_of(shapes, 0, adapted=True))
        for number in range(rounds):
            first, second = (f"unknown{2 * number + again}" for again in range(2))
            for seed, name in enumerate((first, second)):
                save(shapes, folder, name, FRESH + 2 * number + seed)
            began = time.perf_counter()
            loras.load(first)
            loads.append(time.perf_counter() - began)
            began = time.monotonic()
            job = engine.submit(**{**shapes.call(FRESH + number), "lora": [(second, 1.0)]})
            job.result(SECONDS)
            assert job.begun is not None
            begins.append(job.begun - began)
        adapter = loras.load(NAMES[0])
    row: Row = {
        "reading s": Spread.of(loads),
        "request to first forward s": Spread.of(begins),
        "bytes of an adapter": adapter.bytes,
        "layers": sum(adapter.components.values()),
    }
    return Part("An adapter that is not in memory.", ((row,),))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loras", description=__doc__.partition(":")[0]
    )
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("build/loras.json"),
        help="report file (default: %(default)s)",
    )
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds is {arguments.rounds}; it must be at least 1")
    set_cpu_threads(Settings())
    torch.set_grad_enabled(False)
    shapes = Shapes()
    report = Report(arguments.json, rounds=arguments.rounds)
    with tempfile.TemporaryDirectory() as folder:
        for seed, name in enumerate(NAMES):
            save(shapes, Path(folder), name, seed)
        report.add("jobs of several adapters", *throughput(shapes, Path(folder), arguments.rounds))
        report.add("first request", first_step(shapes, Path(folder), arguments.rounds))
    report.close()


if __name__ == "__main__":
    main()
