"""Metrics whose values are read at each scrape."""

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
    from stepweave.adapters.loras import LoraStats
    from stepweave.engine import EngineStats
    from stepweave.store import StoreHealth

CERTIFICATE_STATES = ("certified", "pending", "failed")
STORES = ("jobs", "files")
VRAM_KINDS = ("allocated", "reserved", "peak", "free", "total")


class LabelledCollector(Collector):
    """The metrics of another registry, with additional labels."""

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
    """Requests in flight, running and waiting, read together so that the sum is right."""

    def __init__(self, in_flight: Callable[[], int], waiting: Callable[[], int]) -> None:
        self._in_flight = in_flight
        self._waiting = waiting

    def collect(self) -> Iterable[Metric]:
        in_flight = self._in_flight()
        waiting = min(self._waiting(), in_flight)  # a request may have arrived in between
        for name, documentation, value in (
            (
                "running",
                "Accepted requests that the engine has started, whose body is being read or whose "
                "images are being encoded.",
                in_flight - waiting,
            ),
            ("waiting", "Accepted requests that the engine has not started.", waiting),
            ("in_flight", "Accepted requests, running and waiting.", in_flight),
        ):
            yield GaugeMetricFamily(f"stepweave_requests_{name}", documentation, value)


class LoadCollector(Collector):
    """`stepweave_model_load_seconds{stage}`."""

    def __init__(self, times: StageTimes) -> None:
        self._times = times

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(
            "stepweave_model_load_seconds",
            "Seconds of each stage of the server's start (of a running stage, so far). They add up "
            "to the whole start.",
            labels=["stage"],
        )
        for stage, seconds in self._times.seconds().items():
            family.add_metric([stage], seconds)
        yield family


class EngineCollector(Collector):
    """The engine's statistics: certificates, forwards and calls by module, the encoder cache, and
    recoveries. `module` is a component of the pipeline, so its values are bounded."""

    def __init__(self, stats: Callable[[], EngineStats | None]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        certificates = GaugeMetricFamily(
            "stepweave_certificates",
            "Kinds of calls by whether they may share forwards: certified, pending (alone until "
            "proven) or failed (always alone).",
            labels=["state"],
        )
        for state in CERTIFICATE_STATES:
            kinds = stats.certificates if stats else []
            certificates.add_metric([state], sum(kind["state"] == state for kind in kinds))
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
            "Calls that ran alone although others waited, or because they must, by reason; "
            "/v1/models has the details.",
            labels=["reason"],
        )
        for reason in get_args(UnsharedReason):
            unshared.add_metric([reason], stats.unshared_calls.get(reason, 0) if stats else 0)
        lookups = CounterMetricFamily(
            "stepweave_encoder_cache_lookups",
            "Lookups of prompts in the encoder cache.",
            labels=["result"],
        )
        lookups.add_metric(["hit"], stats.cache_hits if stats else 0)
        lookups.add_metric(["miss"], stats.cache_misses if stats else 0)
        recoveries = CounterMetricFamily(
            "stepweave_engine_recoveries",
            "Failures that the engine recovered from: shared forwards that failed and were retried "
            "alone; forwards that ran out of memory; calls divided into parts; other errors.",
            labels=["reason"],
        )
        for reason in ("retried", "out_of_memory", "divided", "errors"):
            recoveries.add_metric(
                [reason.removesuffix("s")], getattr(stats, reason) if stats else 0
            )
        yield from (certificates, forwards, rows, calls, unshared, lookups, recoveries)
        yield CounterMetricFamily(
            "stepweave_out_of_memory_failures",
            "Jobs that failed because they exceed the device's memory even alone.",
            stats.unfit if stats else 0,
        )
        yield GaugeMetricFamily(
            "stepweave_backlog_seconds",
            "Predicted seconds of accepted, unfinished work.",
            stats.backlog if stats else 0,
        )
        yield GaugeMetricFamily(
            "stepweave_cost_model_error_ratio",
            "Median error of recent predictions of forwards, as a share of the prediction.",
            stats.cost_error if stats else 0,
        )


class RefusalCollector(Collector):
    """`stepweave_refused_total{reason}`: requests refused by admission."""

    def __init__(self, refused: Callable[[], Mapping[Any, int]]) -> None:
        self._refused = refused

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(
            "stepweave_refused",
            "Requests refused by admission: queue full, wait too long, deadline cannot be met, too "
            "little memory.",
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
            "Failed operations of a store (jobs, or image files): full, busy (locked by another "
            "process) or failed.",
            labels=["store", "reason"],
        )
        writable = GaugeMetricFamily(
            "stepweave_store_writable",
            "1 if writes to a store work, else 0; 0 until it is open.",
            labels=["store"],
        )
        stores = self._stores()
        for name in STORES:
            health = stores.get(name)
            for reason in STORE_REASONS:
                failures.add_metric([name, reason], health.failures[reason] if health else 0)
            writable.add_metric([name], health is not None and health.writable)
        yield from (failures, writable)


class LoraCollector(Collector):
    """`stepweave_loras_loaded`, `stepweave_lora_bytes`, `stepweave_lora_loads_total{result}`,
    `stepweave_lora_evictions_total` and `stepweave_lora_load_seconds_total`."""

    def __init__(self, stats: Callable[[], LoraStats | None]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        for kind, name, documentation, value in (
            (GaugeMetricFamily, "stepweave_loras_loaded", "LoRAs in memory.", "loaded"),
            (GaugeMetricFamily, "stepweave_lora_bytes", "Memory of LoRAs.", "bytes"),
            (
                CounterMetricFamily,
                "stepweave_lora_evictions",
                "LoRAs that left memory for others.",
                "evictions",
            ),
            (
                CounterMetricFamily,
                "stepweave_lora_load_seconds",
                "Seconds of reading LoRAs into memory.",
                "seconds",
            ),
        ):
            yield kind(name, documentation, value=getattr(stats, value, 0))
        loads = CounterMetricFamily(
            "stepweave_lora_loads",
            "LoRAs read into memory (ok), or refused for their file (failed).",
            labels=["result"],
        )
        loads.add_metric(["ok"], getattr(stats, "loads", 0))
        loads.add_metric(["failed"], getattr(stats, "failures", 0))
        yield loads


class VramCollector(Collector):
    """`stepweave_vram_bytes{device, kind}` of the device in use; zeros if it is no CUDA device."""

    # set once the model is loaded; other devices are not read, which would create a context there
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
            # not this thread's current device, where it would create a context
            with torch.cuda.device(self.device):
                free, total = torch.cuda.mem_get_info(self.device)
        except RuntimeError:
            return ()  # a failed device must not fail the whole scrape
        stats = self._stats()  # the engine resets torch's peak when it measures a forward
        return (
            torch.cuda.memory_allocated(self.device),
            torch.cuda.memory_reserved(self.device),
            max(torch.cuda.max_memory_allocated(self.device), stats.peak_memory if stats else 0),
            free,
            total,
        )
