"""Memory that runs out: no job is lost, none is wrong, and what does not fit is not tried again and
again."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stepweave import StepEngine
from stepweave.batching.merge import join, part, split
from stepweave.compat.out_of_memory import ran_out
from stepweave.engine import Mode
from stepweave.errors import OutOfMemoryError, RequestCancelledError
from stepweave.memory import row_limits
from stepweave.memory.device import CudaMemory, UnknownMemory
from stepweave.memory.row_limits import RowLimits
from stepweave.scheduling.task import Key
from tests.support import tiny
from tests.support.describing import Describing
from tests.support.toy import (
    CLOSE,
    STEPS,
    Forward,
    Outside,
    Toy,
    call,
    fresh,
    honest,
    module,
    serve,
    submit_together,
)
from tests.support.waiting import SECONDS, wait_until

SD15, SD3 = (tiny.FAMILIES[name] for name in ("stable_diffusion", "stable_diffusion_3"))


pytestmark = pytest.mark.usefixtures("every_row_pays", "quick_garbage")


def fits(rows: int, error: Callable[[], Exception] = torch.OutOfMemoryError) -> Forward:
    """A forward with room for so many rows."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        if len(x) > rows:
            raise error()
        return honest(x)

    return forward


def plain(one: dict[str, Any]) -> Tensor:
    result = Toy(module(honest_forward))(**fresh(one))
    assert result is not None
    return result


def honest_forward(self: nn.Module, x: Tensor) -> Tensor:
    return honest(x)


# A call of several rows


@pytest.mark.parametrize("rows", [3, 4, 5, 8, 13])
@pytest.mark.parametrize("room", [2, 3])
def test_a_call_that_does_not_fit_is_run_some_rows_at_a_time(rows: int, room: int) -> None:
    one = call(0, rows=rows)
    with StepEngine(Toy(module(fits(room)))) as engine:
        result = engine.submit(**fresh(one)).result(SECONDS)
        stats = engine.stats()
    assert (result - plain(one)).abs().max() <= CLOSE
    assert stats.forwards["denoiser"].calls == STEPS
    assert stats.forwards["denoiser"].by_rows[rows] == (STEPS if rows <= room else 1)
    assert (stats.divided > 0) == (rows > room)
    assert stats.errors == stats.unfit == 0


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_call_is_divided_down_to_one_row_once_that_is_proven(rows: int) -> None:
    room = [8]

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        if len(x) > room[0]:
            raise torch.OutOfMemoryError
        return honest(x)

    calls = [call(seed, rows=rows) for seed in range(4)]
    with StepEngine(Toy(module(forward))) as engine:
        for job in submit_together(engine, [fresh(one) for one in calls]):
            job.result(SECONDS)
        room[0] = 1
        results = [
            job.result(SECONDS) for job in submit_together(engine, [fresh(one) for one in calls])
        ]
        stats = engine.stats()
    for result, one in zip(results, calls, strict=True):
        assert (result - plain(one)).abs().max() <= CLOSE
    assert stats.unfit == stats.errors == 0
    assert (stats.divided > 0) == (rows > 1)


@pytest.mark.parametrize("rows", [2, 3])
def test_a_call_that_was_never_compared_with_its_parts_is_not_divided(rows: int) -> None:
    with StepEngine(Toy(module(fits(1)))) as engine, pytest.raises(OutOfMemoryError):
        engine.submit(**fresh(call(0, rows=rows))).result(SECONDS)


def test_what_was_learnt_is_not_tried_again() -> None:
    one = call(0, rows=8, steps=50)
    with StepEngine(Toy(module(fits(2)))) as engine:
        engine.submit(**fresh(one)).result(SECONDS)
        stats = engine.stats()
    assert stats.divided == 50
    assert stats.out_of_memory <= 4


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_jobs_of_several_rows_in_company_are_divided_too(rows: int) -> None:
    calls = [call(seed, rows=rows) for seed in range(6)]
    with StepEngine(Toy(module(fits(2)))) as engine:
        results = [
            job.result(SECONDS) for job in submit_together(engine, [fresh(one) for one in calls])
        ]
        stats = engine.stats()
    for result, one in zip(results, calls, strict=True):
        assert (result - plain(one)).abs().max() <= CLOSE
    assert stats.unfit == stats.errors == 0
    assert stats.out_of_memory <= 6


