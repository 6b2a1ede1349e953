"""Work on images finds on other threads what it finds in the plain call, and what it sets is there
afterwards."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from torch import nn

from stepweave import StepEngine
from tests.support.waiting import SECONDS

before = contextvars.ContextVar("before", default="unset")
inside = contextvars.ContextVar("inside", default="unset")


def surroundings() -> dict[str, Any]:
    """What a thread, a task or the process may have of its own."""
    return {
        "variables": (before.get(), inside.get()),
        "autocast": (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
        ),
        "gradients": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "product": (torch.ones(2, 2) @ torch.ones(2, 2)).dtype,
        "drawn": torch.rand(1).item(),
        "inference": torch.is_inference_mode_enabled(),
    }


class Reading:
    """An image processor of somebody's own."""

    def preprocess(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def postprocess(
        self, sets: str = "", change: Callable[[], None] = lambda: None
    ) -> tuple[dict[str, Any], str]:
        found = surroundings()
        if sets:
            inside.set(sets)
        change()
        return found, threading.current_thread().name


class Known(VaeImageProcessor):  # type: ignore[misc]
    """As diffusers' own are, by where it says that it comes from."""

    postprocess = Reading.postprocess


class Pipeline(DiffusionPipeline):  # type: ignore[misc]
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.register_modules(network=network)
        self.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(
        self,
        value: str = "",
        autocast: bool = False,
        dtype: torch.dtype = torch.float32,
        change: Callable[[], None] = lambda: None,
        seed: int | None = None,
        **_: Any,
    ) -> Any:
        usual = torch.get_default_dtype()
        try:
            torch.set_default_dtype(dtype)
            if value:
                before.set(value)
            if seed is not None:
                torch.manual_seed(seed)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                self.network(torch.ones(1, 2, dtype=torch.float32))
                found, name = self.image_processor.postprocess(
                    f"{value} too" if value else "", change
                )
                after = surroundings()
        finally:
            torch.set_default_dtype(usual)
        return found, after, name


def made(kind: type[Pipeline], processor: Any) -> Pipeline:
    pipeline = kind(nn.Linear(2, 2).eval())
    pipeline.image_processor = processor
    return pipeline


CALLS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "variables": {"value": "mine"},
    "autocast": {"autocast": True},
    "both": {"value": "mine", "autocast": True},
    "default dtype": {"dtype": torch.float64},
    "gradients": {"change": lambda: torch.set_grad_enabled(True)},
    "autocast that it sets": {"change": lambda: torch.set_autocast_enabled("cpu", True)},
}


def plainly(processor: Any, **arguments: Any) -> Any:
    """A plain call's result; what it sets ends with it."""
    grad, autocast = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
    try:
        return contextvars.copy_context().run(made(Pipeline, processor), **arguments)
    finally:
        torch.set_grad_enabled(grad)
        torch.set_autocast_enabled("cpu", autocast)


@pytest.mark.parametrize("known", [False, True], ids=["own", "known"])
@pytest.mark.parametrize("name", CALLS)
def test_work_on_images_finds_what_it_finds_in_the_plain_call(name: str, known: bool) -> None:
    processor = (Known if known else Reading)()
    arguments = CALLS[name]
    expected = plainly(processor, **arguments, seed=7)
    with (
        patch("stepweave.views.pipeline_call.comes_with_a_library", lambda kind: known),
        StepEngine(made(Pipeline, processor)) as engine,
    ):
        for _ in range(3):  # the first ones of a kind are looked at
            found, after, thread = engine.submit(**arguments, seed=7).result(SECONDS)
            moved = thread.startswith("stepweave-pictures")
            if not known or name == "default dtype":
                assert found == expected[0] and after == expected[1]
            else:  # what torch draws is the whole process's, and this code is known not to draw
                assert {**found, "drawn": 0} == {**expected[0], "drawn": 0}
                assert {**after, "drawn": 0} == {**expected[1], "drawn": 0}
        assert moved == (known and name != "default dtype")
        assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        found, after, thread = engine.submit(seed=7).result(SECONDS)
        assert {**found, "drawn": 0} == {**plainly(processor, seed=7)[0], "drawn": 0}, (
            "nothing is left on the threads"
        )


def test_work_on_images_of_somebodys_own_moves_where_nothing_is_the_jobs_own() -> None:
    """With a generator it has no default one of its own."""

    class Seeded(Pipeline):
        def __call__(self, generator: Any = None, **arguments: Any) -> Any:
            return super().__call__(**arguments)

    with StepEngine(made(Seeded, Reading())) as engine:
        threads = [engine.submit(value="mine", autocast=True).result(SECONDS)[2] for _ in range(4)]
        found, after, _ = engine.submit(value="mine", autocast=True).result(SECONDS)
    assert threads[-1].startswith("stepweave-pictures")
    assert found["variables"] == ("mine", "unset") and found["autocast"][:2] == (
        True,
        torch.bfloat16,
    )
    assert after["variables"] == ("mine", "mine too")
    assert found["product"] == torch.bfloat16 and found["gradients"] is False


def test_work_on_images_may_reset_a_variable_that_its_job_has_set() -> None:
    class Resetting(Reading):
        def postprocess(self, sets: str = "", change: Any = None) -> Any:
            before.reset(token[0])
            return surroundings(), threading.current_thread().name

    token: list[Any] = []

    class Setting(Pipeline):
        def __call__(self, generator: Any = None) -> Any:
            token[:] = [before.set("for a while")]
            self.network(torch.ones(1, 2))
            found, name = self.image_processor.postprocess()
            return found["variables"], before.get(), name

    with torch.no_grad(), StepEngine(made(Setting, Resetting())) as engine:
        for _ in range(3):
            variables, after, name = engine.submit().result(SECONDS)
            assert (variables, after) == (("unset", "unset"), "unset")
    assert name.startswith("stepweave-pictures")


def test_work_on_images_in_a_context_of_its_own_sees_that() -> None:
    class Within(Pipeline):
        def __call__(self, generator: Any = None) -> Any:
            def run() -> Any:
                before.set("within")
                self.network(torch.ones(1, 2))
                return self.image_processor.postprocess("set within"), inside.get()

            (found, name), after = contextvars.copy_context().run(run)
            return found["variables"], after, before.get(), name

    with torch.no_grad(), StepEngine(made(Within, Reading())) as engine:
        for _ in range(3):
            variables, after, outside, _ = engine.submit().result(SECONDS)
            assert (variables, after, outside) == (("within", "unset"), "set within", "unset")
