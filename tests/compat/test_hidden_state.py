"""State that is no argument: what a module keeps from one forward to the next belongs to one call
of the pipeline.

Each fault is planted in a pipeline by its user, in ways that code on the hub has: caches of
residuals, counters, buffers. Jobs get what a plain call of a pipeline gives in which it was planted
just now, and the caller's modules are left as they were.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from stepweave import StepEngine
from stepweave.config import EMBEDDED_MODEL
from tests.support.tiny import FAMILIES
from tests.support.together import (
    SECONDS,
    Outcome,
    Request,
    difference,
    numbers,
    plain,
    run,
    submit_together,
    warnings_of,
)

SD3 = FAMILIES["stable_diffusion_3"]
PROMPTS = ["a red circle", "two small dogs", "x", "blue"]
SIXES = (6, 6, 6, 6)
ODD = (5, 7, 6, 3)

pytestmark = pytest.mark.usefixtures("one_torch_thread", "every_row_pays")

Peek = Callable[[], Any]
Plant = Callable[[Any, pytest.MonkeyPatch], Peek]


def seen(value: Any) -> Any:
    """A twin that compares by value and stays as it is."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: seen(item) for key, item in value.items()}
    return copy.deepcopy(value)


# State


def residual_in_a_closure(pipeline: Any, patch: pytest.MonkeyPatch) -> Peek:
    """As TeaCache does: every second forward is the one before, less its sample."""
    original = pipeline.transformer.forward
    kept: dict[str, Any] = {"calls": 0, "residual": None}

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        kept["calls"] += 1
        if kept["calls"] % 2 == 0:
            return (hidden_states + kept["residual"],)
        output = original(hidden_states, *args, **kwargs)
        kept["residual"] = output[0] - hidden_states
        return output

    pipeline.transformer.forward = forward
    return lambda: seen(kept)


def residual_as_an_attribute(pipeline: Any, patch: pytest.MonkeyPatch) -> Peek:
    transformer = pipeline.transformer
    original = transformer.forward
    transformer.residual = None

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if transformer.residual is not None:
            residual, transformer.residual = transformer.residual, None
            return (hidden_states + residual,)
        output = original(hidden_states, *args, **kwargs)
        transformer.residual = output[0] - hidden_states
        return output

    transformer.forward = forward
    return lambda: seen(transformer.residual)


def counter_in_a_pre_hook(pipeline: Any, patch: pytest.MonkeyPatch) -> Peek:
    """Every third forward has a weaker sample."""
    count = 0

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        nonlocal count
        count += 1
        return args, kwargs | {
            "hidden_states": kwargs["hidden_states"] * (0.5 if count % 3 == 0 else 1)
        }

    pipeline.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    return lambda: count


def counter_in_a_forward_hook(pipeline: Any, patch: pytest.MonkeyPatch) -> Peek:
    count = 0

    def hook(module: Any, args: Any, output: Any) -> Any:
        nonlocal count
        count += 1
        return (output[0] * (0.5 if count % 3 == 0 else 1),)

    pipeline.transformer.register_forward_hook(hook)
    return lambda: count


def buffer_written_in_place(pipeline: Any, patch: pytest.MonkeyPatch) -> Peek:
    transformer = pipeline.transformer
    transformer.register_buffer("drift", torch.zeros(1), persistent=False)
    original = transformer.forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        transformer.drift.add_(0.1)
        return original(hidden_states + transformer.drift, *args, **kwargs)

    transformer.forward = forward
    return lambda: seen(transformer.drift)


def buffer_written_past_its_version(pipeline: Any, patch: pytest.MonkeyPatch) -> Peek:
    """Through `data`, which leaves no trace in the tensor's version."""
    layer = pipeline.transformer.proj_out
    layer.register_buffer("drift", torch.zeros(1))
    original = layer.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer.drift.data.add_(0.1)
        return original(x + layer.drift, *args, **kwargs)

    layer.forward = forward
    return lambda: seen(layer.drift)


def attribute_of_a_submodule(pipeline: Any, patch: pytest.MonkeyPatch) -> Peek:
    layer = pipeline.transformer.proj_out
    layer.turns = 0
    original = layer.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer.turns += 1
        return original(x * (1 + 0.2 * layer.turns), *args, **kwargs)

    layer.forward = forward
    return lambda: layer.turns


