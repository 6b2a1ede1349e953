"""The metrics of one server process. Every label has a bounded set of values."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Literal, get_args

import psutil
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from stepweave.errors import Cancelled, Refused, StepweaveError, Unavailable

if TYPE_CHECKING:
    from stepweave.engine import EngineStats

disable_created_metrics()  # type: ignore[no-untyped-call]  # one more series for each counter, which nothing here reads

Outcome = Literal["succeeded", "failed", "cancelled", "refused", "invalid", "unavailable"]
CERTIFICATE_STATES = ("certified", "pending", "failed")
VRAM_KINDS = ("allocated", "reserved", "peak", "free", "total")
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600)


class Metrics:
    """Counters that the server feeds, and gauges that are read when scraped.

    The arguments are called at each scrape; `engine` gives the engine's statistics, or None while there is none.
    """

    def __init__(
        self,
        in_flight: Callable[[], int],
        waiting: Callable[[], int],
        engine: Callable[[], EngineStats | None] = lambda: None,
    ) -> None:
        self.registry = CollectorRegistry()
        Gauge(
            "stepweave_requests_in_flight",
            "Generation requests accepted and not yet answered, running or waiting.",
            registry=self.registry,
        ).set_function(in_flight)
        Gauge(
            "stepweave_requests_waiting",
            "Generation requests accepted that do not run yet.",
            registry=self.registry,
        ).set_function(waiting)
        self.requests = Counter(
            "stepweave_requests_total",
            "Generation requests answered, by outcome.",
            ["outcome"],
            registry=self.registry,
        )
        for outcome in get_args(Outcome):
            self.requests.labels(outcome)  # present at 0, so that a rate exists from the first scrape
        self.request_seconds = Histogram(
            "stepweave_request_seconds",
            "Seconds from a generation request's acceptance to its finished picture files.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.model = Info("stepweave_model", "The pipeline that is served.", registry=self.registry)
        Gauge(
            "stepweave_process_resident_bytes",
            "Resident memory of the server process.",
            registry=self.registry,
        ).set_function(lambda: psutil.Process().memory_info().rss)
        self.registry.register(EngineCollector(engine))
        self.vram = VramCollector(engine)
        self.registry.register(self.vram)

    @contextlib.contextmanager
    def counted(self, *, success: bool = True) -> Iterator[None]:
        """Count one request by how the block ends; with `success` False only if it raises."""
        outcome: Outcome | None = "succeeded" if success else None
        try:
            yield
        except BaseException as error:
            outcome = outcome_of(error)
            raise
        finally:
            if outcome is not None:
                self.requests.labels(outcome).inc()

    def render(self) -> bytes:
        """The exposition, in Prometheus's text format 0.0.4."""
        return generate_latest(self.registry)


def outcome_of(error: BaseException) -> Outcome:
    """The outcome that an error is counted as."""
    if isinstance(error, (Cancelled, asyncio.CancelledError)):
        return "cancelled"
    if isinstance(error, Refused):
        return "refused"
    if isinstance(error, Unavailable):
        return "unavailable"
    if isinstance(error, StepweaveError) and 400 <= error.status < 500:
        return "invalid"
    return "failed"


class EngineCollector(Collector):
    """What the step engine has done: certificates, forwards and calls by module, the encoder cache, and what it survived.

    `module` is one of the pipeline's own parts, so its values are bounded.
    """

    def __init__(self, stats: Callable[[], EngineStats | None]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        certificates = GaugeMetricFamily(
            "stepweave_certificates",
            "Kinds of calls by whether they may share forwards: certified, pending (runs alone so far) or failed.",
            labels=["state"],
        )
        for state in CERTIFICATE_STATES:
            found = stats.certificates if stats else []
            certificates.add_metric([state], sum(one["state"] == state for one in found))
        forwards = CounterMetricFamily("stepweave_forwards", "Forwards of a module.", labels=["module"])
        rows = CounterMetricFamily("stepweave_forward_rows", "Rows of a module's forwards.", labels=["module"])
        calls = CounterMetricFamily(
            "stepweave_calls",
            "Calls of a module, by whether the forward was shared with others.",
            labels=["module", "shared"],
        )
        for module, counts in stats.forwards.items() if stats else ():
            by_rows = dict(counts.by_rows)
            forwards.add_metric([module], sum(by_rows.values()))
            rows.add_metric([module], sum(count * number for number, count in by_rows.items()))
            calls.add_metric([module, "yes"], counts.merged_calls)
            calls.add_metric([module, "no"], counts.calls - counts.merged_calls)
        lookups = CounterMetricFamily(
            "stepweave_encoder_cache_lookups", "Prompts looked up among remembered encodings.", labels=["result"]
        )
        lookups.add_metric(["hit"], stats.cache_hits if stats else 0)
        lookups.add_metric(["miss"], stats.cache_misses if stats else 0)
        survived = CounterMetricFamily(
            "stepweave_engine_recoveries",
            "What the engine survived: shared forwards that failed and ran alone; forwards that ran out of memory; calls that "
            "were run some rows at a time; errors.",
            labels=["reason"],
        )
        for reason in ("retried", "out_of_memory", "divided", "errors"):
            survived.add_metric([reason.removesuffix("s")], getattr(stats, reason) if stats else 0)
        unfit = CounterMetricFamily(
            "stepweave_out_of_memory_failures",
            "Jobs that failed since the device's memory is too small for them alone.",
        )
        unfit.add_metric([], stats.unfit if stats else 0)
        yield from (certificates, forwards, rows, calls, lookups, survived, unfit)


class VramCollector(Collector):
    """`stepweave_vram_bytes{device, kind}` of the device in use; zeros where that is no CUDA device."""

    device: str = (
        "cpu"  # set once the model is loaded; other devices are not asked, since that would open a context on them
    )

    def __init__(self, stats: Callable[[], EngineStats | None]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(
            "stepweave_vram_bytes",
            "GPU memory: allocated, reserved and peak (allocated) of this process; free and total of the device.",
            labels=["device", "kind"],
        )
        for kind, value in zip(VRAM_KINDS, self._values(), strict=False):
            family.add_metric([self.device, kind], value)
        yield family

    def _values(self) -> tuple[int, ...]:
        if not self.device.startswith("cuda"):
            return (0,) * len(VRAM_KINDS)
        import torch

        try:
            free, total = torch.cuda.mem_get_info(self.device)
        except RuntimeError:
            return ()  # a broken device must not take the other metrics with it
        stats = self._stats()  # the engine resets torch's own peak when it measures a forward
        return (
            torch.cuda.memory_allocated(self.device),
            torch.cuda.memory_reserved(self.device),
            max(torch.cuda.max_memory_allocated(self.device), stats.peak_memory if stats else 0),
            free,
            total,
        )
