"""Profiles: what jobs will ask for, told from those that ran."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepweave.planning.profiles import KINDS, PARTS, Profiles, Recorder, Shape
from stepweave.scheduling.task import Demand, Key, Load

ENCODER = Load(Key("text_encoder", 77), 1)
SIDE = 64  # an image's, in latents 8 times smaller


def shape(side: int = SIDE, images: int = 1, kind: str = "text") -> Shape:
    return Shape(side * side, images, kind)


def demand(
    side: int = SIDE, images: int = 1, steps: int = 20, before: tuple[Load, ...] = (ENCODER,)
) -> Demand:
    """A pipeline with guidance: two rows of the denoiser for each image, at an eighth of its
    side."""
    latents = side * side // 64
    return Demand(
        steps,
        before,
        (Load(Key("transformer", latents), 2 * images),),
        (Load(Key("vae", latents), 1, images),),
    )


def learnt(*sides: int, images: int = 1) -> Profiles:
    profiles = Profiles()
    for side in sides:
        profiles.learn(shape(side, images), demand(side, images))
    return profiles


def test_before_any_job_ran_only_its_steps_are_known() -> None:
    assert Profiles().expect(shape(), 30) == Demand(30)


@given(st.integers(1, 100))
def test_a_shape_that_ran_asks_for_the_same_in_each_of_its_steps(steps: int) -> None:
    assert learnt(64, 128).expect(shape(64), steps) == demand(64, steps=steps)
    assert learnt(64, 128).expect(shape(128), steps) == demand(128, steps=steps)


def test_what_ran_last_counts() -> None:
    profiles = learnt(64)
    profiles.learn(shape(64), demand(64, images=3))
    assert profiles.expect(shape(64), 20) == demand(64, images=3)


def test_another_size_is_told_by_its_pixels() -> None:
    assert learnt(64).expect(shape(128), 20) == demand(128)
    assert learnt(128).expect(shape(64), 20) == demand(64)


def test_another_number_of_images_is_told_by_its_rows() -> None:
    told = learnt(64, images=1).expect(shape(64, images=4), 20)
    assert told.step == demand(64, images=4).step
    assert told.before == (ENCODER,)  # its prompt is one
    assert [load.rows * load.calls for load in told.after] == [4]
    fewer = learnt(64, images=4).expect(shape(64, images=1), 20)
    assert fewer.step == demand(64).step


def test_of_several_sizes_the_nearest_tells() -> None:
    profiles = Profiles()
    profiles.learn(shape(64), demand(64))
    far = demand(512)
    profiles.learn(
        shape(512),
        Demand(far.steps, far.before, (*far.step, Load(Key("refiner", 4096), 1)), far.after),
    )
    assert [load.key.module for load in profiles.expect(shape(96), 20).step] == ["transformer"]
    assert [load.key.module for load in profiles.expect(shape(480), 20).step] == [
        "transformer",
        "refiner",
    ]


def test_jobs_of_its_kind_tell_before_those_of_the_same_size() -> None:
    profiles = Profiles()
    profiles.learn(shape(64, kind="image"), demand(64, images=3))
    profiles.learn(shape(512, kind="text"), demand(512))
    assert profiles.expect(shape(64, kind="text"), 20) == demand(64)


def test_if_none_of_its_kind_ran_another_kind_tells() -> None:
    assert learnt(64).expect(shape(64, kind="image"), 20) == demand(64)


def test_adapters_are_told_by_jobs_that_have_none_and_the_other_way_round() -> None:
    def adapted(number: int, side: int = 64) -> Demand:
        of = demand(side)
        [load] = of.step
        return replace(of, step=(load._replace(key=load.key._replace(adapters=number)),))

    profiles = learnt(64)
    one = shape(64)._replace(adapters=1)
    assert profiles.expect(one, 20) == adapted(1)
    profiles.learn(one, adapted(1))
    assert profiles.expect(shape(64), 20) == demand(64)
    assert profiles.expect(shape(64)._replace(adapters=3), 20) == adapted(3)
    assert profiles.expect(shape(128)._replace(adapters=1), 20) == adapted(1, 128)
    only = Profiles()
    only.learn(one, adapted(1))
    assert only.expect(shape(64), 20) == demand(64)


def test_modules_that_a_lora_is_not_for_stay_without() -> None:
    beside = Load(Key("controlnet", 64), 1)
    profiles, first = Profiles(), demand(64)
    [load] = first.step
    seen = replace(first, step=(load._replace(key=load.key._replace(adapters=1)), beside))
    profiles.learn(shape(64)._replace(adapters=1), seen)
    step = profiles.expect(shape(64)._replace(adapters=2), 20).step
    assert [one.key.adapters for one in step] == [2, 0]


def test_modules_that_two_sizes_have_alike_do_not_go_by_pixels() -> None:
    profiles = Profiles()
    embedder = Load(Key("time_embedder", 10), 1)
    for side in (64, 128):
        one = demand(side)
        profiles.learn(shape(side), Demand(20, one.before, (*one.step, embedder), one.after))
    assert profiles.expect(shape(256), 20).step == (*demand(256).step, embedder)


def test_the_pipelines_own_size_is_told_unscaled() -> None:
    """A shape of no pixels asks for the size that the pipeline takes by itself."""
    profiles = Profiles()
    profiles.learn(Shape(0, 1, "text"), demand(64))
    assert profiles.expect(Shape(0, 2, "text"), 20).step == (Load(Key("transformer", 64), 4),)
    assert profiles.expect(shape(128), 20).step == demand(64).step


def test_a_remembered_prompt_does_not_take_the_encoder_from_what_is_known() -> None:
    profiles = learnt(64)
    profiles.learn(shape(64), demand(64, images=3, before=()))
    assert profiles.expect(shape(64), 20) == demand(64, images=3)


def test_the_first_of_a_size_may_have_its_prompt_remembered() -> None:
    profiles = learnt(64)
    profiles.learn(shape(128), demand(128, before=()))
    assert profiles.expect(shape(64), 20).before == (ENCODER,)
    profiles.learn(shape(128), demand(128))
    assert profiles.expect(shape(128), 20) == demand(128)


def test_shapes_are_bounded_and_the_oldest_goes() -> None:
    profiles = Profiles()
    for number in range(KINDS + 1):
        profiles.learn(Shape(4096, 1, number), demand(64, images=1 + number))
        profiles.learn(Shape(4096, 1, "kept"), demand(64, images=7))
    assert profiles.expect(Shape(4096, 1, "kept"), 20) == demand(64, images=7)
    assert profiles.expect(Shape(4096, 1, KINDS), 20) == demand(64, images=1 + KINDS)
    assert profiles.expect(Shape(4096, 1, 0), 20) != demand(64)  # forgotten, and told from others


SHAPES = st.builds(
    Shape, st.integers(0, 1 << 22), st.integers(1, 8), st.sampled_from(("text", "image"))
)
KEYS = st.builds(Key, st.sampled_from("uvt"), st.integers(0, 5000))
LOADS = st.lists(st.builds(Load, KEYS, st.integers(1, 16), st.integers(1, 9)), max_size=3).map(
    tuple
)
DEMANDS = st.builds(Demand, st.integers(0, 50), LOADS, LOADS, LOADS)


@given(st.lists(st.tuples(SHAPES, DEMANDS), max_size=8), SHAPES, st.integers(0, 60))
def test_whatever_ran_something_that_can_run_is_expected(
    known: list[tuple[Shape, Demand]], asked: Shape, steps: int
) -> None:
    profiles = Profiles()
    for one, its in known:
        profiles.learn(one, its)
    told = profiles.expect(asked, steps)
    assert told.steps == steps
    for load in (*told.step, *told.after):
        assert load.rows >= 1 and load.key.size >= 0 and load.calls > 0


# What a job asks for is counted


def test_calls_are_counted_by_phase_and_shared_out_among_the_steps() -> None:
    recorder, denoiser, decoder = Recorder(), Key("transformer", 64), Key("vae", 64)
    for _ in range(2):
        recorder.call("before", ENCODER.key, 1)
    for _ in range(20):
        recorder.call("step", denoiser, 2)
    for _ in range(5):
        recorder.call("step", denoiser, 1)  # guidance ended early
    recorder.call("after", decoder, 1)
    assert recorder.demand(10) == Demand(
        10,
        (Load(ENCODER.key, 1, 2),),
        (Load(denoiser, 2, 2.0), Load(denoiser, 1, 0.5)),
        (Load(decoder, 1, 1),),
    )


def test_no_steps_are_no_reason_to_fail() -> None:
    recorder = Recorder()
    assert recorder.demand(0) == Demand(0)
    recorder.call("step", ENCODER.key, 1)
    assert recorder.demand(0).step == (ENCODER,)


@pytest.mark.parametrize("phase", ["before", "step", "after"])
def test_what_is_counted_is_bounded(phase: str) -> None:
    recorder = Recorder()
    for _ in range(2):
        for size in range(PARTS + 10):
            recorder.call(phase, Key("transformer", size), 1)  # type: ignore[arg-type]
    (loads,) = (
        part
        for part in (recorder.demand(1).before, recorder.demand(1).step, recorder.demand(1).after)
        if part
    )
    assert len(loads) == PARTS
    assert {load.calls for load in loads} == {2}
