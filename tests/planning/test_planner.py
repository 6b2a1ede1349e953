"""What the engine plans: whose turn it is, what jobs will take, and when they will be done."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch

from benchmarks.policies import POLICIES, fifo, keyed_fifo
from stepweave import StepEngine
from stepweave.engine import Job
from stepweave.engine.engine import Mode
from stepweave.errors import DeadlineExceededError
from stepweave.planning.cost import CostModel
from stepweave.planning.work import REPRICE_SECONDS
from stepweave.scheduling.policy import Policy, WasteAwareSRPT
from stepweave.scheduling.task import Key
from tests.support.gated import Gate, Toy, held, seeded, toy
from tests.support.waiting import SECONDS, wait_until

pytestmark = pytest.mark.usefixtures("one_torch_thread")

every_mode = pytest.mark.parametrize("mode", ["off", "threads", "request", "step"])


class Guided(Toy):
    """Takes the arguments that tell a job's work; with guidance there are two rows."""

    def __call__(  # type: ignore[override]
        self,
        prompt: str | None = None,
        height: int = 8,
        width: int = 4,
        num_images_per_prompt: int = 1,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 3,
        generator: torch.Generator | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
    ) -> tuple[torch.Tensor]:
        rows = num_images_per_prompt * (2 if guidance_scale > 1 else 1)
        sample = torch.randn(rows, width * height, generator=generator)
        with self.progress_bar(total=num_inference_steps) as bar:
            for step in range(num_inference_steps):
                sample = self.denoise(sample, torch.tensor(float(step)))
                if callback_on_step_end is not None:
                    callback_on_step_end(self, step, step, {})
                bar.update()
        return (sample,)


def slow(seconds: Callable[[int], float], kind: type[Toy] = Toy) -> Toy:
    """A pipeline whose forwards take so long, by rows."""
    pipeline = toy(kind)
    pipeline.network.outside.watch = lambda rows: time.sleep(seconds(rows))
    return pipeline


