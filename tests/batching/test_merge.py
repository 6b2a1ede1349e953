"""Describing calls, putting them together and taking results apart; and digests, which tell equal
tensors."""

from __future__ import annotations

import gc
import logging
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import BaseOutput
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from stepweave.batching.call import Call, Unmergeable
from stepweave.batching.fingerprints import Fingerprints
from stepweave.batching.layout import LayoutReader
from stepweave.batching.leaves import NESTED
from stepweave.batching.merge import merge, split
from stepweave.certification.certificates import Certificates
from stepweave.compat import torch_state as ambient
from stepweave.compat.nested import cloned, flat, tensors
from tests.support.describing import Describing, Tensor, rows
from tests.support.toy import STEPS, WIDTH, call, honest, serve

# Calls


def masked(
    self: nn.Module,
    x: Tensor,
    encoder_hidden_states: Any = None,
    encoder_hidden_states_mask: Tensor | None = None,
) -> Any: ...


def masked_by_attention(
    self: nn.Module,
    x: Tensor,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Tensor | None = None,
) -> Any: ...


@pytest.fixture
def describe() -> Describing:
    return Describing()


def tag(call: Call, name: str) -> str:
    kind, *match = dict(call.group.layout)[name]
    return str(match[0].__name__ if kind is NESTED else kind.name)


def mergeable(*calls: Call) -> bool:
    return bool(calls[0].group.layout) and len({call.key for call in calls}) == 1


# Descriptions


def test_the_first_tensor_tells_how_many_rows_there_are(describe: Describing) -> None:
    assert describe(rows(1, 2, 3)).rows == 3
    assert describe([rows(1), rows(2)]).rows == 2
    assert describe(x=rows(1, 2)).rows == 2
    assert describe(torch.tensor(1.0), rows(1, 2)).rows == 2, "a number has no rows"


def test_what_each_argument_is_taken_for(describe: Describing) -> None:
    call = describe(
        rows(1, 2),
        timestep=torch.tensor(5),
        per_row=torch.zeros(2, 7),
        one_for_all=torch.zeros(1, 7),
        table=torch.zeros(5, 7),
        tables=(torch.zeros(5, 7), torch.zeros(5, 7)),
        residuals=[rows(1, 2), rows(1, 2), rows(1, 2)],
        captions=[torch.zeros(3, 4), torch.zeros(9, 4)],
        nothing=None,
        scale=0.5,
        names=["a", "a"],
        settings={"scale": 0.5, "ids": rows(1, 2)},
    )
    assert {name: tag(call, name) for name, _ in call.group.layout} == {
        "x": "rows",
        "timestep": "scalar",
        "per_row": "rows",
        "one_for_all": "rows",
        "table": "shared",
        "tables": "tuple",
        "residuals": "list",
        "captions": "per row",
        "nothing": "constant",
        "scale": "constant",
        "names": "repeated",
        "settings": "dict",
    }
    assert tag(describe(rows(1), timestep=5), "timestep") == "number"
    assert tag(describe(rows(1), timestep=5.0), "timestep") == "number"
    assert tag(describe(rows(1), timestep=True), "timestep") == "constant"


def test_calls_that_differ_in_rows_and_values_only_can_be_merged(describe: Describing) -> None:
    one = describe(rows(1), torch.tensor(3), ids=rows(1), table=torch.ones(5, 2))
    other = describe(rows(2, 3), torch.tensor(4), ids=rows(7, 8), table=torch.ones(5, 2))
    assert mergeable(one, other)
    assert (one.rows, other.rows) == (1, 2)


class Colour(Enum):
    RED = 1
    BLUE = 2