def test_rows_that_depend_on_each_other_are_not_divided() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        if len(x) > 3:
            raise torch.OutOfMemoryError
        return honest(x) + x.mean()

    with StepEngine(Toy(module(forward))) as engine:
        with pytest.raises(OutOfMemoryError):
            engine.submit(**fresh(call(0, rows=4))).result(SECONDS)
        assert engine.stats().divided == 0
        fitting = call(1, rows=3)
        result = engine.submit(**fresh(fitting)).result(SECONDS)
    expected = Toy(module(forward))(**fresh(fitting))
    assert expected is not None
    assert torch.equal(result, expected)


def test_a_reproducible_call_is_not_divided() -> None:
    with StepEngine(Toy(module(fits(2)))) as engine:
        divided = engine.submit(**fresh(call(0, rows=4)))
        whole = engine.submit(**fresh(call(0, rows=4)), reproducible=True)
        divided.result(SECONDS)
        with pytest.raises(OutOfMemoryError):
            whole.result(SECONDS)


def decode_together(engine: StepEngine, family: tiny.Family) -> None:
    """Two jobs that come to their ends in one step: of the second round, since the first is one of
    proofs."""
    for _ in range(2):
        gate = threading.Event()

        def hold(*_: Any, gate: threading.Event = gate) -> dict[str, Any]:
            assert gate.wait(SECONDS)
            return {}

        jobs = [engine.submit(**family.arguments("a ring", steps=1), callback_on_step_end=hold)]
        jobs += [engine.submit(**family.arguments("a cross", seed=i)) for i in range(2)]
        gate.set()
        for job in jobs:
            job.result(SECONDS)


def test_images_of_one_request_are_decoded_within_the_bound() -> None:
    kwargs = SD3.arguments("a red circle", seed=3) | {"num_images_per_prompt": 5}
    expected = SD3.build()(**kwargs).images
    pipeline = SD3.build()
    most: list[int] = []
    decode, outside = pipeline.vae.decode, Outside(note=most.append)
    pipeline.vae.decode = lambda z, **kwargs: (outside.note(len(z)), decode(z, **kwargs))[1]
    with StepEngine(pipeline, max_decode_rows=2) as engine:
        decode_together(engine, SD3)
        most.clear()
        images = (
            engine.submit(**SD3.arguments("a red circle", seed=3) | {"num_images_per_prompt": 5})
            .result(SECONDS)
            .images
        )
    assert most
    assert max(most) <= 2
    assert abs(images - expected).max() <= 1e-4


@pytest.mark.parametrize("family", [SD15, SD3], ids=lambda family: family.name)
def test_more_images_than_the_autoencoder_decodes_at_a_time(family: tiny.Family) -> None:
    """Stable Diffusion 1.5 hands its generator to the decoder, which draws nothing from it."""
    many = {"num_images_per_prompt": 5}
    expected = family.build()(**family.arguments("a red circle", seed=3) | many).images
    with StepEngine(family.build()) as engine:
        decode_together(engine, family)
        images = (
            engine.submit(**family.arguments("a red circle", seed=3) | many).result(SECONDS).images
        )
        assert engine.stats().divided == 1
    assert abs(images - expected).max() <= 1e-4


class Box:
    def __init__(self) -> None:
        self.first: Any = None


def fills_object(x: Tensor, extra: Any) -> Tensor:
    if extra.first is None:
        extra.first = honest(x)
    return honest(x) + extra.first


def fills_list(x: Tensor, extra: Any) -> Tensor:
    if not extra:
        extra.append(honest(x))
    return honest(x) + extra[0]


@pytest.mark.parametrize(("fill", "make"), [(fills_object, Box), (fills_list, list)])
def test_what_a_call_leaves_in_its_arguments_is_not_lost(
    fill: Any, make: Callable[[], Any]
) -> None:
    """It is not divided, then."""

    def forward(self: nn.Module, x: Tensor, extra: Any) -> Tensor:
        if len(x) > 3:
            raise torch.OutOfMemoryError
        return fill(x, extra)

    def calls(rows: int) -> dict[str, Any]:
        extra = make()
        return fresh(call(0, lambda step: {"extra": extra}, rows=rows))

    with StepEngine(Toy(module(forward))) as engine:
        with pytest.raises(OutOfMemoryError):
            engine.submit(**calls(4)).result(SECONDS)
        result = engine.submit(**calls(3)).result(SECONDS)
        assert engine.stats().divided == 0
    expected = Toy(module(forward))(**calls(3))
    assert expected is not None
    assert torch.equal(result, expected)