def class_attribute_shadowed(pipeline: Any, patch: pytest.MonkeyPatch) -> Peek:
    """As TeaCache's own code does: the class has the start, and the first forward gives the module
    its own."""
    kind = SD3Transformer2DModel
    original = ORIGINAL

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.cnt += 1
        if self.cnt % 2 == 0:
            return (hidden_states + self.previous_residual,)
        output = original(self, hidden_states, *args, **kwargs)
        self.previous_residual = output[0] - hidden_states
        return output

    patch.setattr(kind, "cnt", 0, raising=False)
    patch.setattr(kind, "previous_residual", None, raising=False)
    patch.setattr(kind, "forward", forward)
    own = vars(pipeline.transformer)
    return lambda: (kind.cnt, kind.previous_residual, "cnt" in own, "previous_residual" in own)


def class_attribute_written(pipeline: Any, patch: pytest.MonkeyPatch) -> Peek:
    kind = SD3Transformer2DModel
    original = ORIGINAL

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.__class__.cnt += 1
        return original(self, hidden_states * (1 + 0.2 * self.__class__.cnt), *args, **kwargs)

    patch.setattr(kind, "cnt", 0, raising=False)
    patch.setattr(kind, "forward", forward)
    return lambda: kind.cnt


ORIGINAL = SD3Transformer2DModel.forward
COUNTED: dict[str, int] = {}


def global_dictionary(pipeline: Any, patch: pytest.MonkeyPatch) -> Peek:
    COUNTED.clear()
    original = pipeline.transformer.forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        COUNTED["calls"] = COUNTED.get("calls", 0) + 1
        return original(hidden_states * (1 + 0.2 * COUNTED["calls"]), *args, **kwargs)

    pipeline.transformer.forward = forward
    return lambda: dict(COUNTED)


def closure_of_a_hook_deep_within(pipeline: Any, patch: pytest.MonkeyPatch) -> Peek:
    """A mean of what a layer gave so far."""
    layer = pipeline.transformer.transformer_blocks[1].attn.to_q
    history: list[Tensor] = []

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        history.append(output.mean())
        return output + torch.stack(history).sum()

    layer.register_forward_hook(hook)
    return lambda: seen(torch.stack(history)) if history else []


def attribute_of_a_processor(pipeline: Any, patch: pytest.MonkeyPatch) -> Peek:
    """An attention processor, which is no module, counts."""
    attention = pipeline.transformer.transformer_blocks[0].attn
    original = attention.processor

    class Counting:
        def __init__(self) -> None:
            self.turns = 0

        def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.turns += 1
            return original(attn, hidden_states * (1 + 0.2 * self.turns), *args, **kwargs)

    attention.processor = counting = Counting()
    return lambda: counting.turns


class Namespace:
    turns = 0


def attribute_of_a_class_that_is_no_module(pipeline: Any, patch: pytest.MonkeyPatch) -> Peek:
    Namespace.turns = 0
    original = pipeline.transformer.forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        Namespace.turns += 1
        return original(hidden_states * (1 + 0.2 * Namespace.turns), *args, **kwargs)

    pipeline.transformer.forward = forward
    return lambda: Namespace.turns


def global_of_a_static_method(pipeline: Any, patch: pytest.MonkeyPatch) -> Peek:
    COUNTED.clear()

    class Counting(type(pipeline.transformer)):  # type: ignore[misc]
        @staticmethod
        def strength() -> float:
            COUNTED["calls"] = COUNTED.get("calls", 0) + 1
            return 1 + 0.2 * COUNTED["calls"]

        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().forward(hidden_states * self.strength(), *args, **kwargs)

    pipeline.transformer.__class__ = Counting
    return lambda: dict(COUNTED)


class Slotted:
    __slots__ = ("__turns",)

    def __init__(self) -> None:
        self.__turns = 0

    def next(self) -> int:
        self.__turns += 1
        return self.__turns

    def now(self) -> int:
        return self.__turns


def private_slot(pipeline: Any, patch: pytest.MonkeyPatch) -> Peek:
    pipeline.transformer.counter = counter = Slotted()
    original = pipeline.transformer.forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(hidden_states * (1 + 0.2 * counter.next()), *args, **kwargs)

    pipeline.transformer.forward = forward
    return counter.now


