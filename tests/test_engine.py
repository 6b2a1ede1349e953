from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from stepweave.config import Settings
from stepweave.engine.pool import PoolEngine
from stepweave.errors import Cancelled, Refused, StepweaveError, Unavailable
from stepweave.generation import Parameters
from stepweave.loading.preset import Preset
from stepweave.model import ServedModel
from tests.fake import FakePipeline


@pytest.fixture
def pipeline() -> FakePipeline:
    return FakePipeline()


@pytest.fixture
def model(pipeline: FakePipeline) -> ServedModel:
    return ServedModel(pipeline, Preset(), Settings())


@pytest.fixture
def engine(model: ServedModel, pipeline: FakePipeline) -> Iterator[PoolEngine]:
    engine = PoolEngine(model, max_queue=4)
    yield engine
    pipeline.record.release.set()
    engine.close()


def parameters(model: ServedModel, seed: int = 0, steps: int = 5) -> Parameters:
    return model.resolve(prompt="a red circle", seed=seed, num_inference_steps=steps)


def test_jobs_run_one_at_a_time_in_order(engine: PoolEngine, model: ServedModel, pipeline: FakePipeline) -> None:
    jobs = [engine.submit(parameters(model, seed)) for seed in range(4)]
    assert [job.result.result(30).parameters.seed for job in jobs] == [0, 1, 2, 3]
    assert [call["generator"][0].initial_seed() for call in pipeline.record.calls] == [0, 1, 2, 3]
    assert jobs[0].step == 5
    assert engine.in_flight == 4, "a place is held until its pictures are encoded"
    for job in jobs:
        engine.release(job)
    assert (engine.in_flight, engine.waiting) == (0, 0)


def test_a_running_job_is_cancelled_at_its_next_step(
    engine: PoolEngine, model: ServedModel, pipeline: FakePipeline
) -> None:
    pipeline.record.gated = True
    job = engine.submit(parameters(model, steps=100))
    assert pipeline.record.started.wait(30)
    engine.cancel(job)
    pipeline.record.release.set()
    with pytest.raises(Cancelled):
        job.result.result(30)
    assert pipeline.record.steps_run == 1


def test_a_waiting_job_is_cancelled_at_once_and_frees_its_place(
    engine: PoolEngine, model: ServedModel, pipeline: FakePipeline
) -> None:
    pipeline.record.gated = True
    running, *waiting = [engine.submit(parameters(model, seed)) for seed in range(5)]
    with pytest.raises(Refused):
        engine.submit(parameters(model))
    engine.cancel(waiting[1])
    with pytest.raises(Cancelled):
        waiting[1].result.result(1)
    engine.release(waiting[1])
    engine.submit(parameters(model, seed=9))
    pipeline.record.release.set()
    assert running.result.result(30)
    assert waiting[3].result.result(30)
    assert 2 not in [call["generator"][0].initial_seed() for call in pipeline.record.calls]


def test_cancelling_a_finished_job_changes_nothing(engine: PoolEngine, model: ServedModel) -> None:
    job = engine.submit(parameters(model))
    assert job.result.result(30)
    engine.cancel(job)
    assert job.result.result(0)


def test_an_error_fails_its_own_job_only(engine: PoolEngine, model: ServedModel, pipeline: FakePipeline) -> None:
    pipeline.record.error = ValueError("nonsense")
    job = engine.submit(parameters(model))
    with pytest.raises(StepweaveError, match="ValueError") as caught:
        job.result.result(30)
    assert isinstance(caught.value.__cause__, ValueError)
    pipeline.record.error = None
    assert engine.submit(parameters(model)).result.result(30)


def test_close_ends_every_job_and_refuses_new_ones(
    engine: PoolEngine, model: ServedModel, pipeline: FakePipeline
) -> None:
    pipeline.record.gated = True
    jobs = [engine.submit(parameters(model, seed, steps=200)) for seed in range(3)]
    assert pipeline.record.started.wait(30)
    closing = threading.Thread(target=engine.close)
    closing.start()
    pipeline.record.release.set()
    closing.join(30)
    assert not closing.is_alive()
    for job in jobs:
        with pytest.raises(Cancelled):
            job.result.result(0)
    with pytest.raises(Unavailable):
        engine.submit(parameters(model))


def test_retry_after_is_the_mean_time_of_a_job(engine: PoolEngine, model: ServedModel, pipeline: FakePipeline) -> None:
    engine._recent.extend([10.0, 20.0])
    pipeline.record.gated = True
    for seed in range(5):
        engine.submit(parameters(model, seed))
    with pytest.raises(Refused) as caught:
        engine.submit(parameters(model))
    assert caught.value.retry_after == 15


def test_threads_run_side_by_side_and_no_more_than_allowed(model: ServedModel, pipeline: FakePipeline) -> None:
    engine = PoolEngine(model, max_queue=8, threads=3)
    try:
        pipeline.record.gated = True
        jobs = [engine.submit(parameters(model, seed)) for seed in range(7)]
        for _ in range(500):
            if pipeline.record.running == 3:
                break
            threading.Event().wait(0.01)
        assert (engine.in_flight, engine.waiting) == (7, 4)
        pipeline.record.release.set()
        assert [job.result.result(30).parameters.seed for job in jobs] == list(range(7))
        assert engine.in_flight == 7
        assert pipeline.record.most_running == 3
    finally:
        pipeline.record.release.set()
        engine.close()