PARTING: dict[str, tuple[Any, Any]] = {
    "shared tensors": (torch.zeros(5, 2), torch.ones(5, 2)),
    "shared tensors of other types": (torch.zeros(5, 2), torch.zeros(5, 2, dtype=torch.float64)),
    "shared tensors of other shapes": (torch.zeros(5, 2), torch.zeros(2, 5)),
    "widths": (torch.zeros(1, 2), torch.zeros(1, 3)),
    "dimensions": (torch.zeros(1, 2), torch.zeros(1, 2, 1)),
    "types": (torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.float16)),
    "numbers": (0.5, 0.6),
    "whole numbers": (1, 2),
    "a number and a whole number": (1.0, 1),
    "truth and one": (True, 1),
    "strings": ("a", "b"),
    "enums": (Colour.RED, Colour.BLUE),
    "numpy numbers": (np.float32(1), np.float32(2)),
    "arrays": (np.zeros(3), np.ones(3)),
    "nothing": (None, 0),
    "devices": (torch.device("cpu"), torch.device("meta")),
    "lengths of lists": ([1, 2, 3], [1, 2]),
    "lists and tuples": ([1, 2, 3], (1, 2, 3)),
    "keys": ({"a": 1}, {"b": 1}),
    "values": ({"a": 1.0}, {"a": 2.0}),
    "objects": (object(), object()),
    "lists of numbers for rows": ([0.5], [0.6]),
    "lists of words for rows": (["a"], ["b"]),
}


@pytest.mark.parametrize(("one", "other"), PARTING.values(), ids=PARTING)
def test_calls_whose_arguments_differ_in_what_has_no_rows_cannot_be_merged(
    one: Any, other: Any, describe: Describing
) -> None:
    assert not mergeable(describe(rows(1), argument=one), describe(rows(2), argument=other))
    assert mergeable(describe(rows(1), argument=one), describe(rows(2), argument=one))


def test_an_argument_left_out_is_not_one_that_is_none(describe: Describing) -> None:
    assert not mergeable(describe(rows(1)), describe(rows(2), argument=None))


def test_names_do_not_matter_where_the_position_says_them(describe: Describing) -> None:
    assert mergeable(
        describe(rows(1), torch.tensor(1)), describe(x=rows(2), timestep=torch.tensor(1))
    )


def test_samples_of_other_sizes_are_another_kind(describe: Describing) -> None:
    assert describe(rows(1, width=2)).kind != describe(rows(1, width=3)).kind
    assert describe([torch.zeros(4, 2)]).kind != describe([torch.zeros(4, 3)]).kind


def test_what_a_certificate_covers_every_value_of_is_in_the_key_and_not_in_the_kind(
    describe: Describing,
) -> None:
    one, other = describe(rows(1), scale=0.5), describe(rows(1), scale=0.6)
    assert one.kind == other.kind
    assert one.key != other.key


def test_another_target_is_another_kind() -> None:
    one, other = Describing(), Describing()
    assert one(rows(1)).kind != other(rows(1)).kind


def test_a_kind_keeps_its_target_so_that_no_other_can_take_its_place_in_memory() -> None:
    """Certificates outlive calls. A target is made anew when somebody hooks its module."""
    kinds = set()
    for _ in range(100):
        describe = Describing()
        kinds.add(describe(rows(1)).kind)
        del describe
    assert len(kinds) == 100


@pytest.mark.parametrize(
    "call",
    [
        lambda d: d(3, 4),
        lambda d: d(torch.tensor(1.0)),
        lambda d: d(rows(1), 2, 3, 4),
        lambda d: d(rows(1), argument=nn.Parameter(torch.zeros(1, 2))),
        lambda d: d([torch.zeros(4, 2), torch.zeros(4, 3)]),
    ],
    ids=["no tensor", "no rows", "too many arguments", "wants gradients", "samples of two sizes"],
)
def test_a_call_that_fits_no_rule_is_like_no_other(
    call: Callable[[Describing], Call], caplog: pytest.LogCaptureFixture
) -> None:
    describe = Describing()
    one, other = call(describe), call(describe)
    assert one.key != other.key
    assert one.kind != other.kind
    assert one.group.layout == ()
    assert [one for one in caplog.records if one.levelno >= logging.WARNING] == []


def test_what_makes_a_call_depend_on_more_than_its_arguments_keeps_it_alone() -> None:
    describe = Describing()
    describe.target.module.train()
    assert describe(rows(1)).group.layout == ()
    describe.target.module.eval()
    assert describe(rows(1)).group.layout != ()
    with_gradients = Call(
        describe.target, (rows(1),), {}, ambient.current(("cpu",))._replace(grad=True)
    )
    with_gradients = LayoutReader(describe.digests).read(with_gradients)
    assert with_gradients.group.layout == ()