def test_rows_that_are_equal_prove_nothing() -> None:
    class Twins(Toy):
        @torch.no_grad()
        def __call__(self, *, generator: torch.Generator | None = None) -> Tensor:  # type: ignore[override]
            x = torch.randn(3, 3, generator=generator)[[0, 0, 1, 2]]
            for _ in range(4):
                x = 0.9 * x + 0.3 * self.denoiser(x)
            return x

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        if len(x) > 3:
            raise torch.OutOfMemoryError
        return honest(x) + x.mean(0)

    with StepEngine(Twins(module(forward))) as engine, pytest.raises(OutOfMemoryError):
        engine.submit(generator=torch.Generator().manual_seed(0)).result(SECONDS)


def test_parts_of_lists_are_put_together_entry_by_entry() -> None:
    parts = [[torch.ones(3) for _ in range(3)] for _ in range(2)]
    assert [one.shape for one in join(parts, [3, 3], listed=True)] == [(3,)] * 6


# What does not fit


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError,
        MemoryError,
        lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        lambda: RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate "
            "memory"
        ),
    ],
)
@pytest.mark.parametrize("mode", ["step", "off", "threads", "request"])
def test_a_job_that_cannot_fit_gets_an_error_of_its_own(
    error: Callable[[], Exception], mode: Mode
) -> None:
    with StepEngine(Toy(module(fits(1, error))), mode=mode) as engine:
        large = engine.submit(**fresh(call(0, rows=2)))
        with pytest.raises(OutOfMemoryError, match="not enough memory") as caught:
            large.result(SECONDS)
        small = engine.submit(**fresh(call(1)))
        assert torch.equal(small.result(SECONDS), plain(call(1)))
        wait_until(lambda: engine.stats().unfit == 1)
    assert caught.value.code == "out_of_memory"


def test_other_errors_are_not_taken_for_it() -> None:
    assert not ran_out(RuntimeError("shapes do not match"))
    assert not ran_out(ValueError("out of memory."))
    assert not ran_out(None)


@pytest.mark.parametrize("jobs", [2, 3, 7])
@pytest.mark.parametrize("most", [1, 2])
def test_jobs_that_fit_only_by_themselves_wait_for_each_other(jobs: int, most: int) -> None:
    calls = [call(seed, steps=3 + seed % 3) for seed in range(jobs)]

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        if engine.running > most:
            raise torch.OutOfMemoryError
        return honest(x)

    engine = StepEngine(Toy(module(forward)))
    with engine:
        results = [
            job.result(SECONDS) for job in submit_together(engine, [fresh(one) for one in calls])
        ]
    stats = engine.stats()
    for result, one in zip(results, calls, strict=True):
        assert (result - plain(one)).abs().max() <= CLOSE
    assert stats.unfit == stats.errors == 0
    assert stats.jobs["succeeded"] == jobs + 1


def test_a_starved_job_goes_on_once_the_others_have_ended() -> None:
    hold, begun = threading.Event(), threading.Event()

    def forward(self: nn.Module, x: Tensor, large: bool = False) -> Tensor:
        if large:
            begun.set()
            if engine.running > 1:
                raise torch.OutOfMemoryError
        return honest(x)

    engine = StepEngine(Toy(module(forward)))
    with engine:
        small = engine.submit(**fresh(call(0, steps=2000)))
        large = engine.submit(**fresh(call(1, arguments=lambda step: {"large": True})))
        assert begun.wait(SECONDS)
        late = engine.submit(**fresh(call(2)))  # waits too, so that there is an end to the others
        assert large.result(SECONDS).shape == (1, 3)
        assert small.done()
        assert not late.done() or late.result(SECONDS) is not None
        late.result(SECONDS)
    hold.set()


def crowded_after(use: Callable[[Tensor, Any], Tensor], crowd: list[Any]) -> Forward:
    """Runs out once it has done something, while other jobs are there."""

    def forward(self: nn.Module, x: Tensor, extra: Any) -> Tensor:
        used = use(x, extra)
        if crowd and crowd[0].running > 1:
            raise torch.OutOfMemoryError
        return honest(x) + used / 10

    return forward


