"""Fibers: pipelines' calls that are suspended and go on, and nothing of torch's or Python's state
that leaks between them."""

from __future__ import annotations

import contextvars
import functools
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import greenlet
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from stepweave.batching.call import Attempt, Call
from stepweave.batching.fingerprints import Fingerprints
from stepweave.compat import torch_state as ambient
from stepweave.compat.torch_state import DefaultRandom, suspendable
from stepweave.engine.fiber import Done, Fiber, current_fiber, suspend
from stepweave.engine.hooks import SuspendHook, call_engine, on_image_thread
from stepweave.errors import EngineMisuseError
from stepweave.memory.device_health import DeviceHealth
from stepweave.views.image_threads import ImageWork
from stepweave.views.images import images_on_threads
from stepweave.views.modules import EngineModules
from stepweave.views.scope import EngineScope
from tests.support import tiny
from tests.support.waiting import SECONDS

KINDS = ("cpu",)


@pytest.fixture(autouse=True)
def nothing_leaks_to_the_caller() -> Iterator[None]:
    before = ambient.current(KINDS)
    yield
    after = ambient.current(KINDS)
    ambient.apply(before, after)
    assert after == before
    assert suspendable()


def fiber_of(function: Callable[[], Any], seed: int | None = None) -> Fiber:
    random = None if seed is None else DefaultRandom(seed, torch.device("cpu"))
    return Fiber(function, ambient.quiet(KINDS), () if random is None else [random])


def outcome_of(answer: Any) -> Any:
    assert isinstance(answer, Done)
    return answer.outcome


def on_another_thread(function: Callable[[], Any]) -> Any:
    """What `function` returns; what it leaves on torch's stacks ends with the thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(SECONDS)


# --- values and exceptions, both ways ---


def test_values_go_both_ways_until_the_function_returns() -> None:
    def function() -> tuple[Any, ...]:
        first = suspend("one")
        second = suspend(first + 1)
        return first, second, (current_fiber() is not None)

    fiber = fiber_of(function)
    assert not fiber.finished
    assert fiber.resume() == "one"
    assert fiber.resume(1) == 2
    assert not fiber.finished
    assert outcome_of(fiber.resume("last")) == (1, "last", True)
    assert fiber.finished
    assert not (current_fiber() is not None)


def test_none_and_exceptions_may_be_requests_answers_and_results() -> None:
    error = ValueError("a value like any other")

    def function() -> Any:
        assert suspend(None) is error
        assert suspend(error) is None
        return error

    fiber = fiber_of(function)
    assert fiber.resume() is None
    assert fiber.resume(error) is error
    assert outcome_of(fiber.resume(None)) is error


def test_the_code_that_suspends_may_lie_deep() -> None:
    def deep(levels: int) -> Any:
        return suspend("here") if levels == 0 else deep(levels - 1)

    fiber = fiber_of(lambda: [deep(100) for _ in range(3)])
    assert [fiber.resume() for _ in range(3)] == ["here"] * 3
    assert outcome_of(fiber.resume("end")) == [None, None, "end"]


def raise_lookup_error() -> None:
    raise LookupError("from inside")


def test_what_the_function_raises_comes_out_with_its_traceback() -> None:
    def function() -> None:
        suspend(1)
        raise_lookup_error()

    fiber = fiber_of(function)
    fiber.resume()
    error = outcome_of(fiber.resume())
    assert isinstance(error, LookupError)
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    assert names[-2:] == ["function", "raise_lookup_error"]
    assert fiber.finished


def test_an_error_thrown_in_is_raised_where_the_fiber_waits_and_may_be_caught_there() -> None:
    caught: list[BaseException] = []

    def function() -> str:
        try:
            suspend("waiting")
        except LookupError as error:
            caught.append(error)
        return str(suspend("still here"))

    try:
        raise_lookup_error()
    except LookupError as error:
        thrown = error
    fiber = fiber_of(function)
    fiber.resume()
    assert fiber.throw(thrown) == "still here"
    assert caught == [thrown]
    names = [frame.name for frame in traceback.extract_tb(caught[0].__traceback__)]
    assert "raise_lookup_error" in names, "where it came from"
    assert "function" in names, "where it was raised anew"
    assert outcome_of(fiber.resume("end")) == "end"
    assert sys.exc_info() == (None, None, None)


def test_an_error_thrown_in_and_not_caught_ends_the_fiber_after_its_clean_up() -> None:
    steps: list[str] = []

    def function() -> None:
        try:
            suspend("waiting")
        finally:
            steps.append(suspend("cleaning up"))

    fiber, error = fiber_of(function), KeyError("gone")
    fiber.resume()
    assert fiber.throw(error) == "cleaning up"
    assert outcome_of(fiber.resume("cleaned")) is error
    assert steps == ["cleaned"]


class Ending(BaseException):
    """As the loop's own: no Exception."""