def test_autocast_and_default_dtype_part_calls(describe: Describing) -> None:
    quiet = ambient.quiet(("cpu",))
    double = Call(describe.target, (rows(1),), {}, quiet._replace(dtype=torch.float64))
    double = LayoutReader(describe.digests).read(double)
    assert not mergeable(describe(rows(1)), double)


# Putting together


def merged(*calls: Call) -> dict[str, Any]:
    assert mergeable(*calls)
    return merge(calls)


def test_rows_are_joined_in_order_and_single_ones_given_to_all_rows_of_their_call(
    describe: Describing,
) -> None:
    together = merged(
        describe(rows(1), torch.tensor(10), ids=rows(1)),
        describe(rows(2, 3), torch.tensor(20), ids=rows(2, 3)),
        describe(rows(4, 5), torch.tensor(30), ids=rows(9)),
    )
    assert together["x"][:, 0].tolist() == [1, 2, 3, 4, 5]
    assert together["timestep"].tolist() == [10, 20, 20, 30, 30]
    assert together["timestep"].dtype == torch.int64
    assert together["ids"][:, 0].tolist() == [1, 2, 3, 9, 9]


@pytest.mark.parametrize(("time", "dtype"), [(7, torch.int64), (7.5, torch.float32)])
def test_a_time_that_is_a_number_becomes_a_tensor(
    time: float, dtype: torch.dtype, describe: Describing
) -> None:
    together = merged(describe(rows(1), time), describe(rows(2, 3), time + 1))
    assert together["timestep"].tolist() == [time, time + 1, time + 1]
    assert together["timestep"].dtype == dtype


def test_times_that_are_numbers_are_told_apart_by_certificates(describe: Describing) -> None:
    """Else a proof of calls at one time would cover those at any."""
    certificates = Certificates(describe.digests, 1000)
    one, other = describe(rows(1), 7.5), describe(rows(1), 8.5)
    certificates.of(one)
    assert certificates._variations(one, other)
    assert not certificates._variations(one, describe(rows(1), 7.5))


def test_what_has_no_rows_is_given_once(describe: Describing) -> None:
    table = torch.ones(5, 2)
    call = {
        "table": table,
        "scale": 0.5,
        "settings": {"scale": 2.0, "ids": rows(1)},
        "nothing": None,
    }
    together = merged(describe(rows(1), **call), describe(rows(2), **call))
    assert torch.equal(together["table"], table)
    assert together["scale"] == 0.5
    assert together["nothing"] is None
    assert together["settings"]["scale"] == 2.0
    assert together["settings"]["ids"].shape == (2, 2)


def test_lists_and_tuples_of_rows_are_joined_entry_by_entry(describe: Describing) -> None:
    Pair = namedtuple("Pair", "one other")

    def argument(value: float) -> dict[str, Any]:
        return {
            "residuals": [rows(value), rows(value + 1), rows(value + 2)],
            "tables": (torch.ones(5, 2), rows(value)),
            "pair": Pair(rows(value), 3),
        }

    together = merged(describe(rows(1), **argument(1)), describe(rows(2), **argument(5)))
    assert [one[:, 0].tolist() for one in together["residuals"]] == [[1, 5], [2, 6], [3, 7]]
    assert type(together["tables"]) is tuple
    assert together["tables"][0].shape == (5, 2)
    assert together["tables"][1][:, 0].tolist() == [1, 5]
    assert type(together["pair"]) is Pair
    assert together["pair"].other == 3


def test_lists_with_an_entry_for_each_row_are_chained(describe: Describing) -> None:
    one = [torch.zeros(3, 4)]
    two = [torch.ones(5, 4), torch.ones(7, 4)]
    together = merged(describe(rows(1), captions=one), describe(rows(2, 3), captions=two))
    assert [caption.shape[0] for caption in together["captions"]] == [3, 5, 7]


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_lists_of_samples_are_chained_also_where_a_sample_has_as_many_channels_as_there_are_rows(
    channels: int, describe: Describing
) -> None:
    one, two, three = (torch.full((channels, 4), float(value)) for value in (1, 2, 3))
    samples = merged(describe([one]), describe([two, three]))
    assert [sample[0, 0].item() for sample in samples["x"]] == [1, 2, 3]