def test_random_numbers_are_drawn_again_from_where_they_were() -> None:
    crowd: list[Any] = []
    forward = crowded_after(lambda x, extra: torch.randn(x.shape, generator=extra), crowd)

    def one() -> dict[str, Any]:
        extra = torch.Generator().manual_seed(1)
        return fresh(call(0, lambda step: {"extra": extra}))

    expected = Toy(module(forward))(**one())
    assert expected is not None
    with StepEngine(Toy(module(forward))) as engine:
        crowd.append(engine)
        jobs = submit_together(engine, [one() for _ in range(3)])
        assert all(torch.equal(job.result(SECONDS), expected) for job in jobs)


def test_a_call_that_wrote_to_its_arguments_is_not_made_again() -> None:
    crowd: list[Any] = []
    forward = crowded_after(lambda x, extra: extra.add_(1), crowd)

    def one() -> dict[str, Any]:
        extra = torch.zeros(1, 3)
        return fresh(call(0, lambda step: {"extra": extra}))

    expected = Toy(module(forward))(**one())
    assert expected is not None
    with StepEngine(Toy(module(forward))) as engine:
        crowd.append(engine)
        outcomes = [
            job.exception(SECONDS) or job.result(0)
            for job in submit_together(engine, [one(), one()])
        ]
    assert all(isinstance(one, OutOfMemoryError) or torch.equal(one, expected) for one in outcomes)


class Wraps(Toy):
    """Answers whatever goes wrong with an error of its own."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except BaseException as error:
            raise RuntimeError("the pipeline failed") from error


class Swallows(Toy):
    """Goes on whatever goes wrong."""

    @torch.no_grad()
    def __call__(self, arguments: Any = None, *, generator: Any = None, gate: Any = None) -> Any:  # type: ignore[override]
        if gate is not None:
            assert gate.wait(SECONDS)
            return None
        x = torch.randn(1, 3, generator=generator)
        for _ in range(STEPS):
            try:
                prediction = self.denoiser(x)
            except BaseException:
                prediction = torch.zeros_like(x)
            x = 0.9 * x + 0.3 * prediction
        return x


@pytest.mark.parametrize("kind", [Wraps, Swallows])
def test_a_job_that_begins_anew_does_so_whatever_its_pipeline_makes_of_it(kind: type[Toy]) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        if engine.running > 1:
            raise torch.OutOfMemoryError
        return honest(x)

    expected = [kind(module(honest_forward))(**fresh(call(seed))) for seed in range(3)]
    engine = StepEngine(kind(module(forward)))
    with engine:
        jobs = submit_together(engine, [fresh(call(seed)) for seed in range(3)])
        for job, result in zip(jobs, expected, strict=True):
            assert result is not None
            assert torch.equal(job.result(SECONDS), result)


def test_a_passing_crowd_does_not_keep_calls_alone_for_good() -> None:
    crowded = [True]

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        if crowded[0] and engine.running > 1:
            raise torch.OutOfMemoryError
        return honest(x)

    engine = StepEngine(Toy(module(forward)))
    with engine:
        for job in submit_together(engine, [fresh(call(seed)) for seed in range(10)]):
            job.result(SECONDS)
        crowded[0] = False
        for _ in range(3):
            for job in submit_together(engine, [fresh(call(seed, steps=30)) for seed in range(10)]):
                job.result(SECONDS)
        assert engine.stats().forwards["denoiser"].merged_calls > 100


def test_activations_of_a_failed_forward_are_gone_before_its_calls_run_alone() -> None:
    class Activations:
        pass

    outside = Outside(alive=[], seen=[])

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        activations = Activations()
        outside.seen.append(sum(one() is not None for one in outside.alive))
        outside.alive.append(weakref.ref(activations))
        if len(x) > 1:
            raise ValueError("one at a time")
        return honest(x)

    serve(forward, [call(seed) for seed in range(4)]).check()
    assert max(outside.seen) == 0


def test_a_starved_job_can_be_cancelled() -> None:
    tried = threading.Event()

    def forward(self: nn.Module, x: Tensor, large: bool = False) -> Tensor:
        if large:
            tried.set()
            raise torch.OutOfMemoryError
        return honest(x)

    with StepEngine(Toy(module(forward))) as engine:
        other = engine.submit(**fresh(call(0, steps=5000)))
        large = engine.submit(**fresh(call(1, arguments=lambda step: {"large": True})))
        assert tried.wait(SECONDS)
        large.cancel()
        with pytest.raises(RequestCancelledError):
            large.result(SECONDS)
        assert not other.done()
        other.cancel()


def test_closing_does_not_wait_for_starved_jobs() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        if engine.running > 1:
            raise torch.OutOfMemoryError
        return honest(x)

    engine = StepEngine(Toy(module(forward)))
    with engine:
        jobs = submit_together(engine, [fresh(call(seed, steps=100_000)) for seed in range(3)])
    for job in jobs:
        assert isinstance(job.exception(SECONDS), RequestCancelledError)


def test_remembered_prompts_make_room_first() -> None:
    pipeline = SD15.build()
    forward = pipeline.unet.forward

    def crowded(*args: Any, **kwargs: Any) -> Any:
        if engine.stats().cache_bytes:
            raise torch.OutOfMemoryError
        return forward(*args, **kwargs)

    pipeline.unet.forward = crowded
    engine = StepEngine(pipeline)
    with engine:
        images = engine.submit(**SD15.arguments("a red circle", seed=3)).result(SECONDS).images
        assert engine.stats().out_of_memory == 1
    expected = SD15.build()(**SD15.arguments("a red circle", seed=3)).images
    assert (images == expected).all()


# Sized to fit in the first place


class Budget(UnknownMemory):
    """A device with so many bytes; `take` is what a forward does."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.most = 0

    def take(self, size: int) -> None:
        self.most = max(self.most, size)
        if size > self.total:
            raise torch.OutOfMemoryError

    def available(self) -> int:
        return self.total

    def start(self) -> None:
        self.most = 0

    def taken(self) -> int:
        return self.most