@dataclass(frozen=True)
class Fault:
    plant: Plant
    hints: tuple[str, ...]  # of which a warning must name one


FAULTS = [
    Fault(residual_in_a_closure, ("kept", "residual")),
    Fault(residual_as_an_attribute, ("residual",)),
    Fault(counter_in_a_pre_hook, ("count",)),
    Fault(counter_in_a_forward_hook, ("count",)),
    Fault(buffer_written_in_place, ("drift",)),
    Fault(buffer_written_past_its_version, ("drift",)),
    Fault(attribute_of_a_submodule, ("turns",)),
    Fault(class_attribute_shadowed, ("cnt", "previous_residual")),
    Fault(class_attribute_written, ("cnt",)),
    Fault(global_dictionary, ("COUNTED", "calls")),
    Fault(closure_of_a_hook_deep_within, ("history",)),
    Fault(attribute_of_a_processor, ("turns",)),
    Fault(attribute_of_a_class_that_is_no_module, ("turns",)),
    Fault(global_of_a_static_method, ("COUNTED", "calls")),
    Fault(private_slot, ("turns",)),
]
every_fault = pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.plant.__name__)
# Places that another fault stands for in the quick run: attributes, hooks, classes, globals
REPEATED = (
    residual_as_an_attribute,
    counter_in_a_forward_hook,
    class_attribute_shadowed,
    closure_of_a_hook_deep_within,
    attribute_of_a_class_that_is_no_module,
    global_of_a_static_method,
)


@dataclass
class Planted:
    """Builds pipelines with a fault, and peeks at the state of the last one."""

    plant: Plant
    patch: pytest.MonkeyPatch
    build: Callable[[], Any] = SD3.build
    peeks: list[Peek] = field(default_factory=list)
    before: Any = None

    def __call__(self) -> Any:
        pipeline = self.build()
        self.peeks.append(self.plant(pipeline, self.patch))
        self.before = self.peeks[-1]()
        return pipeline

    @property
    def now(self) -> Any:
        return self.peeks[-1]()


def asked(seed: int, steps: int, side: int = 16) -> Request:
    """Without guidance, so that a forward has one row."""
    return lambda: SD3.arguments(
        PROMPTS[seed % 4], seed=seed, steps=steps, guidance_scale=1.0, height=side, width=side
    )


def four(steps: tuple[int, ...] = SIXES) -> list[Request]:
    return [asked(seed, count) for seed, count in enumerate(steps)]