def test_a_setting_repeated_for_each_row_is_repeated_for_all(describe: Describing) -> None:
    together = merged(
        describe(rows(1), shapes=[(1, 4, 4)]), describe(rows(2, 3), shapes=[(1, 4, 4), (1, 4, 4)])
    )
    assert together["shapes"] == [(1, 4, 4)] * 3


@pytest.mark.parametrize(
    "entries", [[1.0, 2.0], [1, 2], ["a", "b"], [(1,), (2, 3)], [[1], [2]], [np.float32(1), 2.0]]
)
def test_a_list_as_long_as_there_are_rows_keeps_its_entries(
    entries: list[Any], describe: Describing
) -> None:
    """Whether they are the rows' or mere settings nobody can know; the first entry is not all of
    them, in any case."""
    together = merged(describe(rows(1, 2), entries=entries), describe(rows(3, 4), entries=entries))
    assert together["entries"] in (entries, entries * 2)
    assert (
        describe(rows(1, 2), entries=entries).kind
        != describe(rows(1, 2), entries=[entries[0]] * 2).kind
    )


def test_a_list_of_pairs_of_rows_as_long_as_there_are_rows_is_joined(describe: Describing) -> None:
    def pairs(value: float) -> list[tuple[Tensor, Tensor]]:
        return [(rows(value, value), rows(value + 1, value + 1)) for _ in range(2)]

    together = merged(describe(rows(1, 2), pairs=pairs(1)), describe(rows(3, 4), pairs=pairs(5)))
    assert type(together["pairs"]) is list
    assert together["pairs"][1][1][:, 0].tolist() == [2, 2, 6, 6]


def caption(length: int, value: float = 1.0, count: int = 1) -> Tensor:
    return torch.full((count, length, 2), value)


@pytest.mark.parametrize("forward", [masked, masked_by_attention])
def test_captions_without_masks_are_padded_and_the_padding_masked(
    forward: Callable[..., Any],
) -> None:
    describe = Describing(forward)
    mask = next(iter(describe.target.masks.values()))
    together = merged(describe(rows(1), caption(2)), describe(rows(2, 3), caption(4, 5.0, 2)))
    assert together["encoder_hidden_states"][:, :, 0].tolist() == [
        [1, 1, 0, 0],
        [5, 5, 5, 5],
        [5, 5, 5, 5],
    ]
    assert together[mask].tolist() == [[True, True, False, False], [True] * 4, [True] * 4]
    equal = merged(describe(rows(1), caption(2)), describe(rows(2), caption(2)))
    assert mask not in equal, "a module may be faster, and its rounding another, without one"


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masks_that_are_given_are_kept_and_padded_with_zeros(dtype: torch.dtype) -> None:
    describe = Describing(masked)
    holes = torch.tensor([[1, 0, 1]]).to(dtype)
    one = describe(rows(1), caption(3), holes)
    other = describe(rows(2), caption(4), torch.ones(1, 4, dtype=dtype))
    together = merged(one, other)
    assert together["encoder_hidden_states_mask"].dtype == dtype
    assert together["encoder_hidden_states_mask"].tolist() == [[1, 0, 1, 0], [1, 1, 1, 1]]
    equal = merged(one, describe(rows(2), caption(3), torch.ones(1, 3, dtype=dtype)))
    assert equal["encoder_hidden_states_mask"].tolist() == [[1, 0, 1], [1, 1, 1]]


def test_calls_with_and_without_a_mask_are_of_different_kinds() -> None:
    describe = Describing(masked)
    given = describe(rows(1), caption(3), torch.ones(1, 3))
    assert given.kind != describe(rows(1), caption(3)).kind
    assert given.kind != describe(rows(1), caption(3), torch.ones(1, 3, dtype=torch.bool)).kind