def test_cancellation_passes_what_catches_exceptions() -> None:
    steps: list[int] = []

    def function() -> None:
        for step in range(10):
            try:
                suspend(step)
            except Exception:
                steps.append(-1)
            steps.append(step)

    fiber = fiber_of(function)
    assert [fiber.resume() for _ in range(3)] == [0, 1, 2]
    assert fiber.throw(ValueError()) == 3
    assert isinstance(outcome_of(fiber.throw(Ending())), Ending)
    assert steps == [0, 1, -1, 2]


def test_an_error_being_handled_in_one_fiber_is_not_seen_in_another() -> None:
    def handling() -> Any:
        try:
            raise_lookup_error()
        except LookupError:
            suspend("handling")
            return sys.exc_info()[0]

    def other() -> Any:
        assert sys.exc_info()[0] is None
        try:
            raise RuntimeError
        except RuntimeError as error:
            return error.__context__

    one, two = fiber_of(handling), fiber_of(other)
    one.resume()
    assert sys.exc_info()[0] is None
    assert outcome_of(two.resume()) is None
    assert outcome_of(one.resume()) is LookupError


@pytest.mark.parametrize(
    "kind", [SystemExit, KeyboardInterrupt, GeneratorExit, greenlet.GreenletExit]
)
def test_what_would_end_the_thread_ends_the_fiber_only(kind: type[BaseException]) -> None:
    def function() -> None:
        suspend(1)
        raise kind

    inside, thrown = fiber_of(function), fiber_of(function)
    inside.resume()
    assert type(outcome_of(inside.resume())) is kind
    thrown.resume()
    assert type(outcome_of(thrown.throw(kind()))) is kind
    assert outcome_of(fiber_of(lambda: "the next one runs").resume()) == "the next one runs"


# --- what torch keeps per thread or per process ---


@pytest.mark.parametrize("grad", [True, False])
def test_gradient_mode_is_a_fibers_own(grad: bool) -> None:
    seen: dict[str, list[bool]] = {"without": [], "with": [], "plain": []}

    def without() -> None:
        with torch.no_grad():
            suspend(1)
            seen["without"].append(torch.is_grad_enabled())
        suspend(2)  # here `no_grad` has restored what it found
        seen["without"].append(torch.is_grad_enabled())

    def with_gradients() -> None:
        with torch.enable_grad():
            suspend(1)
            seen["with"].append(torch.is_grad_enabled())
            suspend(2)
        seen["with"].append(torch.is_grad_enabled())

    def plain() -> None:
        for _ in range(4):
            seen["plain"].append(torch.is_grad_enabled())
            suspend(1)

    with torch.set_grad_enabled(grad):
        fibers = [fiber_of(without), fiber_of(with_gradients), fiber_of(plain)]
        while fibers:
            fibers = [fiber for fiber in fibers if not isinstance(fiber.resume(), Done)]
            assert torch.is_grad_enabled() is grad
    assert seen == {"without": [False, False], "with": [True, False], "plain": [False] * 4}


def test_a_block_that_is_left_in_another_order_than_entered_turns_no_gradients_on() -> None:
    """Without care: the first saves True, the second False, and the first's end turns gradients on
    within the second."""

    def block() -> bool:
        with torch.no_grad():
            suspend(1)
        suspend(2)
        return torch.is_grad_enabled()

    first, second = (
        Fiber(block, ambient.current(KINDS)._replace(grad=grad)) for grad in (True, False)
    )
    for _ in range(2):
        first.resume()
        second.resume()
    assert outcome_of(first.resume()) is True
    assert outcome_of(second.resume()) is False