def check_turns(
    outcome: Outcome, planted: Planted, hints: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    outcome.check_alone("transformer")
    assert planted.now == planted.before, "the caller's module has another state than before"
    [line] = warnings_of(caplog, "transformer")
    assert any(hint in line for hint in hints), line


@pytest.mark.full
@every_fault
def test_the_fault_is_one(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the tests of this module can fail: a second call of the same pipeline gives something
    else."""
    planted = Planted(fault.plant, monkeypatch)
    [once] = plain(planted, [asked(0, 5)])
    pipeline = planted()
    assert difference(once, numbers(pipeline(**asked(0, 5)()))) == 0
    assert planted.now != planted.before
    assert difference(once, numbers(pipeline(**asked(0, 5)()))) > 1e-2


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(
            fault,
            id=fault.plant.__name__,
            marks=pytest.mark.full if fault.plant in REPEATED else (),
        )
        for fault in FAULTS
    ],
)
def test_jobs_of_a_module_that_keeps_state_take_turns(
    fault: Fault, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = Planted(fault.plant, monkeypatch)
    check_turns(run(planted, four()), planted, fault.hints, caplog)


@pytest.mark.full
@every_fault
def test_they_do_in_any_order_and_whoever_came_before(
    fault: Fault, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Odd numbers of steps: a counter that went on counting would be out of phase."""
    planted = Planted(fault.plant, monkeypatch)
    outcome = run(planted, four(ODD)[:1], four(ODD), four(ODD)[::-1], four(ODD)[1:2])
    check_turns(outcome, planted, fault.hints, caplog)


@pytest.mark.parametrize(
    "plant",
    [
        residual_in_a_closure,
        pytest.param(counter_in_a_pre_hook, marks=pytest.mark.full),
        buffer_written_in_place,
        pytest.param(closure_of_a_hook_deep_within, marks=pytest.mark.full),
    ],
)
def test_state_does_not_leak_between_jobs_that_are_never_merged(
    plant: Plant, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images of different sizes share no forward, so that no proof is ever made."""
    planted = Planted(plant, monkeypatch)
    requests = [asked(seed, 5, side) for seed, side in enumerate((16, 24, 32, 48))]
    outcome = run(planted, requests)
    outcome.check_alone("transformer")
    assert planted.now == planted.before
    assert len(warnings_of(caplog, "transformer")) == 1


@pytest.mark.parametrize(
    "plant",
    [residual_in_a_closure, pytest.param(counter_in_a_pre_hook, marks=pytest.mark.full)],
)
def test_jobs_with_guidance_take_turns_too(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows, and jobs of one row beside them."""
    planted = Planted(plant, monkeypatch)
    requests: list[Request] = [
        functools.partial(
            SD3.arguments, PROMPTS[i], seed=i, steps=5 + i % 2, guidance_scale=(5.0, 1.0)[i // 2]
        )
        for i in range(4)
    ]
    run(planted, requests).check_alone("transformer")
    assert planted.now == planted.before


def test_a_job_that_is_cancelled_leaves_no_state_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = Planted(residual_in_a_closure, monkeypatch)
    expected = plain(planted, four(ODD))
    with StepEngine(planted(), knee=False) as engine:
        jobs = submit_together(engine, [asked(9, 200), *four(ODD)])
        deadline = time.monotonic() + SECONDS
        while not any(job.progress.step >= 3 or job.done() for job in jobs):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        jobs[0].cancel()
        assert jobs[0].exception(SECONDS) is not None
        found = [numbers(job.result(SECONDS)) for job in jobs[1:]]
    assert max(map(difference, found, expected)) <= 1e-4
    assert engine.stats().forwards["transformer"].merged_share == 0
    assert planted.now == planted.before


def test_what_the_caller_had_counted_is_where_every_job_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """State as at the start is not that of a new module."""

    def build() -> Any:
        pipeline = planted()
        pipeline(**asked(5, 5)())
        return pipeline

    planted = Planted(counter_in_a_forward_hook, monkeypatch)
    run(build, four(ODD)).check_alone("transformer")
    assert planted.now == 5


@functools.cache
def embedded() -> Any:
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        EMBEDDED_MODEL, text_encoder_3=None, tokenizer_3=None
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    "plant",
    [
        residual_in_a_closure,
        pytest.param(counter_in_a_pre_hook, marks=pytest.mark.full),
        pytest.param(class_attribute_shadowed, marks=pytest.mark.full),
    ],
)
def test_jobs_of_the_embedded_model_take_turns(
    plant: Plant, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(seed: int) -> Request:
        return lambda: {
            "prompt": f"a large red {('star', 'ring', 'cross')[seed]}",
            "num_inference_steps": 5,
            "output_type": "np",
            "max_sequence_length": 1,
            "guidance_scale": 1.0,
            "generator": torch.Generator().manual_seed(seed),
        }

    planted = Planted(plant, monkeypatch, build=lambda: copy.deepcopy(embedded()))
    outcome = run(planted, [ask(seed) for seed in range(3)])
    outcome.check_alone("transformer")
    assert planted.now == planted.before
    assert len(warnings_of(caplog, "transformer")) == 1


# What is no state


def tables_by_shape(pipeline: Any, patch: pytest.MonkeyPatch) -> Peek:
    original = pipeline.transformer.forward
    tables: dict[Any, Tensor] = {}

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        shape = hidden_states.shape[1:]
        if shape not in tables:
            tables[shape] = torch.linspace(0, 0.5, shape.numel()).reshape(shape)
        return original(hidden_states + tables[shape], *args, **kwargs)

    pipeline.transformer.forward = forward
    return lambda: None


def tables_by_rows_too(pipeline: Any, patch: pytest.MonkeyPatch) -> Peek:
    """A merged forward has a table that no single one had."""
    transformer = pipeline.transformer
    original = transformer.forward
    transformer.tables = {}

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        shape = hidden_states.shape
        if shape not in transformer.tables:
            transformer.tables[shape] = (
                torch.linspace(0, 0.5, shape[1:].numel()).reshape(shape[1:]).expand(shape)
            )
        return original(hidden_states + transformer.tables[shape], *args, **kwargs)

    transformer.forward = forward
    return lambda: None


def buffer_made_when_needed(pipeline: Any, patch: pytest.MonkeyPatch) -> Peek:
    transformer = pipeline.transformer
    original = transformer.forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(transformer, "ramp"):
            transformer.register_buffer(
                "ramp", torch.linspace(0, 0.5, hidden_states.shape[-1]), persistent=False
            )
        return original(hidden_states + transformer.ramp, *args, **kwargs)

    transformer.forward = forward
    return lambda: None


def attribute_made_when_needed(pipeline: Any, patch: pytest.MonkeyPatch) -> Peek:
    """None at first."""
    norm = pipeline.transformer.norm_out
    original = norm.forward
    norm.ramp = None

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if norm.ramp is None:
            norm.ramp = torch.linspace(0, 0.5, x.shape[-1])
        return original(x + norm.ramp, *args, **kwargs)

    norm.forward = forward
    return lambda: None


def remembered_function(pipeline: Any, patch: pytest.MonkeyPatch) -> Peek:
    original = pipeline.transformer.forward

    @functools.lru_cache
    def ramp(width: int) -> Tensor:
        return torch.linspace(0, 0.5, width)

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(hidden_states + ramp(hidden_states.shape[-1]), *args, **kwargs)

    pipeline.transformer.forward = forward
    return lambda: None


def table_that_grows(pipeline: Any, patch: pytest.MonkeyPatch) -> Peek:
    """As tables of rotary positions: made anew where a longer one is needed, the same as far as the
    shorter one went."""
    transformer = pipeline.transformer
    original = transformer.forward
    transformer.positions = torch.empty(0)

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        width = hidden_states.shape[-1]
        if len(transformer.positions) < width:
            transformer.positions = 0.05 * torch.arange(width, dtype=torch.float32)
        return original(hidden_states + transformer.positions[:width], *args, **kwargs)

    transformer.forward = forward
    return lambda: None


every_table = pytest.mark.parametrize(
    "plant",
    [
        tables_by_shape,
        pytest.param(tables_by_rows_too, marks=pytest.mark.full),
        buffer_made_when_needed,
        pytest.param(attribute_made_when_needed, marks=pytest.mark.full),
        remembered_function,
        pytest.param(table_that_grows, marks=pytest.mark.full),
    ],
)


@every_table
def test_tables_that_the_first_forward_makes_are_no_such_state(
    plant: Plant, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = run(Planted(plant, monkeypatch), four(), four(ODD))
    outcome.check_merged("transformer", 0.6)
    assert warnings_of(caplog) == []


@pytest.mark.parametrize(
    "plant",
    [
        tables_by_shape,
        pytest.param(tables_by_rows_too, marks=pytest.mark.full),
        pytest.param(remembered_function, marks=pytest.mark.full),
        pytest.param(table_that_grows, marks=pytest.mark.full),
    ],
)
def test_nor_are_those_that_a_later_size_makes(
    plant: Plant, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = [[asked(seed, 6, side) for seed in range(4)] for side in (16, 32, 24, 16)]
    outcome = run(Planted(plant, monkeypatch), *rounds)
    outcome.check_merged("transformer", 0.6)
    assert warnings_of(caplog) == []


# Results that are remembered


def test_what_an_encoder_gave_another_job_is_not_given_to_a_job_once_it_keeps_state() -> None:
    """It counts its calls; all prompts are the same."""

    def build() -> Any:
        pipeline = SD3.build()
        layer = pipeline.text_encoder.text_model.final_layer_norm
        original = layer.forward
        layer.turns = 0

        def forward(x: Tensor) -> Tensor:
            layer.turns += 1
            return original(x) * (1 + 0.2 * layer.turns)

        layer.forward = forward
        return pipeline

    prompts = ["a red circle", "x", "a red circle", "x"]
    requests: list[Request] = [
        lambda i=i, prompt=prompt: SD3.arguments(prompt, seed=i, steps=3)  # type: ignore[misc]
        for i, prompt in enumerate(prompts)
    ]
    run(build, requests, requests, requests).check()