def test_what_a_mask_cannot_mask_is_not_padded() -> None:
    describe = Describing(masked)
    assert not mergeable(describe(rows(1), torch.zeros(1, 3)), describe(rows(2), torch.zeros(1, 4)))
    odd = torch.ones(1, 1, 3)  # an attention mask of its own kind
    assert not mergeable(
        describe(rows(1), caption(3), odd), describe(rows(2), caption(4), torch.ones(1, 1, 4))
    )
    assert not mergeable(describe(rows(1), caption(3)), describe(rows(2), torch.zeros(1, 3, 5)))


def test_a_merged_call_shares_no_rows_with_the_calls(describe: Describing) -> None:
    one, other = describe(rows(1), ids=rows(1)), describe(rows(2), ids=rows(2))
    together = merged(one, other)
    for value in together.values():
        value.zero_()
    assert one.arguments["x"].any()
    assert other.arguments["ids"].any()


# Taking apart


@dataclass
class Output(BaseOutput):
    sample: Tensor
    extra: Any = None


def numbered(count: int, *shape: int) -> Tensor:
    """Row i is full of i."""
    return torch.arange(float(count)).reshape(-1, *[1] * len(shape)).expand(count, *shape).clone()


def firsts(parts: Sequence[Tensor]) -> list[list[float]]:
    return [part[:, 0].tolist() for part in parts]


def test_a_tensor_is_cut_at_the_calls_rows() -> None:
    parts = split(numbered(6, 3), [1, 3, 2])
    assert firsts(parts) == [[0], [1, 2, 3], [4, 5]]


def test_what_holds_tensors_is_taken_apart_and_made_anew() -> None:
    Pair = namedtuple("Pair", "one other")
    y = numbered(3, 2)
    for output, get in [
        ((y, 2 * y), lambda part: part[0]),
        ([y, 2 * y], lambda part: part[0]),
        (Pair(y, None), lambda part: part.one),
        ({"sample": y, "scale": 2.0}, lambda part: part["sample"]),
        (OrderedDict(sample=y), lambda part: part["sample"]),
        (Output(sample=y, extra=(y, [y])), lambda part: part.extra[1][0]),
        (Transformer2DModelOutput(sample=y), lambda part: part.sample),
        (
            BaseModelOutputWithPooling(last_hidden_state=y, hidden_states=(y, y)),
            lambda part: part.hidden_states[1],
        ),
    ]:
        parts = split(output, [1, 2])
        assert [type(part) for part in parts] == [type(output)] * 2
        assert firsts([get(part) for part in parts]) == [[0], [1, 2]]


def test_constants_go_to_everybody() -> None:
    assert split((numbered(3, 2), None, 0.5, "a", True), [1, 2])[1][1:] == (None, 0.5, "a", True)


def test_a_list_with_an_entry_for_each_row_is_cut_and_a_list_of_batches_is_not() -> None:
    each = [torch.full((4,), float(i)) for i in range(3)]
    assert [[int(one[0]) for one in part] for part in split(each, [1, 2])] == [[0], [1, 2]]
    batches = [numbered(3, 2), numbered(3, 2), numbered(3, 2)]
    assert [len(part) for part in split(batches, [1, 2])] == [3, 3]
    assert split(["a", "b", "c"], [1, 2]) == [["a"], ["b", "c"]]


def test_arrays_are_cut() -> None:
    assert [part.tolist() for part in split(np.arange(3), [1, 2])] == [[0], [1, 2]]


def test_a_distribution_is_taken_apart() -> None:
    """What an autoencoder's encoder gives; each call draws from its own part."""
    parameters = torch.cat([numbered(3, 2, 4, 4), torch.zeros(3, 2, 4, 4)], dim=1)
    parts = split(DiagonalGaussianDistribution(parameters), [1, 2])
    assert [part.mode().shape[0] for part in parts] == [1, 2]
    alone = DiagonalGaussianDistribution(parameters[1:])
    own = parts[1].sample(torch.Generator().manual_seed(0))
    assert torch.equal(own, alone.sample(torch.Generator().manual_seed(0)))


def test_a_cache_of_keys_and_values_is_taken_apart() -> None:
    cache = DynamicCache()
    cache.update(numbered(3, 2, 5, 4), numbered(3, 2, 5, 4), 0)
    parts = split(cache, [1, 2])
    assert [part.layers[0].keys.shape[0] for part in parts] == [1, 2]
    assert parts[1].layers[0].values[:, 0, 0, 0].tolist() == [1, 2]
    assert cache.layers[0].keys.shape[0] == 3


