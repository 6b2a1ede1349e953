"""Runs calls both ways, merged and alone, without a trace in what they were given."""

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
from stepweave.certification.state_watch import RandomStates, on_a_device
from stepweave.compat.module_state import ModuleState
from stepweave.compat.nested import cloned, copied, tensors
from stepweave.compat.out_of_memory import ran_out
from stepweave.compat.snapshot import ArgumentSnapshot

FAR = 1e4  # within half precision
POINTS = 16  # calls made up for one proof in search of an effect, at most, that are run merged
LOUDER = 2.0  # times which a sample is tried: modules may clip what is large
BASES = 4  # calls that are changed in search of one
# times what merging changed: an effect that shows whose value was used, however small it is
PLAIN = 32.0
LEAST = 1e-3  # what merging changed, at least, as a share of the error allowed


@dataclass
class Point:
    """A call made up for a proof: another one with different values in some places, and what it
    gave."""

    call: Call
    changed: tuple[int, ...]  # the leaves with other values
    single: Any
    merged: Any = None
    rows: int = 0  # of the batch that it was merged in
    sought: bool = False  # made up beside others in search of an effect


@dataclass
class Proof:
    """What came of running calls both ways."""

    calls: Sequence[Call]  # that were merged
    pair: tuple[Call, Call]  # those of them that were run alone, too
    audit: bool
    merged: list[Any] | Exception = field(default_factory=list)
    # of the pair, the first time, by `id` of the call
    singles: dict[int, Any] = field(default_factory=dict)
    seconds: dict[int, Any] = field(default_factory=dict)  # the same, the second time
    # right after that, where the device sums in any order
    again: dict[int, Any] = field(default_factory=dict)
    # of the pair, with arguments that nobody writes to
    originals: dict[int, Call] = field(default_factory=dict)
    copies: dict[tuple[int, int], list[Any] | None] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    # those, and the first of the pair in their company
    merged_points: list[Point] = field(default_factory=list)
    # leaves: None if the result does not depend on them
    evident: dict[int, bool | None] = field(default_factory=dict)
    # of leaves exchanged, the largest, as shares of the error allowed
    effects: dict[int, float] = field(default_factory=dict)
    # leaves with a small effect, far larger than what merging changed
    plain: set[int] = field(default_factory=set)
    # the same, of that call of the pair that it changes least
    least: dict[int, float] = field(default_factory=dict)
    # of arguments of few numbers, what was tried
    spans: dict[int, Span] = field(default_factory=dict)
    # what it is to prove: see Certificates.differences
    variations: set[Any] = field(default_factory=set)
    samples: frozenset[int] = frozenset()  # leaves by which rows are told apart
    known: frozenset[int] = frozenset()  # leaves that are proven already
    attempts: list[Attempt] = field(default_factory=list)  # of the pair, by their own fibers
    drew: bool = False  # random numbers
    wrote: bool = False  # to its arguments
    # what differs in the module after one and after the other
    left: list[str] = field(default_factory=list)

    def merged_of(self, call: Call) -> Any:
        assert not isinstance(self.merged, Exception)
        return self.merged[next(i for i, one in enumerate(self.calls) if one is call)]