@pytest.mark.parametrize(("once", "each", "fit"), [(0, 100, 10), (300, 70, 10)])
def test_a_group_is_sized_to_fit(once: int, each: int, fit: int) -> None:
    budget = Budget(1000)

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        budget.take(once + each * len(x))
        return honest(x)

    served = serve(forward, [call(seed, steps=12) for seed in range(24)], memory=budget)
    served.check()
    assert served.stats.out_of_memory == 0
    assert fit / 2 <= max(served.by_rows) <= fit
    assert served.merged_share > 0.5


def test_what_a_row_takes_is_known_better_the_more_rows_were_measured() -> None:
    budget = Budget(1000)
    room = RowLimits(budget)

    def measure(rows: int, size: int) -> None:
        with room.measured("kind", rows):
            budget.take(size)

    assert room.limit("kind", 64) == 64
    measure(1, 210)
    assert room.limit("kind", 64) == 4
    measure(4, 240)
    assert room.limit("kind", 64) == 16
    measure(2, 900)  # of a size that is known
    assert room.limit("kind", 64) == 16
    assert room.limit("other", 64) == 64


def test_rows_with_adapters_take_more() -> None:
    budget = Budget(1000)
    room = RowLimits(budget)
    plain, adapted = Key("transformer", 64), Key("transformer", 64, adapters=1)
    for key, size in ((plain, 800), (adapted, 1000)):
        with room.measured("kind", 8, key):
            budget.take(size)
    assert (room.limit("kind", 64), room.limit("kind", 64, 1)) == (10, 8)
    assert room.limit("kind", 64, 2) == 8, "no more than with fewer"
    assert (room.fits(plain, 10), room.fits(adapted, 10)) == (True, False)
    assert not room.fits(adapted._replace(adapters=2), 10)


def test_a_first_forward_that_tries_out_kernels_does_not_count_for_good() -> None:
    budget = Budget(1000)
    room = RowLimits(budget)
    for size in (900, 100, 100, 100, 950):
        with room.measured("kind", 1):
            budget.take(size)
    assert room.limit("kind", 64) == 10


@pytest.mark.parametrize(
    ("fraction", "available"), [(1.0, 40 + 5 - 5), (0.5, 50 - 20 - 5), (0.2, 0)]
)
def test_a_gpu_tells_what_is_left_of_it(
    fraction: float, available: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch's functions tell it; tests/gpu has the real thing."""
    figures = {"allocated": 20, "reserved": 25, "most": 30}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40, 100))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: figures["allocated"])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: figures["reserved"])
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fraction)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: figures["most"])
    monkeypatch.setattr(
        torch.cuda,
        "reset_peak_memory_stats",
        lambda device: figures.update(most=figures["allocated"]),
    )
    gpu = CudaMemory(torch.device("cuda", 0))
    assert gpu.available() == available
    gpu.start()
    figures["most"] = 27
    assert gpu.taken() == 7
    assert gpu.peak() == 30, "the peak from before a measurement is not forgotten"


# What is learnt, and forgotten