@pytest.mark.parametrize(
    "output",
    [
        torch.tensor(1.0),
        torch.zeros(2, 5),
        (torch.zeros(3, 2), torch.tensor(1.0)),
        {"sample": torch.zeros(4, 2)},
        np.zeros(2),
        object(),
        iter([1]),
        {1, 2, 3},
    ],
    ids=[
        "number",
        "other rows",
        "a loss beside it",
        "in a dict",
        "array",
        "object",
        "iterator",
        "set",
    ],
)
def test_what_has_no_rows_cannot_be_taken_apart(output: Any) -> None:
    with pytest.raises(Unmergeable):
        split(output, [1, 2])


def test_rows_that_share_memory_do_not_share_it_between_calls() -> None:
    one, other = split(torch.zeros(1, 4).expand(2, 4), [1, 1])
    one.fill_(1)
    assert not other.any()


def test_calls_do_not_see_what_others_write_to_their_parts() -> None:
    one, other = split((numbered(2, 3), [numbered(2, 3)]), [1, 1])
    one[0].fill_(9)
    one[1][0].fill_(9)
    assert firsts([other[0], other[1][0]]) == [[1], [1]]


def test_tensors_are_found_wherever_they_are_and_copies_share_none() -> None:
    Pair = namedtuple("Pair", "one other")
    y = numbered(2, 3)
    output = Output(sample=y, extra=Pair([y, {"a": y}], "text"))
    assert len(tensors(output)) == 3
    copy = cloned(output)
    assert type(copy) is Output
    assert type(copy.extra) is Pair
    assert [torch.equal(a, b) for a, b in zip(tensors(copy), tensors(output), strict=True)] == [
        True
    ] * 3
    y.zero_()
    assert all(tensor.any() for tensor in tensors(copy))
    assert len(tensors(DiagonalGaussianDistribution(torch.zeros(2, 4, 2, 2)))) > 0


def test_merging_and_taking_apart_gives_back_what_was_given(describe: Describing) -> None:
    calls = [describe(numbered(count, 3), torch.tensor(count)) for count in (1, 3, 2)]
    together = merged(*calls)
    for part, one in zip(split(together["x"], [one.rows for one in calls]), calls, strict=True):
        assert torch.equal(part, one.arguments["x"])


# Fingerprints


def test_equal_tensors_have_equal_digests_and_others_do_not() -> None:
    digests = Fingerprints()
    one = torch.arange(6.0).reshape(2, 3)
    assert digests.of(one) == digests.of(one.clone())
    assert digests.of(one) == digests.of(one.t().contiguous().t()), (
        "the layout in memory does not matter"
    )
    for other in (
        one + 1e-7,
        one.double(),
        one.reshape(3, 2),
        one.flatten(),
        one[:1],
        one.to(torch.int32),
        -one,
    ):
        assert digests.of(one) != digests.of(other)
    assert digests.of(torch.zeros(2)) != digests.of(-torch.zeros(2)), (
        "zero and minus zero are different numbers"
    )


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16, torch.bool, torch.int8, torch.complex64]
)
def test_every_type_has_digests(dtype: torch.dtype) -> None:
    digests = Fingerprints()
    assert digests.of(torch.ones(2, 3).to(dtype)) == digests.of(torch.ones(2, 3).to(dtype))
    assert digests.of(torch.ones(2, 3).to(dtype)) != digests.of(torch.zeros(2, 3).to(dtype))


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (1,), (2, 1, 3)])
def test_every_shape_has_digests(shape: tuple[int, ...]) -> None:
    digests = Fingerprints()
    assert digests.of(torch.zeros(shape)) == digests.of(torch.zeros(shape))
    assert digests.of(torch.zeros(shape)) != digests.of(torch.zeros(*shape, 2, 2))


def test_rows_that_are_all_the_same_count_as_one() -> None:
    digests = Fingerprints()
    assert digests.of(rows(7)) == digests.of(rows(7, 7, 7)) == digests.of(rows(7).expand(5, 2))
    assert digests.of(rows(7)) != digests.of(rows(7, 8))
    assert digests.of(rows(7, 8)) != digests.of(rows(7, 8, 7, 8))


