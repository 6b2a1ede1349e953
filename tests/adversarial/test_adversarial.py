"""Whatever the engine decides of a module, every job gets what a plain call gives; and what is
harmless is merged.

Two generators, one written without knowledge of the engine, half of the cases each. `make
test-full` runs ten times as many.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator

import pytest

from tests.adversarial import insider, outsider
from tests.adversarial.driver import Outcome, run
from tests.adversarial.outsider import Case

GENERATORS = {"insider": insider.generate, "outsider": outsider.generate}
FEW, MANY = 8, 250  # cases of each generator; half of them are harmless
CERTIFIED = 0.9  # of the harmless cases, at least
MERGED = 0.8  # of a certified case's calls after its first round, at least

pytestmark = [pytest.mark.usefixtures("one_torch_thread"), pytest.mark.timeout(3600)]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@functools.cache
def outcome(generator: str, seed: int) -> tuple[Case, Outcome]:
    case = GENERATORS[generator](seed)
    return case, run(case)


def draws(case: Case) -> bool:
    """Whether two plain calls of a case differ."""
    return case.name.split()[1].rstrip(":") in ("random", "draws")


def check(generator: str, seeds: range) -> None:
    wrong, alone = [], []
    for seed in seeds:
        case, found = outcome(generator, seed)
        if draws(case):  # a hook of the whole module is no part of its forward, which may be merged
            right = found.merged_share == 0 or "hook, whole" in case.name
        else:
            right = found.error <= 1
        if not right or found.errors:
            wrong.append(f"{case.name}: {found}")
        if case.harmless and not (found.certified and found.late_share >= MERGED):
            alone.append(f"{case.name}: {found}")
    harmless = sum(outcome(generator, seed)[0].harmless for seed in seeds)
    assert not wrong, "\n".join(wrong)
    assert harmless >= 0.4 * len(seeds)
    assert len(alone) <= (1 - CERTIFIED) * harmless, "\n".join(alone)


@pytest.mark.parametrize("generator", GENERATORS)
def test_results_are_right_and_harmless_modules_share_forwards(generator: str) -> None:
    check(generator, range(FEW))


@pytest.mark.full
@pytest.mark.parametrize("start", range(FEW, MANY, 32))
@pytest.mark.parametrize("generator", GENERATORS)
def test_results_are_right_in_many_cases(generator: str, start: int) -> None:
    check(generator, range(start, min(MANY, start + 32)))