class Clock:
    """What forwards are timed by: only they move it, so that they take what they shall, however
    busy the machine."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    monotonic = perf_counter

    def timed(self, seconds: Callable[[int], float], kind: type[Toy] = Toy) -> Toy:
        """A pipeline whose forwards take so long, by rows."""

        def pass_time(rows: int) -> None:
            self.now += seconds(rows)

        pipeline = toy(kind)
        pipeline.network.outside.watch = pass_time
        return pipeline


@pytest.fixture
def clock() -> Iterator[Clock]:
    clock = Clock()
    with (
        patch("stepweave.planning.clock.time", clock),
        patch("stepweave.compat.own_state.time", clock),
        patch("stepweave.baselines.thread_pool.time", clock),
    ):
        yield clock


def order_of_ends(jobs: dict[str, Job]) -> list[str]:
    for job in jobs.values():
        job.exception(SECONDS)
    return sorted(jobs, key=lambda name: jobs[name].finished or 0.0)


# --- the order ---


@pytest.mark.parametrize("mode", ["off", "request", "step"])
def test_a_higher_class_goes_first_in_every_mode(mode: Mode) -> None:
    with StepEngine(toy(), mode, 1) as engine:
        with held(engine, **seeded()):
            jobs = {
                name: engine.submit(**seeded(i, num_inference_steps=8), priority=name)
                for i, name in enumerate(("low", "normal", "high"))
            }
        assert order_of_ends(jobs) == ["high", "normal", "low"]


def test_the_shorter_job_goes_first_and_a_deadline_that_presses_before_it(clock: Clock) -> None:
    with StepEngine(clock.timed(lambda rows: 50.0), max_rows=1) as engine:
        engine.submit(**seeded(0, num_inference_steps=9)).result(SECONDS)
        with held(engine, **seeded()):
            jobs = {
                "long": engine.submit(**seeded(1, num_inference_steps=40)),
                "short": engine.submit(**seeded(2, num_inference_steps=20)),
                "due": engine.submit(**seeded(3, num_inference_steps=80), deadline=4500),
            }
        assert order_of_ends(jobs) == ["due", "short", "long"]


@pytest.mark.parametrize("policy", [fifo, keyed_fifo])
def test_in_order_of_arrival_if_asked(policy: Policy) -> None:
    with StepEngine(toy(), max_rows=1, policy=policy) as engine:
        with held(engine, **seeded()):
            jobs = {
                "long": engine.submit(**seeded(1, num_inference_steps=60)),
                "short": engine.submit(**seeded(2, num_inference_steps=6), priority="high"),
            }
        assert order_of_ends(jobs) == ["long", "short"]


def test_head_of_line_blocking_is_for_comparison(clock: Clock) -> None:
    """With `fifo` a job of another size waits until all before it are done, with the default it
    does not."""
    ends = {}
    for name in ("fifo", "aged"):
        with StepEngine(clock.timed(lambda rows: 0.001), policy=POLICIES[name]) as engine:
            with held(engine, **seeded()):
                jobs = {
                    "first": engine.submit(**seeded(1, num_inference_steps=60)),
                    "other": engine.submit(**seeded(2, num_inference_steps=6, width=8)),
                    "like the first": engine.submit(**seeded(3, num_inference_steps=6)),
                }
            ends[name] = order_of_ends(jobs)
    assert ends["fifo"][-1] == "other"
    assert ends["aged"][-1] == "first"


def test_jobs_of_which_nothing_is_known_are_not_taken_for_the_shortest(clock: Clock) -> None:
    steps: list[int] = []
    with StepEngine(clock.timed(lambda rows: 0.002), max_rows=1) as engine:
        with held(engine, **seeded(0, num_inference_steps=10)) as first:
            unknown = engine.submit(
                **seeded(1, num_inference_steps=500, width=8), priority="normal"
            )
            first.add_done_callback(lambda _: steps.append(unknown.progress.step))
        first.result(SECONDS)
        unknown.cancel()
    assert steps[0] < 100


def test_a_policy_is_an_object_not_a_name() -> None:
    with pytest.raises(TypeError, match=r"policy is 'fifo'; .* such as stepweave.scheduling.srpt"):
        StepEngine(toy(), policy="fifo")  # type: ignore[arg-type]


# --- rows that pay ---


def most_rows(clock: Clock, seconds: Callable[[int], float], **options: Any) -> int:
    """The most rows that forwards had more than a few times."""
    with StepEngine(clock.timed(seconds), **options) as engine:
        with held(engine, **seeded()):
            jobs = [engine.submit(**seeded(i, num_inference_steps=20)) for i in range(8)]
        for job in jobs:
            job.result(SECONDS)
        by_rows = engine.stats().forwards["network"].by_rows
    return max(rows for rows, count in by_rows.items() if count > 9)


def test_forwards_have_as_many_rows_as_pay(clock: Clock) -> None:
    assert most_rows(clock, lambda rows: 0.005) == 8
    assert most_rows(clock, lambda rows: 0.005 * rows) < 8
    assert most_rows(clock, lambda rows: 0.005 * rows, knee=False) == 8


# --- what is foretold ---


def test_nothing_is_foretold_of_what_never_ran() -> None:
    with StepEngine(toy(Guided)) as engine:
        assert engine.estimate(prompt="x", num_inference_steps=5) is None
        assert engine.backlog() == 0
        assert engine.queue_positions() == {}


@every_mode
def test_a_job_is_foretold_from_those_before_it(mode: Mode, clock: Clock) -> None:
    with StepEngine(clock.timed(lambda rows: 0.005, Guided), mode, threads=1) as engine:
        engine.submit(prompt="x", num_inference_steps=10).result(SECONDS)
        time.sleep(REPRICE_SECONDS)
        ten, twenty = (engine.estimate(prompt="x", num_inference_steps=steps) for steps in (10, 20))
        assert ten is not None
        assert twenty is not None
        assert ten.solo == pytest.approx(ten.finish, rel=0.3)
        assert twenty.solo == pytest.approx(2 * ten.solo, rel=0.2)
        assert ten.solo == pytest.approx(10 * 0.005)


def test_sizes_and_images_that_never_ran_are_scaled(clock: Clock) -> None:
    with StepEngine(clock.timed(lambda rows: 0.01 * rows, Guided)) as engine:
        for images in (1, 2):
            arguments = {"prompt": "x", "width": 4, "height": 8, "num_images_per_prompt": images}
            engine.submit(**arguments, num_inference_steps=12).result(SECONDS)
        time.sleep(REPRICE_SECONDS)
        one, four, larger = (
            engine.estimate(prompt="x", width=width, height=8, num_images_per_prompt=images)
            for width, images in ((4, 1), (4, 4), (16, 1))
        )
        assert one is not None
        assert four is not None
        assert larger is not None
        assert four.solo == pytest.approx(4 * one.solo, rel=0.2)
        assert larger.solo == pytest.approx(4 * one.solo, rel=0.2)


def test_jobs_know_their_places_and_times(clock: Clock) -> None:
    with StepEngine(clock.timed(lambda rows: 0.002 * rows, Guided), max_rows=1) as engine:
        engine.submit(prompt="x", num_inference_steps=10).result(SECONDS)
        time.sleep(REPRICE_SECONDS)
        with held(engine, prompt="x", num_inference_steps=10) as running:
            jobs = [engine.submit(prompt="x", num_inference_steps=steps) for steps in (40, 20)]
            positions = engine.queue_positions()
            long, short = (positions[job.id] for job in jobs)
            assert positions[running.id].position == 0
            assert (short.position, long.position) == (1, 2)
            assert 0 < positions[running.id].eta < short.eta < long.eta
            assert engine.backlog() == pytest.approx(long.eta, rel=0.2)
            other = engine.estimate(prompt="x", num_inference_steps=30)
            assert other is not None
            assert short.eta < other.finish < long.eta + other.solo
            first = engine.estimate(prompt="x", num_inference_steps=30, priority="high")
            assert first is not None
            assert first.finish < other.finish
        for job in jobs:
            job.result(SECONDS)
        wait_until(lambda: not engine.queue_positions())


def test_a_forecast_comes_true(clock: Clock) -> None:
    """Of jobs of several lengths that all wait, with forwards of known duration."""
    ends: dict[str, float] = {}
    with StepEngine(clock.timed(lambda rows: 0.004, Guided), max_rows=2) as engine:
        engine.submit(prompt="x", num_inference_steps=10).result(SECONDS)
        with held(engine, prompt="x", num_inference_steps=4):
            first = [engine.submit(prompt="x", num_inference_steps=80) for _ in range(4)]
        for job in first:
            job.result(SECONDS)  # so that what proofs and early audits take is behind
        with held(engine, prompt="x", num_inference_steps=4):
            jobs = [engine.submit(prompt="x", num_inference_steps=10 + 10 * i) for i in range(6)]
            foretold, began = engine.queue_positions(), clock.now
            for job in jobs:
                job.add_done_callback(lambda job: ends.setdefault(job.id, clock.now))
        for job in jobs:
            job.result(SECONDS)
        wait_until(lambda: len(ends) == len(jobs))
        seconds = [ends[job.id] - began for job in jobs]
        expected = [foretold[job.id].eta for job in jobs]
    assert sorted(range(6), key=lambda i: seconds[i]) == sorted(range(6), key=lambda i: expected[i])
    for found, wanted in zip(seconds, expected, strict=True):
        assert 0.5 * wanted < found < 2 * wanted


def test_forwards_are_reported_with_what_they_took(clock: Clock) -> None:
    seen: list[tuple[str, int, int, float]] = []
    with StepEngine(
        clock.timed(lambda rows: 0.003), on_step=lambda *step: seen.append(step)
    ) as engine:
        engine.submit(**seeded(num_inference_steps=4)).result(SECONDS)
        assert engine.curves()[Key("network", 4)][1] == pytest.approx(0.003)
    assert [step[:2] for step in seen] == [("network", 1)] * 4
    assert all(step[2] >= 1 and step[3] == pytest.approx(0.003) for step in seen)


def test_nothing_is_told_to_be_done_sooner_than_alone(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though steps have turned out to be cheaper, or dearer, since jobs were priced."""
    with StepEngine(clock.timed(lambda rows: 0.01, Guided), max_rows=1) as engine:
        engine.submit(prompt="x", num_inference_steps=10).result(SECONDS)
        assert engine.estimate(prompt="x") is not None
        monkeypatch.setattr("stepweave.planning.work.REPRICE_SECONDS", float("inf"))
        for seconds in (0.002, 0.05):
            [key] = engine.curves()
            for _ in range(9):
                engine._planner.cost.observe(key, 1, seconds)
            estimate = engine.estimate(prompt="x", num_inference_steps=30)
            assert estimate is not None
            assert estimate.finish >= estimate.solo > 0
            assert estimate.wait == pytest.approx(estimate.finish - estimate.solo)
            assert engine.alone(prompt="x", num_inference_steps=30) == pytest.approx(30 * seconds)


