"""The sentence at the top of the reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.locust.report import samples_needed


def sustained_rate(stages: Sequence[Mapping[str, Any]]) -> float | None:
    """The highest offered rate at which every stage was sustained, if there is one."""
    return max(_rates(stages, "sustained"), default=None)


def sentence(
    stages: Sequence[Mapping[str, Any]], alone: Sequence[Mapping[str, Any]], target: float
) -> str:
    """Which rate the server sustains, as one or two sentences for people."""
    goal = f"p95 under {target:g} times the time alone ({_seconds(alone)})"
    failed = _rates(stages, "not sustained")
    unknown = _rates(stages, "too few samples")
    rate = sustained_rate(stages)
    if rate is not None:
        at_least = "" if failed and failed[-1] > rate else "at least "
        p95 = max(stage["slowdown"]["p95"] for stage in stages if stage["offered_rate"] == rate)
        text = (
            f"Sustains {at_least}{_requests(rate)} a second at {goal}; measured p95: {p95:.3g} "
            "times the time alone."
        )
        if below := [lower for lower in failed if lower < rate]:
            text += f" Yet {_several(below)} a second was not sustained."
        if unknown:
            text += f" Too few samples to say for {_several(unknown)} a second."
        return text
    if unknown:
        most = max(s["counts"]["succeeded"] for s in stages if s["verdict"] == "too few samples")
        text = (
            "Too few samples to say whether the server sustains "
            f"{_requests(*unknown)} a second at {goal}: p95 takes {samples_needed(95)} answers at "
            f"a rate, there were {'at most ' if len(unknown) > 1 else ''}{most}."
        )
        return text + (f" Not sustained: {_several(failed)} a second." if failed else "")
    first = min(stages, key=lambda stage: float(stage["offered_rate"]))
    return (
        f"No offered rate was sustained at {goal}: at {_requests(first['offered_rate'])} a second, "
        f"{'; '.join(first['reasons'])}."
    )


def _rates(stages: Sequence[Mapping[str, Any]], verdict: str) -> list[float]:
    """The rates with this verdict, ascending. A rate that was offered more than once has the worst
    of its verdicts."""
    worst: dict[float, str] = {}
    for found in ("sustained", "too few samples", "not sustained"):
        worst |= {stage["offered_rate"]: found for stage in stages if stage["verdict"] == found}
    return sorted(rate for rate, found in worst.items() if found == verdict)


def _seconds(alone: Sequence[Mapping[str, Any]]) -> str:
    goals = sorted(float(entry["target_seconds"]) for entry in alone)
    if len(goals) == 1:
        return f"{goals[0]:.3g} s"
    return f"{goals[0]:.3g} to {goals[-1]:.3g} s, by size and steps"


def _requests(*rates: float) -> str:
    return f"{_several(rates, 'or')} request{'' if rates == (1,) else 's'}"


def _several(rates: Sequence[float], word: str = "and") -> str:
    *others, last = (f"{rate:g}" for rate in rates)
    return f"{', '.join(others)} {word} {last}" if others else last