def test_an_error_leaves_no_mode_behind() -> None:
    def function() -> None:
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float64)
        torch.set_autocast_enabled("cpu", True)
        raise_lookup_error()

    before = ambient.current(KINDS)
    assert isinstance(outcome_of(fiber_of(function).resume()), LookupError)
    assert ambient.current(KINDS) == before


def test_autocast_is_a_fibers_own() -> None:
    def state() -> tuple[bool, torch.dtype]:
        return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def casting(dtype: torch.dtype) -> Callable[[], None]:
        def function() -> None:
            with torch.autocast("cpu", dtype=dtype):
                for _ in range(3):
                    assert state() == (True, dtype)
                    suspend(torch.ones(2, 2) @ torch.ones(2, 2))
            assert state()[0] is False
            suspend(torch.ones(2, 2) @ torch.ones(2, 2))

        return function

    def plain() -> None:
        for _ in range(4):
            assert state()[0] is False
            suspend(torch.ones(2, 2) @ torch.ones(2, 2))

    outside = state()
    fibers = [
        fiber_of(function) for function in (casting(torch.bfloat16), plain, casting(torch.float16))
    ]
    found = []
    for _ in range(4):
        found.append([fiber.resume().dtype for fiber in fibers])
        assert state() == outside
    assert found == [[torch.bfloat16, torch.float32, torch.float16]] * 3 + [[torch.float32] * 3]
    assert [outcome_of(fiber.resume()) for fiber in fibers] == [None] * 3


def test_weights_that_change_while_a_fiber_under_autocast_is_suspended_are_cast_anew() -> None:
    weight = nn.Parameter(torch.ones(2, 2))

    def function() -> Any:
        # where casts of leaves are kept
        with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            suspend((torch.ones(1, 2) @ weight).detach()[0, 0].item())
            return (torch.ones(1, 2) @ weight).detach()[0, 0].item()

    fiber = Fiber(function, ambient.quiet(KINDS))
    assert fiber.resume() == 2
    with torch.no_grad():
        weight.fill_(3.0)
    assert outcome_of(fiber.resume()) == 6


def test_the_default_dtype_is_a_fibers_own() -> None:
    def double() -> torch.dtype:
        torch.set_default_dtype(torch.float64)
        suspend(torch.zeros(1).dtype)
        return torch.zeros(1).dtype

    fiber = fiber_of(double)
    assert fiber.resume() is torch.float64
    assert torch.zeros(1).dtype is torch.float32
    assert outcome_of(fiber_of(lambda: torch.zeros(1).dtype).resume()) is torch.float32
    assert outcome_of(fiber.resume()) is torch.float64
    assert torch.get_default_dtype() is torch.float32


def draws() -> list[float]:
    """One number before and two after being suspended."""
    before = torch.rand(1).item()
    suspend("drawn")
    return [before, *torch.rand(2).tolist()]


def test_the_default_generator_is_a_fibers_own_where_asked_for() -> None:
    torch.manual_seed(7)
    expected = {
        seed: torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist()
        for seed in (1, 2)
    }
    torch.manual_seed(7)
    outside = torch.rand(3).tolist()
    torch.manual_seed(7)
    fibers = {seed: fiber_of(draws, seed) for seed in (1, 2)}
    found = []
    for fiber in fibers.values():
        fiber.resume()
        found.append(torch.rand(1).item())
    assert {seed: outcome_of(fiber.resume()) for seed, fiber in fibers.items()} == expected
    assert [*found, torch.rand(1).item()] == outside


def test_the_default_generator_is_the_processes_where_not_asked_for() -> None:
    torch.manual_seed(7)
    expected = torch.rand(4).tolist()
    torch.manual_seed(7)
    fiber = fiber_of(draws)
    fiber.resume()
    between = torch.rand(1).item()
    first, *rest = outcome_of(fiber.resume())
    assert [first, between, *rest] == expected


def test_a_seed_set_in_a_fiber_stays_there() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1).item()
    torch.manual_seed(7)

    def function() -> float:
        torch.manual_seed(3)
        suspend(1)
        return torch.rand(1).item()

    fiber = fiber_of(function, seed=1)
    fiber.resume()
    assert torch.rand(1).item() == expected
    assert (
        outcome_of(fiber.resume())
        == torch.rand(1, generator=torch.Generator().manual_seed(3)).item()
    )