def test_an_eta_is_no_less_than_what_is_left_takes_alone(clock: Clock) -> None:
    with StepEngine(clock.timed(lambda rows: 100.0, Guided), max_rows=1) as engine:
        engine.submit(prompt="x", num_inference_steps=2).result(SECONDS)
        time.sleep(REPRICE_SECONDS)
        with held(engine, prompt="x", num_inference_steps=5):
            waiting = engine.submit(prompt="x", num_inference_steps=5)
            told = engine.queue_position(waiting.id)
            [job] = [job for job in engine._planner.jobs() if job.id == waiting.id]
            assert told is not None and told.eta is not None
            assert told.position == 1 and told.eta >= job.task.remaining
            forecaster = engine._planner.forecaster
            plan = forecaster._plan
            plan.made -= 10**6  # it was made long ago
            eta = forecaster._eta(job, plan, time.monotonic())
            assert eta == job.task.remaining > 400
            waiting.cancel()


@every_mode
def test_each_that_waits_has_its_own_place_also_before_anything_was_timed(mode: Mode) -> None:
    gate = threading.Event()
    pipeline = toy(Guided)
    pipeline.network.outside.watch = lambda rows: gate.wait(SECONDS)
    with StepEngine(pipeline, mode, 1, max_jobs=3, threads=1) as engine:
        try:
            assert not engine.timed
            jobs = [engine.submit(prompt="x", num_inference_steps=5) for _ in range(9)]
            wait_until(lambda: jobs[0].begun)
            high = engine.submit(prompt="x", num_inference_steps=5, priority="high")

            def places(*expected: Job) -> None:
                positions = engine.queue_positions()
                order = [id for id, one in positions.items() if one.position]
                assert order == [job.id for job in expected]
                assert [positions[id].position for id in order] == list(range(1, len(order) + 1))
                assert positions == {id: engine.queue_position(id) for id in positions}
                assert {one.eta for one in positions.values()} == {None}

            started = [job for job in jobs if job.begun]
            assert started == jobs[: len(started)]
            rest = [job for job in jobs if job not in started]
            places(high, *rest)
            rest[2].cancel()
            if mode != "step":  # where it may have been taken in
                assert rest[2].exception(SECONDS) is not None
                places(high, *rest[:2], *rest[3:])
        finally:
            gate.set()
        for job in [high, *jobs]:
            job.exception(SECONDS)
        wait_until(lambda: not engine.queue_positions())
        assert engine.timed


