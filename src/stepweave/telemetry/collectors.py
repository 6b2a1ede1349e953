"""Metrics that are read when they are scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, get_args

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from stepweave.errors import REFUSAL_REASONS
from stepweave.reasons import UnsharedReason
from stepweave.store import REASONS as STORE_REASONS
from stepweave.telemetry.stages import StageTimes

if TYPE_CHECKING:
    from stepweave.engine import EngineStats
    from stepweave.store import StoreHealth

CERTIFICATE_STATES = ("certified", "pending", "failed")
STORES = ("jobs", "files")
VRAM_KINDS = ("allocated", "reserved", "peak", "free", "total")


class LabelledCollector(Collector):
    """What another registry has, each series with the same labels besides its own."""

    def __init__(self, registry: CollectorRegistry, labels: Mapping[str, str]) -> None:
        self._registry = registry
        self._labels = labels

    def collect(self) -> Iterable[Metric]:
        for family in self._registry.collect():
            labelled = Metric(family.name, family.documentation, family.type, family.unit)
            labelled.samples = [
                sample._replace(labels={**sample.labels, **self._labels})
                for sample in family.samples
            ]
            yield labelled


class RequestCollector(Collector):
    """Requests in flight, as running and as waiting: of one moment, so that these are always the
    sum."""

    def __init__(self, in_flight: Callable[[], int], waiting: Callable[[], int]) -> None:
        self._in_flight = in_flight
        self._waiting = waiting

    def collect(self) -> Iterable[Metric]:
        in_flight = self._in_flight()
        waiting = min(self._waiting(), in_flight)  # one may have come since
        for name, documentation, value in (
            (
                "running",
                "Accepted requests for images that the engine has started, whose upload is being "
                "read or whose images are being encoded.",
                in_flight - waiting,
            ),
            ("waiting", "Accepted requests for images that the engine has not started.", waiting),
            (
                "in_flight",
                "Accepted requests for images that are not yet answered: running and waiting.",
                in_flight,
            ),
        ):
            yield GaugeMetricFamily(f"stepweave_requests_{name}", documentation, value)


class LoadCollector(Collector):
    """`stepweave_model_load_seconds{stage}`: what the start took."""

    def __init__(self, times: StageTimes) -> None:
        self._times = times

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(
            "stepweave_model_load_seconds",
            "Seconds that each stage of the start took, the running one so far; 0 before it and "
            "where there is none. They add up to the whole start.",
            labels=["stage"],
        )
        for stage, seconds in self._times.seconds().items():
            family.add_metric([stage], seconds)
        yield family


class EngineCollector(Collector):
    """What the step engine has done: certificates, forwards and calls by module, the encoder cache,
    and what it survived.

    `module` is one of the pipeline's own parts, so its values are bounded.
    """

    def __init__(self, stats: Callable[[], EngineStats | None]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        certificates = GaugeMetricFamily(
            "stepweave_certificates",
            "Kinds of calls by whether they may share forwards: certified, pending (runs alone so "
            "far) or failed.",
            labels=["state"],
        )
        for state in CERTIFICATE_STATES:
            found = stats.certificates if stats else []
            certificates.add_metric([state], sum(item["state"] == state for item in found))
        forwards = CounterMetricFamily(
            "stepweave_forwards", "Forwards of a module.", labels=["module"]
        )
        rows = CounterMetricFamily(
            "stepweave_forward_rows", "Rows of a module's forwards.", labels=["module"]
        )
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
        unshared = CounterMetricFamily(
            "stepweave_unshared_calls",
            "Calls that ran alone though others waited, or because they must, by reason; "
            "/v1/models has the details.",
            labels=["reason"],
        )
        for reason in get_args(UnsharedReason):
            unshared.add_metric([reason], stats.unshared_calls.get(reason, 0) if stats else 0)
        lookups = CounterMetricFamily(
            "stepweave_encoder_cache_lookups",
            "Prompts looked up among remembered encodings.",
            labels=["result"],
        )
        lookups.add_metric(["hit"], stats.cache_hits if stats else 0)
        lookups.add_metric(["miss"], stats.cache_misses if stats else 0)
        survived = CounterMetricFamily(
            "stepweave_engine_recoveries",
            "What the engine survived: shared forwards that failed and ran alone; forwards that "
            "ran out of memory; calls that were run some rows at a time; errors.",
            labels=["reason"],
        )
        for reason in ("retried", "out_of_memory", "divided", "errors"):
            survived.add_metric([reason.removesuffix("s")], getattr(stats, reason) if stats else 0)
        yield from (certificates, forwards, rows, calls, unshared, lookups, survived)
        yield CounterMetricFamily(
            "stepweave_out_of_memory_failures",
            "Jobs that failed since the device's memory is too small for them alone.",
            stats.unfit if stats else 0,
        )
        yield GaugeMetricFamily(
            "stepweave_backlog_seconds",
            "Predicted seconds of work that was accepted and is not yet done.",
            stats.backlog if stats else 0,
        )
        yield GaugeMetricFamily(
            "stepweave_cost_model_error_ratio",
            "The median error of the last predicted forwards, as a share of the prediction.",
            stats.cost_error if stats else 0,
        )


class RefusalCollector(Collector):
    """`stepweave_refused_total{reason}`: requests that admission did not let in."""

    def __init__(self, refused: Callable[[], Mapping[Any, int]]) -> None:
        self._refused = refused

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(
            "stepweave_refused",
            "Requests refused by admission: no place, too long a wait, a deadline that cannot be "
            "met, too little memory.",
            labels=["reason"],
        )
        counts = self._refused()
        for reason in REFUSAL_REASONS:
            family.add_metric([reason], counts.get(reason, 0))
        yield family


class StoreCollector(Collector):
    """`stepweave_store_failures_total{store, reason}` and `stepweave_store_writable{store}`."""

    def __init__(self, stores: Callable[[], Mapping[str, StoreHealth]]) -> None:
        self._stores = stores

    def collect(self) -> Iterable[Metric]:
        failures = CounterMetricFamily(
            "stepweave_store_failures",
            "Calls of a store (jobs, or image files) that failed: no room is left, another process "
            "has the file locked, or else.",
            labels=["store", "reason"],
        )
        writable = GaugeMetricFamily(
            "stepweave_store_writable",
            "1 while writes to a store work, else 0; 0 before it is open.",
            labels=["store"],
        )
        stores = self._stores()
        for name in STORES:
            health = stores.get(name)
            for reason in STORE_REASONS:
                failures.add_metric([name, reason], health.failures[reason] if health else 0)
            writable.add_metric([name], health is not None and health.writable)
        yield from (failures, writable)


class VramCollector(Collector):
    """`stepweave_vram_bytes{device, kind}` of the device in use; zeros where that is no CUDA
    device."""

    # set once the model is loaded; other devices are not asked, since that would open a context
    # on them
    device: str = "cpu"

    def __init__(self, stats: Callable[[], EngineStats | None]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(
            "stepweave_vram_bytes",
            "GPU memory: allocated, reserved and peak (allocated) of this process; free and total "
            "of the device.",
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
            # this thread's own may be another, on which nothing shall be opened
            with torch.cuda.device(self.device):
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
