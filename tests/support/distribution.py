"""Distributes tests to the processes of a run."""

from __future__ import annotations

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# modules whose tests use the shared real server
SERVED = {
    "tests/api/test_edit_images.py",
    "tests/api/test_legacy.py",
    "tests/api/test_openai_types.py",
    "tests/api/test_openapi.py",
    "tests/api/test_streams.py",
    "tests/benchmarks/test_locust.py",
    "tests/cli/test_doctor.py",
    "tests/cli/test_generate.py",
    "tests/clients/test_clients.py",
    "tests/clients/test_openai.py",
    "tests/deploy/test_monitoring.py",
    "tests/examples/test_examples.py",
    "tests/model/test_controlnet.py",
    "tests/model/test_loras.py",
    "tests/serving/test_server.py",
}
# modules of slow tests that share nothing: each test is scheduled on its own
APART = {
    "tests/engine/test_schedulers.py",
    "tests/loading/test_optimizations.py",
    "tests/pipelines/test_pipelines.py",
    "tests/project/test_docs.py",
    "tests/scope/test_scope.py",
    "tests/served/test_served.py",
    "tests/serving/test_restart.py",
    "tests/serving/test_starts.py",
}
# the slowest modules, longest first: scheduled before all others, so that they do not end last
LONG = (
    "tests/engine/test_step_engine.py",
    "tests/loading/test_rehearsals.py",
    "tests/compat/test_callbacks.py",
    "tests/compat/test_hidden_state.py",
    "tests/deploy/test_k8s.py",
    "tests/engine/test_parity.py",
    "tests/certification/test_unshared.py",
    "tests/images/test_outputs.py",
    "tests/api/test_counting.py",
    "tests/serving/test_starts.py",
    "tests/adversarial/test_adversarial.py",
    "tests/engine/test_edits.py",
    "tests/loading/test_optimizations.py",
    "tests/previews/test_previews.py",
    "tests/engine/test_reproducible.py",
    "tests/serving/test_model.py",
    "tests/certification/test_certificates.py",
)


class Scheduling(LoadScopeScheduling):
    """Keeps in one process the tests of the real server, and the tests of a module except slow
    ones."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        if self.config.option.markexpr.startswith("full") or path in APART:
            return nodeid
        return "served" if path in SERVED else path


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    config.option.loadscopereorder = False  # as they are sorted below
    return Scheduling(config, log)


def place(item: pytest.Item) -> int:
    """A test's place in the order: tests of the real server, slow modules, all others."""
    path = item.nodeid.partition("::")[0]
    return 0 if path in SERVED else 1 + LONG.index(path) if path in LONG else 1 + len(LONG)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=place)
    asking = {
        item.nodeid.partition("::")[0]
        for item in items
        if "served" in getattr(item, "fixturenames", ())
    }
    if missing := asking - SERVED:
        raise pytest.UsageError(
            f"tests.support.distribution.SERVED lacks {', '.join(sorted(missing))}: a second "
            "server would be started"
        )