def test_the_steps_of_one_that_ended_early_are_known_if_no_others_are(clock: Clock) -> None:
    with StepEngine(clock.timed(lambda rows: 0.01, Guided), max_rows=1) as engine:
        gate = Gate()
        late = engine.submit(prompt="x", num_inference_steps=10, callback_on_step_end=gate)
        gate.wait()
        late.cancel()
        gate.open()
        assert late.exception(SECONDS) is not None
        # the forward's seconds are noted once its jobs have gone on
        wait_until(lambda: engine.alone(prompt="x", num_inference_steps=20) is not None)
        assert engine.alone(prompt="x", num_inference_steps=20) == pytest.approx(0.2)


# --- other ends ---


def test_what_ended_is_not_planned_for_any_more() -> None:
    with StepEngine(slow(lambda rows: 0.002), max_rows=1) as engine:
        with held(engine, **seeded()):
            cancelled = engine.submit(**seeded(1))
            late = engine.submit(**seeded(2, num_inference_steps=100), deadline=0.01)
            failing = engine.submit(**seeded(3), width="?")
            cancelled.cancel()
        with pytest.raises(DeadlineExceededError):
            late.result(SECONDS)
        assert failing.exception(SECONDS) is not None
        wait_until(lambda: engine.running == 0)
        assert engine.queue_positions() == {}
        assert engine.backlog() == 0


def test_the_plan_can_be_asked_while_the_engine_works() -> None:
    """From other threads, as a server does, without an error on either side."""
    with StepEngine(toy(Guided)) as engine:
        engine.submit(prompt="x").result(SECONDS)
        stop = threading.Event()
        errors: list[BaseException] = []

        def ask() -> None:
            while not stop.is_set():
                try:
                    engine.estimate(prompt="x", num_inference_steps=7, deadline=1.0)
                    engine.queue_positions()
                    engine.stats()
                except BaseException as error:
                    errors.append(error)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        jobs = [
            engine.submit(prompt="x", num_inference_steps=1 + i % 5, width=4 + i % 7)
            for i in range(150)
        ]
        for job in jobs:
            job.result(SECONDS)
        stop.set()
        for thread in threads:
            thread.join(SECONDS)
        assert not errors
        assert engine.stats().errors == 0