class Prover:
    """Runs one proof's forwards. `device_types` as for run_merged."""

    def __init__(self, device_types: tuple[str, ...], *, repeat: bool, most_rows: int) -> None:
        self._device_types = device_types
        self._repeat = repeat
        self._most_rows = most_rows
        self._runs = self._draws = 0
        self.forwards = 0  # that served only the proof
        self.in_call = False  # an error now is a single call's own
        self.device: torch.device | None = None
        self.wrote = False

    def start(
        self,
        calls: Sequence[Call],
        pair: tuple[Call, Call],
        *,
        audit: bool,
        known: Iterable[int] = (),
        brief: bool = False,
    ) -> Proof:
        """All that is run here; in a proof, the fibers run the calls of the pair themselves for the
        second time. A `brief` audit runs each of them once only.

        Memory that runs out is raised, as are the errors of single calls.
        """
        proof = Proof(calls, pair, audit, known=frozenset(known))
        proof.samples = samples(pair[0])
        target = calls[0].target
        order = [*pair, *pair] if audit and not brief else list(pair)
        merged_first = audit and random.random() < 0.5
        if audit:
            random.shuffle(order)
        for call in pair:
            proof.originals[id(call)] = _kept(call)
        self.device = next((one.device for one in tensors(calls[0].arguments)), None)
        before = _look(target)
        if merged_first:
            self._merge(proof)
        states: dict[int, ModuleState] = {}
        for call in order:
            output = self.alone(call)
            after = states[id(call)] = _look(target)
            if len(states) == 1 and before.change(after):  # a table, made once and for all?
                self.alone(call)
                proof.left = after.change(_look(target)).paths
                if proof.left:
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
            proof.left = proof.left or states[id(a)].change(states[id(b)]).paths
        if not merged_first:
            self._merge(proof)
        if not audit and not isinstance(proof.merged, Exception) and not proof.left:
            self._gather(proof)
        proof.drew, proof.wrote = self.drew, self.wrote
        return proof

    @property
    def drew(self) -> bool:
        """Whether every run drew random numbers; if one or another seems to have, that was another
        thread."""
        return self._runs > 0 and self._draws == self._runs

    def alone(self, call: Call) -> Any:
        """What a call gives by itself."""
        arguments = copied(call.arguments)
        given, own = (
            ArgumentSnapshot(*arguments.values()),
            ArgumentSnapshot(*call.arguments.values()),
        )
        # lists may be emptied, as UNets do
        mine, theirs = tensors(arguments), tensors(call.arguments)
        self.in_call = True
        with _Unnoticed(self, own):
            output = cloned(run_arguments(call, arguments, self._device_types))
        self.in_call = False
        self.forwards += 1
        # also what was written past the tensors' versions, through `.data` or numpy
        self.wrote = self.wrote or given.wrote() or not equal(mine, theirs)
        return output

    def together(self, calls: Sequence[Call]) -> list[Any]:
        """What calls give in one forward."""
        own = ArgumentSnapshot(*(value for call in calls for value in call.arguments.values()))
        with _Unnoticed(self, own):
            outputs = run_merged(calls, self._device_types, repeat=self._repeat, trial=True)
        self.forwards += 1
        return outputs

    def copies(self, proof: Proof, call: Call, rows: int = 0) -> list[Any] | None:
        """What a call gives in a batch of copies of itself, as large as the proof's or of so many
        rows; None if that raises."""
        rows = rows or sum(one.rows for one in proof.calls)
        known = proof.copies.get((id(call), rows), False)
        if known is False:
            count = max(2, min(-(-rows // call.rows), self._most_rows // call.rows))
            try:
                known = self.together([proof.originals.get(id(call), call)] * count)
            except Exception:
                known = None
            proof.copies[id(call), rows] = known
        return known  # type: ignore[return-value]

    def wrong(self, proof: Proof) -> dict[int, str]:
        """The arguments whose values, made up, gave another result merged than alone, and what was
        wrong."""
        found: dict[int, str] = {}
        company = self._company(proof)
        for point in proof.merged_points:
            problem = ""
            if isinstance(point.merged, Exception):
                problem = f"merged, it raised {type(point.merged).__name__}: {point.merged}"[:200]
            else:
                try:
                    copies = functools.partial(self.copies, proof, point.call, point.rows)
                    compare([Pair(point.merged, point.single, copies, alike=True)], company)
                except Differ as difference:
                    problem = str(difference)
                except NotFinite:
                    pass
            if problem:
                found.update(dict.fromkeys(point.changed, problem))
        return found

    def _merge(self, proof: Proof) -> None:
        target = proof.calls[0].target
        before = _look(target)
        try:
            proof.merged = self.together(proof.calls)
            after = _look(target)
            if before.change(after):
                self.together(proof.calls)
                proof.left = proof.left or after.change(_look(target)).paths
            self.forwards -= proof.audit  # which serves all, if it can
        except Exception as error:
            if ran_out(error):
                raise
            proof.merged = error.with_traceback(None)  # whose frames hold on to the memory

    def _gather(self, proof: Proof) -> None:
        """Evidence for the arguments in which the pair differs, and for those of few numbers."""
        a, b = proof.pair
        few = scalars(a)
        for i in few:
            self._try_ends(proof, i)
        for i in proof.samples:
            louder = self._point(scaled(a, i, LOUDER), (i,)) if _is_float(a.leaves[i][0]) else None
            if louder is not None:
                proof.points.append(louder)
        for every in units(a):
            unit = tuple(i for i in every if i not in few and i not in proof.samples)
            if not proof.known.issuperset(unit) and any(
                _differ(a.leaves[j], b.leaves[j]) for j in unit
            ):
                evident = self._exchange(proof, unit)
                proof.evident.update(dict.fromkeys(unit, evident))
        for i in few:
            if proof.evident.get(i) is None:
                proof.evident[i] = self._elsewhere(proof, i)
        self._merge_points(proof)
        small = [i for i, evident in proof.evident.items() if evident is False and i in proof.least]
        if small:
            error = max(self._error(proof), LEAST)
            proof.plain = {i for i in small if proof.least[i] >= PLAIN * error}

    def _try_ends(self, proof: Proof, i: int) -> None:
        """Run the first call with the ends of what an argument may be."""
        a, b = proof.pair
        values = [span(one, i) for one in proof.pair]
        whole = all(is_whole(one.leaves[i][0]) for one in proof.pair)
        known = set(values[0]) if values[0].width == 0 else set()
        found: dict[float, float] = {}  # effects, by what was tried
        failed = False
        for number in dict.fromkeys([*ends(hull(values), whole), *values[1]]):
            if number in known:
                continue
            point = self._point(filled(a, i, number), (i,))
            if point is None:
                failed = True
            else:
                proof.points.append(point)
                found[number] = self._effect(proof, point.single, a)
        proof.spans[i] = hull([*values, *(Span(number, number) for number in found)])
        most = max(found.values(), default=0.0)
        proof.evident[i] = most >= EVIDENT if most or failed else None
        if most:
            proof.least[i] = proof.effects[i] = most

    def _exchange(self, proof: Proof, unit: tuple[int, ...]) -> bool | None:
        """Whether the other's value of an argument would have changed the results of both; None if
        it changes nothing."""
        # what is true of calls that are blank may not be of others
        ordinary = self._flooded(proof, unit, 1.0, noise=True)
        effects = []
        for call, other in (proof.pair, proof.pair[::-1]):
            point = self._point(exchanged(call, other, unit), unit)
            if point is None:
                return False
            effects.append(self._effect(proof, point.single, call))
        if min(effects) >= EVIDENT:
            return True
        found = []
        for base in [point for point in proof.points if not point.sought][:BASES]:
            point = self._point(exchanged(base.call, proof.pair[1], unit), unit)
            if point is not None:
                found.append(effect(point.single, base.single, self._company(proof)))
                if found[-1] >= EVIDENT and self._add(proof, point):
                    return True
        elsewhere = self._flood(proof, unit, ordinary)
        if elsewhere or not any((*effects, *found)):
            return elsewhere
        proof.effects.update(dict.fromkeys(unit, max((*effects, *found))))
        proof.least.update(dict.fromkeys(unit, min(effects)))
        return False

    def _flood(self, proof: Proof, unit: tuple[int, ...], ordinary: Point | None) -> bool | None:
        """Whether an argument without a clear effect has one with numbers far from those of both;
        None if nothing depends on it."""
        numbers = ((0.0, False), (FAR, False), (-FAR, False), (FAR, True))
        found = []
        for point in itertools.chain(
            [ordinary], (self._flooded(proof, unit, n, noise=noise) for n, noise in numbers)
        ):
            if point is None:
                return False
            found.append(self._effect(proof, point.single, proof.pair[0]))
        return None if not any(found) else max(found) >= EVIDENT

    def _flooded(
        self, proof: Proof, unit: tuple[int, ...], number: float, *, noise: bool
    ) -> Point | None:
        """The first call with such numbers in these leaves; None if it cannot be had, or not be run
        merged."""
        call = proof.pair[0]
        for i in unit:
            call = flooded(call, i, number, noise=noise)
        point = self._point(call, unit)
        return point if point is not None and self._add(proof, point) else None

    def _elsewhere(self, proof: Proof, i: int) -> bool | None:
        """Whether an argument without effect has one where another of few numbers is at an end."""
        found = []
        for base in [
            point for point in proof.points if not point.sought and i not in point.changed
        ][:BASES]:
            for number in dict.fromkeys(proof.spans[i]):
                point = self._point(filled(base.call, i, number), (i,))
                if point is not None:
                    found.append(effect(point.single, base.single, self._company(proof)))
                    if found[-1] >= EVIDENT and self._add(proof, point):
                        return True
        return False if any(found) else None

    def _point(self, call: Call, changed: tuple[int, ...]) -> Point | None:
        """A call made up, and its result; None if it raises or gives what is not finite: it was
        made up wrongly."""
        try:
            output = self.alone(call)
        except Exception as error:
            if ran_out(error):
                raise
            self.in_call = False
            return None
        return Point(call, changed, output) if _finite(output) else None

    def _add(self, proof: Proof, point: Point) -> bool:
        """Have a call run merged, too, without which it is no evidence. False if there are
        enough."""
        room = sum(one.sought for one in proof.points) < POINTS
        if room:
            proof.points.append(dataclasses.replace(point, sought=True))
        return room

    def _error(self, proof: Proof) -> float:
        """What merging changed, at most, as a share of the error allowed; infinite where it
        raised."""
        results = [(proof.merged_of(call), proof.singles[id(call)]) for call in proof.pair]
        results += [(point.merged, point.single) for point in proof.merged_points]
        if any(isinstance(merged, Exception) for merged, _ in results):
            return float("inf")
        return max(effect(merged, single, self._company(proof)) for merged, single in results)

    def _effect(self, proof: Proof, changed: Any, call: Call) -> float:
        return effect(changed, proof.singles[id(call)], self._company(proof))

    def _company(self, proof: Proof) -> list[Any]:
        return [proof.singles[id(one)] for one in proof.pair]

    def _merge_points(self, proof: Proof) -> None:
        """Run the calls that were made up, merged with the first."""
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
                Point(a, one, proof.singles[id(a)], outputs[0], rows) for one in changed
            ]
            for point, output in zip(batch, outputs[1:], strict=True):
                point.merged, point.rows = output, rows
                proof.merged_points.append(point)


def _look(target: Target) -> ModuleState:
    return ModuleState({target.name: target.module})


def _kept(call: Call) -> Call:
    """A call with arguments that nobody writes to."""
    arguments = copied(call.arguments)
    kept = [
        tuple(one.clone() if isinstance(one, torch.Tensor) else one for one in leaf)
        for leaf in call.leaves
    ]  # as they are before the fiber goes on
    return dataclasses.replace(call, arguments=arguments, leaves=kept)


class _Unnoticed:
    """What is run within it draws from no generator that calls were given, as far as others can
    tell; and that it drew is noted.

    Default generators are left as they are then: other threads draw from them meanwhile, and must
    not draw the same again.
    """

    def __init__(self, prover: Prover, own: ArgumentSnapshot) -> None:
        self._prover = prover
        self._own = own

    def __enter__(self) -> None:
        self._states = RandomStates(self._prover.device)

    def __exit__(self, *_: object) -> None:
        drew = self._own.drew() or self._states.changed()
        self._own.put_back()
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


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _finite(output: Any) -> bool:
    return all(bool(one.isfinite().all()) for one in tensors(output) if one.is_floating_point())