def test_a_cap_rises_slowly_and_more_slowly_after_each_fall(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    room = RowLimits(UnknownMemory())

    def forwards_until_it_rises() -> int:
        cap, count = room.limit("kind", 1000), 0
        while room.limit("kind", 1000) == cap:
            room.fitted("kind")
            count += 1
        return count

    room.failed("kind", 32)
    assert room.limit("kind", 1000) == 16
    assert forwards_until_it_rises() == row_limits.RECOVERY
    assert room.limit("kind", 1000) == 18
    room.failed("kind", 18)
    assert room.limit("kind", 1000) == 9
    assert forwards_until_it_rises() == 2 * row_limits.RECOVERY
    room.failed("kind", 40)
    room.failed("kind", 1)
    assert room.limit("kind", 1000) == 10, "neither says that fewer rows do not fit"
    for _ in range(20):
        room.failed("kind", room.limit("kind", 1000))
        if room.limit("kind", 1000) == 1:
            assert forwards_until_it_rises() <= row_limits.SLOWEST * row_limits.RECOVERY
    assert forwards_until_it_rises() == row_limits.SLOWEST * row_limits.RECOVERY


def test_kinds_are_forgotten_so_that_the_table_is_bounded() -> None:
    room = RowLimits(Budget(10))
    for i in range(3 * row_limits.KEPT):
        room.failed(("kind", i), 8)
        with room.measured(("kind", i), 1):
            pass
        with room.measured(object(), 1):  # a call that could not be described
            pass
    assert len(room._caps) == len(room._sizes) == row_limits.KEPT


# Parts


def test_parts_put_together_are_what_was_taken_apart() -> None:
    whole = {"a": torch.arange(12.0).reshape(6, 2), "b": (torch.arange(6), [3, None]), "c": "x"}
    assert str(join(split(whole, [1, 3, 2]), [1, 3, 2])) == str(whole)


def test_a_row_is_part_of_every_kind_of_argument() -> None:
    described = Describing()(
        x=torch.arange(8.0).reshape(4, 2),
        t=torch.tensor(5),
        single=torch.ones(1, 3),
        table=torch.ones(7, 7),
        names=["a", "a", "a", "a"],
        nested={"y": (torch.arange(4), 3)},
        n=2,
    )
    got = part(described, 1, 3)
    assert torch.equal(got["x"], torch.tensor([[2.0, 3.0], [4.0, 5.0]]))
    assert got["t"] == 5
    assert got["single"].shape == (1, 3)
    assert got["table"].shape == (7, 7)
    assert got["names"] == ["a", "a"]
    assert got["nested"]["y"][0].tolist() == [1, 2]
    assert got["n"] == 2


# Faults


def check_faults(seed: int, jobs: int, share: float) -> None:
    """Forwards run out at random: of more than one row often, of one row now and then."""
    drawn = torch.Generator().manual_seed(seed)
    calls = [call(100 * seed + i, rows=1 + i % 3, steps=2 + i % 5) for i in range(jobs)]

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        often = share if len(x) > 1 else share / 10
        if torch.rand((), generator=drawn) < often:
            raise torch.OutOfMemoryError
        return honest(x)

    with StepEngine(Toy(module(forward))) as engine:
        finished = submit_together(engine, [fresh(one) for one in calls])
        outcomes = [job.exception(SECONDS) or job.result(SECONDS) for job in finished]
    stats = engine.stats()  # a job is counted just after it is done
    for outcome, one in zip(outcomes, calls, strict=True):
        if not isinstance(outcome, OutOfMemoryError):
            assert (outcome - plain(one)).abs().max() <= CLOSE
    assert stats.errors == 0
    assert sum(stats.jobs.values()) == jobs + 1
    assert stats.unfit == sum(isinstance(outcome, OutOfMemoryError) for outcome in outcomes)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), jobs=st.integers(1, 9), share=st.floats(0, 0.9))
def test_whatever_runs_out_whenever_results_are_right_and_none_is_lost(
    seed: int, jobs: int, share: float
) -> None:
    check_faults(seed, jobs, share)


@pytest.mark.full
@pytest.mark.timeout(3600)
@settings(max_examples=2000, deadline=None)
@given(seed=st.integers(0, 1_000_000), jobs=st.integers(1, 12), share=st.floats(0, 1))
def test_thousands_of_faults(seed: int, jobs: int, share: float) -> None:
    check_faults(seed, jobs, share)