def test_a_job_that_ends_early_teaches_nothing(clock: Clock) -> None:
    """Its steps were not seen: jobs like it must not be taken for ones without any."""
    with StepEngine(clock.timed(lambda rows: 0.003, Guided)) as engine:
        engine.submit(prompt="x", num_inference_steps=20).result(SECONDS)
        time.sleep(REPRICE_SECONDS)
        before = engine.estimate(prompt="x", num_inference_steps=20)
        with held(engine, **seeded()):
            engine.submit(prompt="x", num_inference_steps=20).cancel()
            failing = engine.submit(prompt="x", num_inference_steps=20, width=-1)
        assert failing.exception(SECONDS) is not None
        running = engine.submit(prompt="x", num_inference_steps=10**9)
        wait_until(lambda: running.progress.step > 2)
        running.cancel()
        assert running.exception(SECONDS) is not None
        time.sleep(REPRICE_SECONDS)
        after = engine.estimate(prompt="x", num_inference_steps=20)
        assert before is not None
        assert after is not None
        assert after.solo == pytest.approx(before.solo, rel=0.5)


@pytest.mark.parametrize("mode", ["off", "request"])
def test_a_job_that_has_not_started_does_not_wait_for_ever(
    mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepweave.scheduling.task.AGING_THRESHOLD", 0.2)
    with StepEngine(slow(lambda rows: 0.002), mode, 1) as engine:
        engine.submit(**seeded(num_inference_steps=4)).result(SECONDS)
        low = engine.submit(**seeded(1, num_inference_steps=12), priority="low")
        others = [engine.submit(**seeded(i, num_inference_steps=4)) for i in range(4)]
        for i in range(400):
            others.append(engine.submit(**seeded(i, num_inference_steps=4)))
            if low.done():
                break
            others[i].result(SECONDS)
        assert low.done()
        for job in others:
            job.cancel()


@every_mode
def test_a_late_job_that_waits_is_told_so_though_others_go_first(mode: Mode) -> None:
    with StepEngine(slow(lambda rows: 0.01), mode, 1, threads=1) as engine:
        jobs = [engine.submit(**seeded(i, num_inference_steps=10)) for i in range(100)]
        late = engine.submit(**seeded(99, num_inference_steps=10), deadline=0.15, priority="low")
        with pytest.raises(DeadlineExceededError):
            late.result(SECONDS)
        assert not all(job.done() for job in jobs)
        for job in jobs:
            job.cancel()


@pytest.mark.usefixtures("every_row_pays")
def test_jobs_of_different_shape_are_not_foretold_to_share_steps(clock: Clock) -> None:
    """Though their steps are of equal cost."""
    with StepEngine(clock.timed(lambda rows: 0.004, Guided)) as engine:
        for width, height in ((4, 8), (8, 4)):
            with held(engine, prompt="x"):
                jobs = [
                    engine.submit(prompt="x", width=width, height=height, num_inference_steps=10)
                    for _ in range(4)
                ]
            for job in jobs:
                job.result(SECONDS)
        time.sleep(REPRICE_SECONDS)
        with held(engine, prompt="x", num_inference_steps=20):
            engine.submit(prompt="x", num_inference_steps=20)
            alike, across, apart = (
                engine.estimate(prompt="x", num_inference_steps=40, **options)
                for options in ({}, {"width": 8, "height": 4}, {"reproducible": True})
            )
            assert alike is not None
            assert across is not None
            assert apart is not None
            assert alike.finish < across.finish
            assert alike.finish < apart.finish


@pytest.mark.parametrize("broken", ["choose", "seconds", "knee"])
def test_an_error_of_planning_costs_no_job(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise ZeroDivisionError

    with StepEngine(toy()) as engine:
        with held(engine, **seeded()):
            jobs = [engine.submit(**seeded(i)) for i in range(4)]
            if broken == "choose":
                monkeypatch.setattr(WasteAwareSRPT, "choose", fail)
            else:
                monkeypatch.setattr(CostModel, broken, fail)
        for i, job in enumerate(jobs):
            assert torch.allclose(job.result(SECONDS)[0], toy()(**seeded(i))[0], atol=1e-5)
        monkeypatch.undo()
        assert engine.submit(**seeded()).result(SECONDS)


def test_an_error_where_steps_are_told_costs_no_job() -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    for mode in ("step", "off"):
        with StepEngine(toy(), mode, on_step=fail) as engine:
            assert engine.submit(**seeded()).result(SECONDS)
            wait_until(lambda engine=engine: engine.stats().jobs == {"succeeded": 1})
