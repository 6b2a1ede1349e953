"""The simulator: what it must keep, and that the default policy is worth it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks.simulate import CURVE, MIX, order
from benchmarks.simulation.arrivals import (
    Arrival,
    arrivals,
    capacity,
    parse_mix,
    read_trace,
    with_deadlines,
)
from benchmarks.simulation.bound import least_mean_latency
from benchmarks.simulation.curves import Curves, least_work
from benchmarks.simulation.figures import Figures
from benchmarks.simulation.reception import Reception
from benchmarks.simulation.variants import VARIANTS, changed
from benchmarks.simulation.world import Run, World, fixed
from stepweave.config import Settings
from stepweave.planning.forecast import by_arrival
from stepweave.scheduling.policy import POLICIES, Policy, aged_rank, rank
from stepweave.scheduling.task import Demand, Key, Load, Priority, Task
from tests.support.waiting import SECONDS

CURVES = Curves.read(CURVE)
COST = CURVES.model()
SHAPES = parse_mix(MIX)
EVERY = {**POLICIES, **VARIANTS}
DEFAULT_NAME = Settings.model_fields["policy"].default
DEFAULT = POLICIES[DEFAULT_NAME]


def poisson(load: float, count: int, seed: int, burst: float = 1) -> list[Arrival]:
    return arrivals(SHAPES, load * capacity(SHAPES, CURVES, COST), count, seed, burst)


def simulate(requests: list[Arrival], policy: Policy) -> Run:
    return World(requests, CURVES, policy).simulate()


def test_one_job_takes_its_time_alone() -> None:
    run = simulate([Arrival(3.0, "512x512", 4), Arrival(100.0, "1024x1024", 28)], DEFAULT)
    assert [one.finished for one in run.outcomes] == pytest.approx(
        [3 + 4 * 0.167, 100 + 28 * 0.243]
    )
    assert (run.forwards, run.rows, run.switches) == (32, 32, 2)


def test_jobs_of_a_kind_share_forwards() -> None:
    run = simulate([Arrival(0.0, "512x512", 4)] * 3, DEFAULT)
    assert [one.finished for one in run.outcomes] == pytest.approx([4 * 0.186] * 3)
    capped = World(
        [Arrival(0.0, "512x512", 4)] * 3, CURVES, POLICIES["keyed_fifo"], cap=fixed(2)
    ).simulate()
    assert capped.end == pytest.approx(6 * 0.183)


def test_a_job_that_comes_during_a_forward_joins_the_next() -> None:
    run = simulate([Arrival(0.0, "512x512", 4), Arrival(0.1, "512x512", 4)], DEFAULT)
    assert [one.finished for one in run.outcomes] == pytest.approx(
        [0.167 + 3 * 0.183, 0.167 + 3 * 0.183 + 0.167]
    )


def test_encoders_and_decoders_run_once() -> None:
    encoder, denoiser, decoder = Key("text_encoder", 16), Key("transformer", 64), Key("vae", 64)
    demand = Demand(1, (Load(encoder, 2),), (Load(denoiser, 2),), (Load(decoder, 1),))
    curves = Curves(
        "", "", {encoder: {2: 0.5}, denoiser: {2: 1.0}, decoder: {1: 0.25}}, {"8x8": demand}
    )
    requests = [Arrival(0.0, "8x8", 3)]
    run = World(requests, curves, DEFAULT).simulate()
    assert run.outcomes[0].latency == run.outcomes[0].solo == pytest.approx(3.75)
    assert least_work(curves, curves.model(), curves.demand("8x8", 3)) <= 3.75


@pytest.mark.parametrize("name", EVERY)
def test_all_are_served_and_none_beats_the_bound(name: str) -> None:
    for load, burst in ((0.7, 1.0), (1.5, 4.0)):
        requests = poisson(load, 80, seed=3, burst=burst)
        run = simulate(requests, EVERY[name])
        assert all(one.finished is not None for one in run.outcomes)
        assert run.rows == sum(request.steps for request in requests)
        assert all(
            one.latency >= one.solo - 1e-6 for one in run.outcomes if one.latency is not None
        )
        assert Figures.of(run).mean >= least_mean_latency(requests, CURVES, COST)
        assert run.busy <= run.end


def test_the_bound_is_reached_where_nothing_can_be_shared_or_kept_waiting() -> None:
    curves = Curves("", "", {Key("transformer", 1): {1: 1.0, 2: 2.0}}, {})
    requests = [Arrival(0.0, "1x1", 10), Arrival(0.0, "1x1", 2), Arrival(100.0, "1x1", 5)]
    assert least_mean_latency(requests, curves, curves.model()) == pytest.approx((12 + 2 + 5) / 3)


def test_a_seed_gives_the_same_run_at_any_rate_the_same_jobs() -> None:
    first, again, other = poisson(0.8, 50, 1), poisson(0.8, 50, 1), poisson(0.8, 50, 2)
    assert first == again != other
    assert [one.steps for one in first] == [one.steps for one in poisson(1.6, 50, 1)]
    assert Figures.of(simulate(first, DEFAULT)) == Figures.of(simulate(again, DEFAULT))


@pytest.mark.parametrize("burst", [1, 5])
def test_arrivals_come_at_the_rate_asked_for(burst: float) -> None:
    requests = arrivals(SHAPES, 2.0, 20_000, seed=0, burst=burst)
    assert requests[-1].offset == pytest.approx(10_000, rel=0.1)
    assert len({request.offset for request in requests}) == pytest.approx(20_000 / burst, rel=0.1)
    assert np.mean([request.size == "512x512" for request in requests]) == pytest.approx(
        0.5, abs=0.02
    )


def test_capacity_is_that_of_the_best_groups() -> None:
    assert capacity(parse_mix("512x512:10:1"), CURVES, COST) == pytest.approx(16 / (10 * 0.832))
    assert capacity(parse_mix("512x512:10:50,1024x1024:10:50"), CURVES, COST) == pytest.approx(
        0.2 / (0.052 + 0.237)
    )


def test_traces(tmp_path: Path) -> None:
    fields = [
        {"offset": 2, "size": "512x512", "steps": 4, "deadline": 9.5, "priority": "high"},
        {"offset": 1, "size": "1024x1024", "steps": 50},
    ]
    expected = [Arrival(1.0, "1024x1024", 50), Arrival(2.0, "512x512", 4, 9.5, Priority.HIGH)]
    lines, array = tmp_path / "trace.jsonl", tmp_path / "trace.json"
    lines.write_text("\n".join(map(json.dumps, fields)))
    array.write_text(json.dumps(fields))
    assert read_trace(lines) == read_trace(array) == expected


def test_deadlines_count_from_the_request() -> None:
    requests = with_deadlines(poisson(0.3, 40, 1), CURVES, COST, 1, 2, seed=1)
    figures = Figures.of(simulate(requests, DEFAULT))
    assert figures.hits is not None and 0.5 < figures.hits <= 1
    assert Figures.of(simulate(poisson(0.3, 40, 1), DEFAULT)).hits is None


class OneAtATime:
    """Lets in one job; the others are to come again in 1.5 s."""

    def enter(
        self, token: Hashable, task: Task, inside: Sequence[Task], now: float
    ) -> float | None:
        return 1.5 if inside else None

    def leave(self) -> None:
        pass


def test_refused_clients_come_back_when_told() -> None:
    requests = [Arrival(0.2 * number, "512x512", 4) for number in range(20)]
    run = World(requests, CURVES, DEFAULT, door=OneAtATime(), attempts=3).simulate()
    for one in run.outcomes:
        assert len(one.asked) <= 3
        assert len(one.promised) == len(one.asked) - (one.finished is not None)
        assert np.diff(one.asked) == pytest.approx(1.5)
    figures = Figures.of(run)
    again = sum(len(one.asked) - 1 for one in run.outcomes)
    assert (
        figures.retries
        == sum(len(one.asked) > 1 and one.finished is not None for one in run.outcomes) / again
    )
    assert (Figures.of(run, 1.5).kept, Figures.of(run, 1).kept) == (figures.retries, None)
    assert 0 < figures.refused < 1 and figures.told == 1.5
    assert figures.inside == pytest.approx(4 * 0.167) and figures.inside < figures.mean


def test_admission_bounds_the_wait_under_overload() -> None:
    requests = poisson(1.5, 300, seed=1)
    run = World(
        requests, CURVES, DEFAULT, door=Reception(CURVES, 16, rank, 100), attempts=3
    ).simulate()
    figures, unbounded = Figures.of(run), Figures.of(simulate(requests, DEFAULT))
    assert figures.refused > 0.1
    assert figures.inside < unbounded.mean / 2
    assert sum(one.finished is not None for one in run.outcomes) == round(
        (1 - figures.refused) * 300
    )


def test_jobs_are_forecast_in_the_order_of_their_policy() -> None:
    names = ("thrifty", "aged@3", "sticky", "fifo", "keyed_fifo@4", "round_robin")
    assert [order(name) for name in names] == [
        rank,
        aged_rank,
        rank,
        by_arrival,
        by_arrival,
        by_arrival,
    ]


def test_the_default_beats_head_of_line_blocking() -> None:
    """At 80 % load: at least 30 % less mean latency of all jobs, and a p99 of at most 1.15x."""
    latencies: dict[str, list[float]] = {DEFAULT_NAME: [], "fifo": []}
    for seed in range(6):
        requests = poisson(0.8, 500, seed)
        for name, taken in latencies.items():
            taken += [one.latency or 0.0 for one in simulate(requests, POLICIES[name]).outcomes]
    assert np.mean(latencies[DEFAULT_NAME]) <= 0.7 * np.mean(latencies["fifo"])
    assert np.percentile(latencies[DEFAULT_NAME], 99) <= 1.15 * np.percentile(latencies["fifo"], 99)


def test_variants_are_the_default_but_for_one_rule() -> None:
    requests = with_deadlines(poisson(1.2, 150, 1), CURVES, COST, 0.3, 4, seed=1)
    same = Figures.of(simulate(requests, changed()))
    assert same == Figures.of(simulate(requests, DEFAULT))
    assert [
        name for name, one in VARIANTS.items() if Figures.of(simulate(requests, one)) == same
    ] == []
    with pytest.raises(AttributeError, match="PATIENT"):
        changed(PATIENT=1)


def test_it_runs_from_the_command_line(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.simulate",
        "--loads",
        "0.5,0.8",
        "--seeds",
        "2",
        "--jobs",
        "40",
    ]
    command += ["--deadlines", "0.5:3", "--policies", "thrifty,fifo,fifo@8", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    assert "| fifo@8 |" in done.stdout and "published curve" in done.stdout
    part = json.loads((tmp_path / "simulate.json").read_text())["parts"]["load 0.8"]
    assert [set(run) for run in part["runs"]] == [{"thrifty", "fifo", "fifo@8"}] * 2
    assert (tmp_path / "simulate.png").stat().st_size > 10_000
