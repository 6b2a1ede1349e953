"""Runs calls both ways, merged and alone, without changing their arguments."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from stepweave.batching.call import Attempt, Call, Target
from stepweave.batching.forward import run_arguments, run_merged
from stepweave.batching.merge import masked
from stepweave.certification.compare import Differ, NotFinite, Pair, compare, effect, equal
from stepweave.certification.evidence import (
    EVIDENT,
    Span,
    ends,
    exchanged,
    filled,
    flooded,
    hull,
    is_whole,
    samples,
    scalars,
    scaled,
    span,
    units,
)
from stepweave.certification.random_states import RandomStates
from stepweave.certification.state_watch import on_a_device
from stepweave.compat.module_state import ModuleState
from stepweave.compat.nested import cloned, copied, tensors
from stepweave.compat.out_of_memory import ran_out
from stepweave.compat.snapshot import ArgumentSnapshot

FAR = 1e4  # within half precision
POINTS = 16  # maximum of synthetic calls in search of an effect that are run merged, per proof
LOUDER = 2.0  # factor of samples in synthetic calls: modules may clip large numbers
BASES = 4  # synthetic calls that are changed further in search of an effect
# an effect of this many times the error of merging shows whose value was used, however small
PLAIN = 32.0
LEAST = 1e-3  # lower limit of the error of merging, as a share of the allowed error


@dataclass
class Point:
    """A synthetic call, which has other values in some leaves, and its results."""

    call: Call
    changed: tuple[int, ...]  # the leaves with other values
    single: Any
    merged: Any = None
    rows: int = 0  # of the batch that it was merged in
    sought: bool = False  # made in search of an effect


@dataclass
class Proof:
    """The results of running calls both ways. Dicts by `id` are keyed by the pair's calls, other
    dicts and sets by positions of leaves."""

    calls: Sequence[Call]  # run merged
    pair: tuple[Call, Call]  # those of them that were run alone, too
    audit: bool
    merged: list[Any] | Exception = field(default_factory=list)
    singles: dict[int, Any] = field(default_factory=dict)  # first results, by `id`
    seconds: dict[int, Any] = field(default_factory=dict)  # second results, by `id`
    # by `id`, right after the first ones, if the device sums in any order
    again: dict[int, Any] = field(default_factory=dict)
    # by `id`, with arguments that nobody writes to
    originals: dict[int, Call] = field(default_factory=dict)
    # by `id` and rows: results of a batch of copies
    copies: dict[tuple[int, int], list[Any] | None] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    # `points`, and the first of the pair as merged with them
    merged_points: list[Point] = field(default_factory=list)
    # whether the effect is clear; None if there is none
    evident: dict[int, bool | None] = field(default_factory=dict)
    # effects in units of the allowed error: the largest, and of the call that it changes least
    effects: dict[int, float] = field(default_factory=dict)
    least: dict[int, float] = field(default_factory=dict)
    plain: set[int] = field(default_factory=set)  # with an effect far above the error of merging
    spans: dict[int, Span] = field(default_factory=dict)  # values tried, if of few numbers
    variations: set[Any] = field(default_factory=set)  # to prove: see Certificates.differences
    samples: frozenset[int] = frozenset()  # leaves of the sample
    proven: frozenset[int] = frozenset()  # leaves that are proven already
    attempts: list[Attempt] = field(default_factory=list)  # of the pair, by their own fibers
    drew: bool = False  # whether the calls draw random numbers
    wrote: bool = False  # whether a call wrote to its arguments
    # paths in the module that calls have changed
    module_changes: list[str] = field(default_factory=list)

    def merged_of(self, call: Call) -> Any:
        assert not isinstance(self.merged, Exception)
        return next(
            output for item, output in zip(self.calls, self.merged, strict=True) if item is call
        )


class Prover:
    """Runs one proof's forwards. `device_types`: as for `run_merged`."""

    def __init__(self, device_types: tuple[str, ...], *, repeat: bool, most_rows: int) -> None:
        self._device_types = device_types
        self._repeat = repeat
        self._most_rows = most_rows
        self._runs = self._draws = 0
        self.forwards = 0  # only for the proof
        self.in_call = False  # whether an error now is that of a single call
        self.device: torch.device | None = None
        self.wrote = False

    def start(
        self,
        calls: Sequence[Call],
        pair: tuple[Call, Call],
        *,
        audit: bool,
        proven: Iterable[int] = (),
        brief: bool = False,
    ) -> Proof:
        """Run the calls merged and the pair alone: twice in an audit, once in a `brief` audit or a
        proof, where the pair's fibers do the second run.

        Raises errors of single calls, and out-of-memory errors.
        """
        proof = Proof(calls, pair, audit, proven=frozenset(proven))
        proof.samples = samples(pair[0])
        target = calls[0].target
        order = [*pair, *pair] if audit and not brief else list(pair)
        merged_first = audit and random.random() < 0.5
        if audit:
            random.shuffle(order)
        for call in pair:
            proof.originals[id(call)] = _kept(call)
        self.device = next((tensor.device for tensor in tensors(calls[0].arguments)), None)
        before = _look(target)
        if merged_first:
            self._merge(proof)
        states: dict[int, ModuleState] = {}
        for call in order:
            output = self.alone(call)
            after = states[id(call)] = _look(target)
            if len(states) == 1 and before.change(after):  # maybe a table, computed once
                self.alone(call)
                proof.module_changes = after.change(_look(target)).paths
                if proof.module_changes:
                    return proof
            if id(call) in proof.singles:
                proof.seconds[id(call)] = output
                continue
            proof.singles[id(call)] = output
            if brief:
                proof.seconds[id(call)] = output
            if on_a_device(output):
                proof.again[id(call)] = self.alone(call)
        a, b = pair
        if not brief and a.rows == b.rows and a.ragged == b.ragged:
            proof.module_changes = proof.module_changes or states[id(a)].change(states[id(b)]).paths
        if not merged_first:
            self._merge(proof)
        if not audit and not isinstance(proof.merged, Exception) and not proof.module_changes:
            self._gather(proof)
        proof.drew, proof.wrote = self.drew, self.wrote
        return proof

    @property
    def drew(self) -> bool:
        """Whether every run drew random numbers; if only some did, it was another thread."""
        return self._runs > 0 and self._draws == self._runs

    def alone(self, call: Call) -> Any:
        """The result of a call by itself."""
        arguments = copied(call.arguments)
        copy = ArgumentSnapshot(*arguments.values())
        original = ArgumentSnapshot(*call.arguments.values())
        # taken now, since UNets empty lists among their arguments
        copied_tensors, original_tensors = tensors(arguments), tensors(call.arguments)
        self.in_call = True
        with _KeepRandomStates(self, original):
            output = cloned(run_arguments(call, arguments, self._device_types))
        self.in_call = False
        self.forwards += 1
        # `equal` also finds writes that tensors' versions do not count, by `.data` or numpy
        self.wrote = self.wrote or copy.wrote() or not equal(copied_tensors, original_tensors)
        return output

    def together(self, calls: Sequence[Call]) -> list[Any]:
        """The results of calls in one forward."""
        original = ArgumentSnapshot(*(value for call in calls for value in call.arguments.values()))
        with _KeepRandomStates(self, original):
            outputs = run_merged(calls, self._device_types, repeat=self._repeat, trial=True)
        self.forwards += 1
        return outputs

    def copies(self, proof: Proof, call: Call, rows: int = 0) -> list[Any] | None:
        """A call's results in a batch of copies of itself, of this many rows, or as many as the
        proof's; None if that raises.

        Where the proof's calls are padded, the copies have masks, too, since libraries compute
        attention with a mask in another order.
        """
        rows = rows or sum(item.rows for item in proof.calls)
        key = id(call), rows
        if key not in proof.copies:
            count = max(2, min(-(-rows // call.rows), self._most_rows // call.rows))
            copied = proof.originals.get(id(call), call)
            if any(item.ragged != call.ragged for item in proof.calls):
                copied = masked(copied)
            try:
                proof.copies[key] = self.together([copied] * count)
            except Exception:
                proof.copies[key] = None
        return proof.copies[key]

    def wrong(self, proof: Proof) -> dict[int, str]:
        """The problems of synthetic calls, by the leaves that they changed."""
        problems: dict[int, str] = {}
        singles = self._singles(proof)
        for point in proof.merged_points:
            problem = ""
            if isinstance(point.merged, Exception):
                problem = f"merged, it raised {type(point.merged).__name__}: {point.merged}"[:200]
            else:
                try:
                    copies = functools.partial(self.copies, proof, point.call, point.rows)
                    compare([Pair(point.merged, point.single, copies, alike=True)], singles)
                except Differ as difference:
                    problem = str(difference)
                except NotFinite:
                    pass
            if problem:
                problems.update(dict.fromkeys(point.changed, problem))
        return problems

    def _merge(self, proof: Proof) -> None:
        target = proof.calls[0].target
        before = _look(target)
        try:
            proof.merged = self.together(proof.calls)
            after = _look(target)
            if before.change(after):
                self.together(proof.calls)
                proof.module_changes = proof.module_changes or after.change(_look(target)).paths
            self.forwards -= proof.audit  # its results will be delivered
        except Exception as error:
            if ran_out(error):
                raise
            proof.merged = error.with_traceback(None)  # whose frames would hold the memory

    def _gather(self, proof: Proof) -> None:
        """Collect evidence for the arguments in which the pair differs, and of few numbers."""
        a, b = proof.pair
        few = scalars(a)
        for i in few:
            self._try_ends(proof, i)
        for i in proof.samples:
            sample = a.leaves[i][0]
            if isinstance(sample, torch.Tensor) and sample.is_floating_point():
                louder = self._point(scaled(a, i, LOUDER), (i,))
                if louder is not None:
                    proof.points.append(louder)
        for every in units(a):
            unit = tuple(i for i in every if i not in few and i not in proof.samples)
            if not proof.proven.issuperset(unit) and any(
                _differ(a.leaves[j], b.leaves[j]) for j in unit
            ):
                evident = self._exchange(proof, unit)
                proof.evident.update(dict.fromkeys(unit, evident))
        for i in few:
            if proof.evident.get(i) is None:
                proof.evident[i] = self._from_points(proof, i)
        self._merge_points(proof)
        small = [i for i, evident in proof.evident.items() if evident is False and i in proof.least]
        if small:
            error = max(self._error(proof), LEAST)
            proof.plain = {i for i in small if proof.least[i] >= PLAIN * error}

    def _try_ends(self, proof: Proof, i: int) -> None:
        """Run the first call with an argument of few numbers at the ends of its possible values."""
        a, _ = proof.pair
        values = [span(call, i) for call in proof.pair]
        whole = all(is_whole(call.leaves[i][0]) for call in proof.pair)
        own = set(values[0]) if values[0].width == 0 else set()
        effects: dict[float, float] = {}  # by the number tried
        failed = False
        for number in dict.fromkeys([*ends(hull(values), whole), *values[1]]):
            if number in own:
                continue
            point = self._point(filled(a, i, number), (i,))
            if point is None:
                failed = True
            else:
                proof.points.append(point)
                effects[number] = self._effect(proof, point.single, a)
        proof.spans[i] = hull([*values, *(Span(number, number) for number in effects)])
        most = max(effects.values(), default=0.0)
        proof.evident[i] = most >= EVIDENT if most or failed else None
        if most:
            proof.least[i] = proof.effects[i] = most

    def _exchange(self, proof: Proof, unit: tuple[int, ...]) -> bool | None:
        """Whether exchanging an argument would have clearly changed both results; None if it has no
        effect at all."""
        # with noise too: the pair's values may be blank, such as zeros
        ordinary = self._flooded(proof, unit, 1.0, noise=True)
        effects = []
        for call, other in (proof.pair, proof.pair[::-1]):
            point = self._point(exchanged(call, other, unit), unit)
            if point is None:
                return False
            effects.append(self._effect(proof, point.single, call))
        if min(effects) >= EVIDENT:
            return True
        others = []
        for base in [point for point in proof.points if not point.sought][:BASES]:
            point = self._point(exchanged(base.call, proof.pair[1], unit), unit)
            if point is not None:
                others.append(effect(point.single, base.single, self._singles(proof)))
                if others[-1] >= EVIDENT and self._add(proof, point):
                    return True
        evident = self._flood(proof, unit, ordinary)
        if evident or not any((*effects, *others)):
            return evident
        proof.effects.update(dict.fromkeys(unit, max((*effects, *others))))
        proof.least.update(dict.fromkeys(unit, min(effects)))
        return False

    def _flood(self, proof: Proof, unit: tuple[int, ...], ordinary: Point | None) -> bool | None:
        """Whether an argument has a clear effect with numbers far from those of the pair; None if
        it has no effect at all."""
        numbers = ((0.0, False), (FAR, False), (-FAR, False), (FAR, True))
        points = (self._flooded(proof, unit, n, noise=noise) for n, noise in numbers)
        effects = []
        for point in itertools.chain([ordinary], points):
            if point is None:
                return False
            effects.append(self._effect(proof, point.single, proof.pair[0]))
        return None if not any(effects) else max(effects) >= EVIDENT

    def _flooded(
        self, proof: Proof, unit: tuple[int, ...], number: float, *, noise: bool
    ) -> Point | None:
        """The first call with these leaves `flooded`; None if it fails, or cannot be run merged."""
        call = proof.pair[0]
        for i in unit:
            call = flooded(call, i, number, noise=noise)
        point = self._point(call, unit)
        return point if point is not None and self._add(proof, point) else None

    def _from_points(self, proof: Proof, i: int) -> bool | None:
        """Whether an argument without effect has one in other synthetic calls; None if not."""
        effects = []
        bases = [point for point in proof.points if not point.sought and i not in point.changed]
        for base in bases[:BASES]:
            for number in dict.fromkeys(proof.spans[i]):
                point = self._point(filled(base.call, i, number), (i,))
                if point is not None:
                    effects.append(effect(point.single, base.single, self._singles(proof)))
                    if effects[-1] >= EVIDENT and self._add(proof, point):
                        return True
        return False if any(effects) else None

    def _point(self, call: Call, changed: tuple[int, ...]) -> Point | None:
        """Run a synthetic call; None if it raises or its result is not finite: its values are
        invalid then."""
        try:
            output = self.alone(call)
        except Exception as error:
            if ran_out(error):
                raise
            self.in_call = False
            return None
        return Point(call, changed, output) if _finite(output) else None

    def _add(self, proof: Proof, point: Point) -> bool:
        """Have a synthetic call run merged, too, or it is no evidence. False if that are too
        many."""
        room = sum(item.sought for item in proof.points) < POINTS
        if room:
            proof.points.append(dataclasses.replace(point, sought=True))
        return room

    def _error(self, proof: Proof) -> float:
        """The largest error of merging, in units of the allowed error; infinite if it raised."""
        results = [(proof.merged_of(call), proof.singles[id(call)]) for call in proof.pair]
        results += [(point.merged, point.single) for point in proof.merged_points]
        if any(isinstance(merged, Exception) for merged, _ in results):
            return float("inf")
        return max(effect(merged, single, self._singles(proof)) for merged, single in results)

    def _effect(self, proof: Proof, changed: Any, call: Call) -> float:
        return effect(changed, proof.singles[id(call)], self._singles(proof))

    def _singles(self, proof: Proof) -> list[Any]:
        return [proof.singles[id(call)] for call in proof.pair]

    def _merge_points(self, proof: Proof) -> None:
        """Run the synthetic calls merged with the first of the pair."""
        a = proof.pair[0]
        room = max(1, self._most_rows // a.rows - 1)
        for start in range(0, len(proof.points), room):
            batch = proof.points[start : start + room]
            try:
                outputs = self.together([a, *(point.call for point in batch)])
            except Exception as error:
                if ran_out(error):
                    raise
                outputs = [error] * (len(batch) + 1)
            changed = {point.changed for point in batch}
            rows = a.rows * (len(batch) + 1)
            proof.merged_points += [
                Point(a, unit, proof.singles[id(a)], outputs[0], rows) for unit in changed
            ]
            for point, output in zip(batch, outputs[1:], strict=True):
                point.merged, point.rows = output, rows
                proof.merged_points.append(point)


def _look(target: Target) -> ModuleState:
    return ModuleState({target.name: target.module})


def _kept(call: Call) -> Call:
    """A copy of a call, whose arguments its fiber cannot change when it continues."""
    arguments, leaves = copied(call.arguments), copied(call.leaves)
    return dataclasses.replace(call, arguments=arguments, leaves=leaves)


class _KeepRandomStates:
    """Restores, after a block, the generators among calls' arguments, and notes whether any random
    numbers were drawn.

    Default generators are not restored: other threads may have drawn from them meanwhile, and must
    not draw the same again.
    """

    def __init__(self, prover: Prover, arguments: ArgumentSnapshot) -> None:
        self._prover = prover
        self._arguments = arguments

    def __enter__(self) -> None:
        self._states = RandomStates(self._prover.device).__enter__()

    def __exit__(self, *_: object) -> None:
        try:
            drew = self._arguments.drew() or self._states.changed()
        finally:
            self._states.__exit__()
        self._arguments.put_back()
        self._prover._runs += 1
        self._prover._draws += drew


def _differ(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    if len(one) != len(other):
        return True
    return any(
        not (a is b or (a.shape == b.shape and torch.equal(a, b)))
        if isinstance(a, torch.Tensor)
        else a != b
        for a, b in zip(one, other, strict=True)
    )


def _finite(output: Any) -> bool:
    numbers = (tensor for tensor in tensors(output) if tensor.is_floating_point())
    return all(bool(tensor.isfinite().all()) for tensor in numbers)
