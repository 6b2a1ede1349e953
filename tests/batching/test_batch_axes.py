"""Arguments whose shape leaves a choice: whatever is guessed, a proof decides, and results are
those of plain calls."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stepweave.batching.batch_axes import SEEN, Readings
from stepweave.compat.snapshot import ArgumentSnapshot
from tests.support.describing import Describing, rows
from tests.support.toy import Forward, Served, call, honest, serve

ROWS = 2


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def jobs(make: Any, count: int = 5, **changes: Any) -> list[dict[str, Any]]:
    """Calls whose argument `extra` is a tensor of their own, the same at every step."""
    return [call(i, given(make(i)), **changes) for i in range(count)]


def given(extra: Any) -> Any:
    return lambda step: {"extra": extra}


def check_merged(served: Served) -> None:
    served.check()
    assert served.state == "certified"
    assert served.merged_share > 0.5


# Several entries for each row, as the captions of AnimateDiff's frames


def sums_entries(self: nn.Module, x: Tensor, extra: Tensor) -> Tensor:
    return honest(x) + extra.unflatten(0, (len(x), -1)).mean((1, 2))[:, None]


def sums_entries_of_tiles(self: nn.Module, x: Tensor, extra: Tensor) -> Tensor:
    """As sums_entries, with the rows' first entries first, then all second ones."""
    return honest(x) + extra.unflatten(0, (-1, len(x))).mean((0, 2))[:, None]


def sums_all(self: nn.Module, x: Tensor, extra: Tensor) -> Tensor:
    """`extra` is one thing for all rows."""
    return honest(x) + extra.mean()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("each", [2, 3, 8])
def test_several_entries_a_row_are_merged(count: int, each: int) -> None:
    check_merged(serve(sums_entries, jobs(lambda i: numbers(i, count * each, 4), rows=count)))


def test_calls_of_one_and_two_rows_with_several_entries_each_run_together() -> None:
    calls = [call(i, given(numbers(i, 6 * (1 + i % 2), 4)), rows=1 + i % 2) for i in range(6)]
    served = serve(sums_entries, calls)
    check_merged(served)
    assert max(served.by_rows) > 2


@pytest.mark.parametrize("forward", [sums_all, sums_entries_of_tiles])
def test_what_only_looks_like_several_entries_a_row_is_not_merged(
    forward: Forward, caplog: pytest.LogCaptureFixture
) -> None:
    served = serve(forward, jobs(lambda i: numbers(i, 6, 4), rows=ROWS))
    served.check(exact=True)
    assert served.merged_share == 0
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING], (
        "it was a guess, no failure"
    )


def test_equal_tables_are_shared_after_a_guess_has_failed() -> None:
    tables = [numbers(0, 6, 4), numbers(1, 6, 4)]
    calls = [call(i, given(tables[i % 2].clone()), rows=ROWS) for i in range(6)]
    check_merged(serve(sums_all, calls, calls))


def test_tables_that_are_always_equal_are_never_guessed_at() -> None:
    served = serve(sums_all, jobs(lambda i: torch.ones(6, 4), rows=ROWS))
    check_merged(served)
    assert served.stats.proofs <= 5, "of which audits are all but one"


# Lists with an entry for each row, of which some have as many rows as there are, by chance; and
# lists of tensors of all rows


def means_of_entries(self: nn.Module, x: Tensor, extra: list[Tensor]) -> Tensor:
    return honest(x) + torch.stack([one.mean() for one in extra])[:, None]


def means_of_rows(self: nn.Module, x: Tensor, extra: list[Tensor]) -> Tensor:
    return honest(x) + torch.stack([one.mean(1) for one in extra]).mean(0)[:, None]