def test_an_error_leaves_the_default_generator_as_it_was() -> None:
    before = torch.get_rng_state()

    def function() -> None:
        torch.rand(5)
        raise_lookup_error()

    assert isinstance(outcome_of(fiber_of(function, seed=1).resume()), LookupError)
    assert torch.equal(torch.get_rng_state(), before)


def test_context_variables_are_copied_in_and_do_not_come_out() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="nobody")

    def function(name: str) -> Callable[[], list[str]]:
        def run() -> list[str]:
            found = [variable.get()]
            variable.set(name)
            suspend(1)
            return [*found, variable.get()]

        return run

    token = variable.set("caller")
    try:
        one, two = fiber_of(function("one")), fiber_of(function("two"))
        variable.set("changed after they were made")
        one.resume()
        two.resume()
        assert variable.get() == "changed after they were made"
        assert outcome_of(one.resume()) == ["caller", "one"]
        assert outcome_of(two.resume()) == ["caller", "two"]
        assert variable.get() == "changed after they were made"
    finally:
        variable.reset(token)


# --- misuse ---


def test_only_a_fiber_can_be_suspended() -> None:
    with pytest.raises(EngineMisuseError, match="fiber"):
        suspend(1)
    inside = greenlet.greenlet(lambda: suspend(1))
    with pytest.raises(EngineMisuseError, match="fiber"):
        inside.switch()

    def function() -> Any:
        return greenlet.greenlet(
            lambda: ((current_fiber() is not None), current_fiber(), suspend(1))
        ).switch()

    assert isinstance(outcome_of(fiber_of(function).resume()), EngineMisuseError), (
        "a greenlet within a fiber is none"
    )


def test_a_fiber_that_has_ended_cannot_go_on() -> None:
    fiber = fiber_of(lambda: None)
    fiber.resume()
    with pytest.raises(EngineMisuseError, match="ended"):
        fiber.resume()
    with pytest.raises(EngineMisuseError, match="ended"):
        fiber.throw(ValueError())


def test_a_fiber_goes_on_only_from_where_it_was_made() -> None:
    fiber = fiber_of(lambda: suspend("waiting"))
    fiber.resume()
    errors: list[BaseException | None] = []

    def elsewhere() -> None:
        for use in (fiber.resume, lambda: fiber.throw(ValueError())):
            try:
                use()
                errors.append(None)
            except BaseException as error:
                errors.append(error)

    on_another_thread(elsewhere)
    greenlet.greenlet(elsewhere).switch()
    assert [type(error) for error in errors] == [EngineMisuseError] * 4
    assert not fiber.finished
    assert outcome_of(fiber.resume("unharmed")) == "unharmed"


def test_a_fiber_cannot_resume_itself() -> None:
    fiber: Fiber

    def function() -> None:
        fiber.resume()

    fiber = fiber_of(function)
    assert isinstance(outcome_of(fiber.resume()), EngineMisuseError)


def test_a_fiber_within_a_fiber_suspends_to_it() -> None:
    def outer() -> list[Any]:
        inner = fiber_of(lambda: [current_fiber(), suspend("from the inner")])
        found = [inner.resume(), suspend("from the outer")]
        of_inner = outcome_of(inner.resume("to the inner"))
        assert of_inner[0] is inner
        assert current_fiber() is fiber
        return [*found, of_inner[1]]

    fiber = fiber_of(outer)
    assert fiber.resume() == "from the outer"
    assert outcome_of(fiber.resume("to the outer")) == [
        "from the inner",
        "to the outer",
        "to the inner",
    ]


# --- where fibers are not suspended ---