def test_a_digest_is_computed_once_and_anew_when_the_tensor_is_written_to() -> None:
    digests = Fingerprints()
    tensor = torch.zeros(2, 3)
    first = digests.of(tensor)
    assert digests.of(tensor) == first
    assert digests.computed == 1
    for write in (
        lambda: tensor.add_(1),
        lambda: tensor[0].fill_(5),
        lambda: tensor.view(-1)[3:].mul_(2),
        lambda: torch.add(tensor, 1, out=tensor),
        lambda: tensor.detach().sub_(1),
    ):
        before, computed = digests.of(tensor), digests.computed
        write()
        assert digests.of(tensor) != before
        assert digests.computed == computed + 1
    shared = digests.computed
    assert digests.of(tensor) == digests.of(tensor.clone())
    assert digests.computed == shared + 1


def test_digests_go_with_their_tensors() -> None:
    digests = Fingerprints()
    for i in range(100):
        digests.of(torch.full((3,), float(i)))
    assert len(digests._known) == 0
    kept = [torch.full((3,), float(i)) for i in range(10)]
    for _ in range(5):
        for tensor in kept:
            digests.of(tensor)
            tensor.add_(1)
    assert len(digests._known) == len(kept)
    del kept, tensor
    assert len(digests._known) == 0


def test_a_tensor_at_the_address_of_one_that_is_gone_is_another() -> None:
    digests = Fingerprints()
    for i in range(1000):
        assert digests.of(torch.tensor([float(i)])) == digests.of(torch.tensor([float(i)]))


def test_tensors_made_in_inference_mode_have_digests() -> None:
    with torch.inference_mode():
        one, other = torch.ones(2), torch.zeros(2)
    digests = Fingerprints()
    assert digests.of(one) == digests.of(torch.ones(2))
    assert digests.of(one) != digests.of(other)


# What an engine asks of them


def adds(self: nn.Module, x: Tensor, timestep: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    return honest(x + timestep.reshape(-1, 1) / 1000 + ids + table.sum(0))


def computed_by(calls: Sequence[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Fingerprints:
    """The digests of an engine that served these together."""
    made: list[Fingerprints] = []
    real = Fingerprints.__init__
    monkeypatch.setattr(Fingerprints, "__init__", lambda self: (made.append(self), real(self))[1])
    served = serve(adds, calls)
    served.check()
    assert served.state == "certified"
    assert served.merged_share > 0.7
    [digests] = made
    return digests


def apart(seed: int, steps: int) -> dict[str, Any]:
    """A call whose arguments all differ from other jobs', those without rows aside, and are new
    tensors at every step."""
    table = torch.full((5, WIDTH), 0.1)
    return call(
        seed,
        lambda step: {
            "timestep": torch.tensor(900.0 - 10 * step - 100 * seed),
            "ids": torch.full((1, WIDTH), 0.1 * seed),
            "table": table,
        },
        steps=steps,
    )


def test_arguments_that_are_proven_to_vary_are_not_read_at_every_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Reading a tensor waits for the device: how often must not depend on the number of steps."""
    short = computed_by([apart(seed, STEPS) for seed in range(4)], monkeypatch).computed
    monkeypatch.undo()
    long = computed_by([apart(seed, 10 * STEPS) for seed in range(4)], monkeypatch).computed
    assert long == short
    assert short <= 4 + 4 * 3, "each job's table once, and four arguments of the proof's calls"


def test_an_engine_keeps_no_digests_of_jobs_that_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = computed_by([apart(seed, STEPS) for seed in range(4)], monkeypatch)
    gc.collect()
    assert len(digests._known) == 0


def test_collections_are_read_however_deep_and_once_if_they_contain_themselves() -> None:
    """What is not read is not checked: numbers that are not finite, callbacks."""
    deep: Any = "deep"
    for _ in range(5000):
        deep = [deep]
    loop: list[Any] = [1, ({"a": 2, 3: [3]},), deep]
    loop.append(loop)
    assert list(flat(loop)) == [1, 2, 3, "deep"]
    assert list(flat(7)) == [7]