def lists(i: int, count: int, lengths: Sequence[int]) -> list[Tensor]:
    return [numbers(10 * i + k, lengths[(i + k) % len(lengths)], 4) for k in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_entries_that_happen_to_have_as_many_rows_run_with_the_others(count: int) -> None:
    lengths = (count, count, 3 * count + 1, 4 * count)
    served = serve(means_of_entries, *[jobs(lambda i: lists(i, count, lengths), rows=count)] * 3)
    check_merged(served)
    assert max(served.by_rows) >= 4 * count


@pytest.mark.parametrize("count", [1, 2])
def test_entries_that_all_happen_to_have_as_many_rows_are_told_by_a_proof(count: int) -> None:
    check_merged(
        serve(means_of_entries, *[jobs(lambda i: lists(i, count, [count]), rows=count)] * 3)
    )


@pytest.mark.parametrize("count", [1, 2])
def test_tensors_of_all_rows_in_a_list_of_as_many_are_merged(count: int) -> None:
    check_merged(serve(means_of_rows, *[jobs(lambda i: lists(i, count, [count]), rows=count)] * 3))


# Rows in the second dimension, as the captions of HiDream, one table for each of its layers


def sums_across(self: nn.Module, x: Tensor, extra: Tensor) -> Tensor:
    return honest(x) + extra.mean((0, 2))[:, None]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_rows_in_the_second_dimension_are_merged(count: int) -> None:
    check_merged(serve(sums_across, jobs(lambda i: numbers(i, 5, count, 4), rows=count)))


def test_if_rows_in_the_second_dimension_prove_wrong_several_entries_are_tried() -> None:
    """Of shape (4, 2, 4), beside two rows, both are possible."""

    def forward(self: nn.Module, x: Tensor, extra: Tensor) -> Tensor:
        return honest(x) + extra.unflatten(0, (len(x), -1)).mean((1, 2, 3))[:, None]

    served = serve(forward, *[jobs(lambda i: numbers(i, 4, 2, 4), rows=ROWS)] * 3)
    check_merged(served)


# Constants of one row, as the positions of Kandinsky 5's single frame


def takes_positions(self: nn.Module, x: Tensor, extra: list[Tensor]) -> Tensor:
    if len(extra[0]) > 1:
        raise ValueError("one frame only")
    return honest(x) + sum(one.float().mean() for one in extra) / 10


def test_a_constant_of_one_row_is_shared_where_joining_it_fails(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def extra(i: int) -> list[Tensor]:
        return [torch.arange(1), torch.arange(4), torch.arange(5)]

    served = serve(takes_positions, *[jobs(extra, steps=12)] * 2)
    served.check()
    assert served.state == "certified"
    assert served.merged_share > 0.5
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


def test_prompts_that_were_equal_at_first_are_not_taken_for_constants_for_good() -> None:
    def forward(self: nn.Module, x: Tensor, prompt: Tensor, extra: Tensor) -> Tensor:
        if len(extra) > 1:
            raise ValueError("one frame only")
        return honest(x) + prompt.mean(1, keepdim=True) / 10 + extra.float().mean() / 10

    def arguments(prompt: float) -> Any:
        return lambda step: {"prompt": torch.full((1, 4), float(prompt)), "extra": torch.arange(1)}

    different = [call(i, arguments(i)) for i in range(4)]
    served = serve(forward, [call(i, arguments(0)) for i in range(2)], *[different] * 4)
    served.check()
    assert served.merged_share > 0.5


def test_times_are_not_taken_for_constants_though_they_are_equal_at_the_first_step() -> None:
    def forward(self: nn.Module, x: Tensor, timestep: Tensor, extra: list[Tensor]) -> Tensor:
        return takes_positions(self, x, extra) + timestep[:, None] / 10

    def arguments(step: int) -> dict[str, Any]:
        return {
            "timestep": torch.tensor([float(step)]),
            "extra": [torch.arange(1), torch.arange(4)],
        }

    # jobs of which each is at a step of its own
    calls = [call(i, lambda step, i=i: arguments(step + i), steps=12) for i in range(4)]
    served = serve(forward, [call(i, arguments) for i in range(2)], calls)
    served.check()
    assert served.merged_share > 0.5


# Objects, as caches of keys and values


class Cache:
    def __init__(self, keys: Tensor | None = None, mode: str = "read") -> None:
        self.mode = mode
        self.layers = [keys]
        self.count = 0


def reads_cache(self: nn.Module, x: Tensor, extra: Cache) -> Tensor:
    keys = extra.layers[0]
    return honest(x) if keys is None else honest(x) + keys.mean(1, keepdim=True)


def fills_cache(self: nn.Module, x: Tensor, extra: Cache) -> Tensor:
    if extra.layers[0] is None:
        extra.layers[0] = honest(x)
    return honest(x) + extra.layers[0]


def counts_in_cache(self: nn.Module, x: Tensor, extra: Cache) -> Tensor:
    extra.count += 1
    return honest(x) + extra.count


def test_objects_that_hold_the_same_are_the_same() -> None:
    check_merged(serve(reads_cache, jobs(lambda i: Cache())))


def test_what_objects_hold_is_merged() -> None:
    check_merged(serve(reads_cache, jobs(lambda i: Cache(numbers(i, ROWS, 4)), rows=ROWS)))


def adds_to_cache(self: nn.Module, x: Tensor, extra: Cache) -> Tensor:
    keys = extra.layers[0]
    assert keys is not None
    keys.add_(1)
    return honest(x) + keys[:, :1] / 10


def test_objects_that_are_written_to_are_not_merged() -> None:
    served = serve(counts_in_cache, anew=lambda: [jobs(lambda i: Cache())])
    served.check(exact=True)
    assert served.merged_share == 0


@pytest.mark.parametrize("count", [1, 2])
def test_objects_whose_tensors_are_written_to_are_not_merged(count: int) -> None:
    served = serve(
        adds_to_cache, anew=lambda: [jobs(lambda i: Cache(torch.zeros(count, 4)), rows=count)]
    )
    served.check(exact=True)
    assert served.merged_share == 0


def test_a_cache_is_filled_alone_and_read_together() -> None:
    served = serve(fills_cache, anew=lambda: [jobs(lambda i: Cache())])
    served.check()
    assert 0 < served.merged_share < 1
    assert {one["state"] for one in served.stats.certificates} == {"certified", "failed"}


def test_objects_in_other_modes_do_not_share() -> None:
    served = serve(
        reads_cache, [call(i, lambda step, i=i: {"extra": Cache(mode=f"{i}")}) for i in range(4)]
    )
    served.check(exact=True)
    assert served.merged_share == 0


def test_an_object_that_holds_itself_has_an_end() -> None:
    cache = Cache()
    cache.mode = cache  # type: ignore[assignment]
    assert Describing()(rows(1), names=cache).opaque


# What is noted of arguments


def test_what_was_changed_is_told_and_undone() -> None:
    tensor, generator = torch.zeros(2), torch.Generator().manual_seed(0)
    cache, listed, named = Cache(tensor), [tensor, [1]], {"a": 1}
    given = ArgumentSnapshot(cache, listed, named, (generator,))
    assert not (given.wrote() or given.drew() or given.overwritten())
    listed.pop()
    assert not given.wrote(), "to empty a list is allowed"
    for change in (
        lambda: listed.append(2),
        lambda: named.update(b=2),
        lambda: cache.layers.append(None),
        lambda: setattr(cache, "mode", "write"),
        lambda: named.clear(),
    ):
        change()
        assert given.wrote()
        given.put_back()
        assert not given.wrote()
    drawn = torch.rand(3, generator=generator)
    assert given.drew()
    given.put_back()
    assert torch.equal(torch.rand(3, generator=generator), drawn)
    tensor.add_(1)
    assert given.overwritten()


def test_what_contains_itself_has_an_end() -> None:
    listed: list[Any] = []
    listed.append(listed)
    assert not ArgumentSnapshot(listed).wrote()


# Times of schedulers that count in whole numbers and of such that do not


def adds_time(self: nn.Module, x: Tensor, timestep: Tensor) -> Tensor:
    return honest(x) + timestep.reshape(-1, 1).float() / 100


@pytest.mark.parametrize("shape", [(), (1,)])
def test_times_of_either_type_run_together(shape: tuple[int, ...]) -> None:
    def times(i: int) -> Any:
        dtype = torch.int64 if i % 2 else torch.float32
        return lambda step: {"timestep": torch.full(shape, 10 * step + i, dtype=dtype)}

    served = serve(adds_time, *[[call(i, times(i)) for i in range(6)]] * 2)
    check_merged(served)
    assert max(served.by_rows) == 6


def tells_types_apart(self: nn.Module, x: Tensor, timestep: Tensor) -> Tensor:
    return (
        honest(x)
        + timestep.reshape(-1, 1).float() / 100
        + (0.5 if timestep.dtype.is_floating_point else 0)
    )


def of_types(*types: torch.dtype) -> list[dict[str, Any]]:
    def times(i: int) -> Any:
        return lambda step: {"timestep": torch.tensor(10 * step + i, dtype=types[i % len(types)])}

    return [call(i, times(i)) for i in range(4)]


def test_times_of_another_type_do_not_run_with_a_module_that_tells_them_apart() -> None:
    served = serve(
        tells_types_apart, *[of_types(torch.float32, torch.int64)] * 2, *[of_types(torch.int64)] * 3
    )
    served.check()
    assert served.state == "certified"
    assert served.merged_share > 0.3, "calls of one type share"


def test_a_pair_of_types_is_proven_for_itself() -> None:
    served = serve(
        tells_types_apart,
        of_types(torch.int32, torch.int64),
        *[of_types(torch.float32, torch.int64)] * 2,
    )
    served.check()


# Results that are not the rows' own


def with_a_flag(self: nn.Module, x: Tensor) -> tuple[Tensor, Any]:
    return honest(x), bool((x > 1).any())


def with_an_array(self: nn.Module, x: Tensor) -> tuple[Tensor, Any]:
    return honest(x), np.full(3, float(x.mean()))


def with_a_tensor(self: nn.Module, x: Tensor) -> tuple[Tensor, Any]:
    return honest(x), (x.abs() > 2).any()


def with_a_table(self: nn.Module, x: Tensor) -> tuple[Tensor, Any]:
    return honest(x), torch.arange(8.0).reshape(4, 2)


@pytest.mark.parametrize("forward", [with_a_flag, with_an_array, with_a_tensor, with_a_table])
def test_results_that_are_not_the_rows_own_are_not_shared(forward: Forward) -> None:
    served = serve(forward, [call(i) for i in range(6)], [call(i) for i in range(4)])
    served.check(exact=True)
    assert served.merged_share == 0


# The record


def test_a_reading_is_tried_once() -> None:
    readings = Readings()
    path = ("extra",)
    assert readings.vary(path, "here", b"1", ["across", "several"]) is None
    assert readings.vary(path, "there", b"2", ["across", "several"]) is None
    assert readings.vary(path, "here", b"1", ["across", "several"]) is None
    assert readings.vary(path, "here", b"2", ["across", "several"]) == "across"
    assert readings.refute([(path, "across")])
    assert readings.vary(path, "here", b"3", ["across", "several"]) == "several"
    assert readings.refute([(path, "several")])
    assert readings.vary(path, "here", b"4", ["across", "several"]) is None
    assert not readings.suppose([path], "several")


def test_what_was_proven_is_not_given_up() -> None:
    readings = Readings()
    guess = (("extra",), "shared")
    assert readings.suppose([guess[0]], "shared")
    readings.prove([guess])
    assert not readings.refute([guess])
    assert readings.of(guess[0]) == "shared"


def test_the_values_seen_are_bounded() -> None:
    readings = Readings()
    for i in range(3 * SEEN):
        readings.vary(("extra",), i, b"", [])
    assert len(readings._seen) == SEEN