class Counting(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Dispatching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


MODES = [torch.inference_mode, Counting, Dispatching]


class Layer(nn.Module):
    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return sample + 1


class Autoencoder(nn.Module):
    def encode(self, sample: torch.Tensor) -> torch.Tensor:
        return sample + 2

    def decode(self, sample: torch.Tensor) -> torch.Tensor:
        return sample + 3


class Processor:
    def postprocess(self, sample: torch.Tensor) -> torch.Tensor:
        return sample + 4


class Holder(DiffusionPipeline):  # type: ignore[misc]
    def __init__(self, layer: Layer, vae: Autoencoder) -> None:
        super().__init__()
        self.register_modules(layer=layer, vae=vae)
        self.image_processor = Processor()


def modules_of(pipeline: Any, owns: Callable[[Fiber], bool] = lambda fiber: True) -> EngineModules:
    return EngineModules(
        pipeline,
        {},
        hook=functools.partial(SuspendHook, owns),
        call=call_engine,
        max_decode_rows=4,
        health=DeviceHealth(torch.device("cpu")),
        fingerprints=Fingerprints(),
    )


@pytest.fixture
def scope() -> Iterator[EngineScope]:
    modules = modules_of(Holder(Layer(), Autoencoder()))
    yield modules.scope
    modules.close()


def uses_of(scope: EngineScope) -> list[Callable[[], Any]]:
    view, sample = scope.view(), torch.zeros(1)
    on_threads = images_on_threads(view, on_image_thread)
    on_threads.__enter__()
    return [
        lambda: view.layer(sample),
        lambda: view.vae.encode(sample),
        lambda: view.vae.decode(sample),
        # which holds it open
        lambda on_threads=on_threads: view.image_processor.postprocess(sample),
    ]


def test_a_fiber_is_suspended_in_modules_autoencoders_and_postprocessing(
    scope: EngineScope,
) -> None:
    uses = uses_of(scope)
    fiber = fiber_of(lambda: [float(use()) for use in uses])
    request, names = fiber.resume(), []
    while isinstance(request, Call):
        names.append(request.target.name)
        request = fiber.resume(Attempt(request))
    assert names == ["layer", "vae.encode", "vae.decode"]
    assert isinstance(request, ImageWork)
    assert outcome_of(fiber.resume(request)) == [1, 2, 3, 4]


@pytest.mark.parametrize("use", range(4), ids=["module", "encode", "decode", "postprocess"])
@pytest.mark.parametrize("mode", MODES, ids=[mode.__name__ for mode in MODES])
def test_nothing_is_suspended_in_a_mode_that_belongs_to_the_thread(
    scope: EngineScope, mode: Any, use: int
) -> None:
    function = uses_of(scope)[use]

    def run() -> tuple[bool, float]:
        with mode():
            return suspendable(), float(function())

    answer = on_another_thread(lambda: fiber_of(run).resume())
    assert outcome_of(answer) == (False, use + 1)


def test_outside_of_fibers_hooks_pass_through(scope: EngineScope) -> None:
    assert [float(use()) for use in uses_of(scope)] == [1, 2, 3, 4]
    assert float(scope.pipeline.layer(torch.zeros(1))) == 1


def test_a_fiber_of_others_passes_through_the_hooks_of_an_engine() -> None:
    owned: list[Fiber] = []
    modules = modules_of(Holder(Layer(), Autoencoder()), owned.__contains__)
    try:
        layer = modules.scope.pipeline.layer
        assert float(outcome_of(fiber_of(lambda: layer(torch.zeros(1))).resume())) == 1
        fiber = fiber_of(lambda: layer(torch.zeros(1)))
        owned.append(fiber)
        assert isinstance(fiber.resume(), Call)
        assert float(outcome_of(fiber.resume(torch.ones(1)))) == 1
    finally:
        modules.close()


def test_what_a_call_of_a_pipeline_raises_is_raised_by_the_module(scope: EngineScope) -> None:
    view = scope.view()

    def function() -> str:
        try:
            view.layer(torch.zeros(1))
        except ValueError as error:
            return f"caught {error}"
        return "not raised"

    fiber = fiber_of(function)
    fiber.resume()
    assert outcome_of(fiber.throw(ValueError("out of rows"))) == "caught out of rows"


@pytest.mark.parametrize("name", ["stable_diffusion_3", "flux", "stable_cascade"])
def test_hooks_leave_nothing_behind(name: str) -> None:
    pipeline = tiny.FAMILIES[name].build()

    def attributes() -> list[set[str]]:
        return [set(vars(module)) for part in tiny.networks(pipeline) for module in part.modules()]

    before = attributes()
    modules = modules_of(pipeline)
    assert attributes() != before
    modules.close()
    assert attributes() == before
