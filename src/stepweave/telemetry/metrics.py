"""The metrics of one server process. Every label has a bounded set of values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from stepweave.config.clients import MAX_CLIENTS
from stepweave.errors import REFUSAL_REASONS
from stepweave.store import REASONS as STORE_REASONS
from stepweave.telemetry.stages import StageTimes

if TYPE_CHECKING:
    from stepweave.engine import EngineStats, Job
    from stepweave.store import StoreHealth

disable_created_metrics()  # type: ignore[no-untyped-call]  # one more series for each counter, which nothing here reads

Outcome = Literal["succeeded", "failed", "cancelled", "refused", "late", "invalid", "unavailable"]
_OUTCOMES: dict[int, Outcome] = {499: "cancelled", 429: "refused", 504: "late", 503: "unavailable"}
# those that a server may have, as many that it had, and the empty one
MAX_CLIENT_LABELS = 2 * MAX_CLIENTS
OTHER_CLIENT = "(other)"  # no client's name
CERTIFICATE_STATES = ("certified", "pending", "failed")
UNSHARED_REASONS = (
    "state",
    "turns",
    "callback",
    "cast",
    "failed",
    "random",
    "writes_arguments",
    "must_be_equal",
    "too_alike",
    "not_finite",
    "not_comparable",
    "reproducible",
    "error",
)
IMAGE_RESULTS = ("ok", "constant", "flagged", "non_finite")
STORES = ("jobs", "files")
VRAM_KINDS = ("allocated", "reserved", "peak", "free", "total")
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
RATIOS = (0.125, 0.25, 0.5, 0.75, 0.9, 1)
ERROR_SECONDS = (-60, -30, -10, -5, -2, -1, -0.5, -0.1, 0.1, 0.5, 1, 2, 5, 10, 30, 60)
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600)


class Metrics:
    """Counters that the server feeds, and gauges that are read when scraped. Each series has the
    label `model_name`.

    The other arguments are called at each scrape: `in_flight` and `waiting` count requests, the
    latter among the former; `engine` gives the engine's statistics, or None while there is none;
    `refused` how many requests admission refused, by reason; `stores` how each of the stores fares,
    `free_bytes` the room that they have, or NaN; `clients` the names of the clients that have an
    API key.
    """

    def __init__(
        self,
        in_flight: Callable[[], int],
        waiting: Callable[[], int],
        model_name: str = "",
        engine: Callable[[], EngineStats | None] = lambda: None,
        refused: Callable[[], Mapping[Any, int]] = dict,
        ready: Callable[[], bool] = lambda: True,
        stores: Callable[[], Mapping[str, StoreHealth]] = dict,
        free_bytes: Callable[[], float] = lambda: math.nan,
        clients: Callable[[], Iterable[str]] = tuple,
    ) -> None:
        self.in_flight = in_flight
        self.registry = CollectorRegistry()
        series = CollectorRegistry()
        # the exposition is UTF-8, which the name of a directory need not be
        label = model_name.encode("utf-8", "replace").decode()
        self.registry.register(LabelledCollector(series, {"model_name": label}))
        Gauge(
            "stepweave_ready", "1 while the server takes work, else 0.", registry=series
        ).set_function(ready)
        series.register(RequestCollector(in_flight, waiting))
        self.requests = Counter(
            "stepweave_requests_total",
            "HTTP requests for images, each counted once, by what it was answered with (one with "
            "Prefer: respond-async when its "
            "job is over, by what is kept): succeeded; failed (500, or an answer that broke off); "
            "cancelled (the client left "
            "first, or the job was cancelled); refused (429); late (504); invalid (any other 4xx); "
            "unavailable (503). `client` "
            "is the name of the API key, empty without one.",
            ["outcome", "client"],
            registry=series,
        )
        self.requests_begun = 0
        self._named_clients = clients
        self._clients: set[str] = set()
        self._client("")
        self.request_seconds = Histogram(
            "stepweave_request_duration_seconds",
            "Seconds from the acceptance of a request for images to its finished image files, "
            "waiting included; of requests "
            "that succeeded.",
            buckets=SECONDS,
            registry=series,
        )
        self.queue_seconds = Histogram(
            "stepweave_queue_duration_seconds",
            "Seconds from a job's acceptance to its first forward; of jobs that succeeded.",
            buckets=SECONDS,
            registry=series,
        )
        self.step_seconds = Histogram(
            "stepweave_step_duration_seconds",
            "Seconds of a forward of a module with what follows it, until all its jobs wait for "
            "their next one.",
            ["module"],
            buckets=STEP_SECONDS,
            registry=series,
        )
        self.batch_rows = Histogram(
            "stepweave_batch_rows", "Rows of a forward.", ["module"], buckets=ROWS, registry=series
        )
        self.batch_fill_ratio = Histogram(
            "stepweave_batch_fill_ratio",
            "Rows of a forward as a share of those it was allowed, by the knee and by memory.",
            ["module"],
            buckets=RATIOS,
            registry=series,
        )
        self.eta_error = Histogram(
            "stepweave_eta_error_seconds",
            "Seconds by which a job ended later (or, below zero, earlier) than was predicted when "
            "it was accepted.",
            buckets=ERROR_SECONDS,
            registry=series,
        )
        self.deadline_missed = Counter(
            "stepweave_deadline_missed_total",
            "Jobs that were let in and did not meet their deadline, those among them whose last "
            "forward was under way.",
            registry=series,
        )
        self.steps_saved = Counter(
            "stepweave_steps_saved_total",
            "Denoising steps that were not run since their job was cancelled, its client left, or "
            "its deadline passed.",
            registry=series,
        )
        self.images = Counter(
            "stepweave_images_total",
            "Images by result: ok, constant (one colour throughout), flagged (by the pipeline's "
            "safety checker) or non_finite "
            "(NaN or infinite values: their request failed).",
            ["result"],
            registry=series,
        )
        for result in IMAGE_RESULTS:
            self.images.labels(result)
        self._of_module: dict[str, tuple[Histogram, Histogram, Histogram]] = {}
        self._model = Info("stepweave_model", "The pipeline that is served.", registry=series)
        self.load_times = StageTimes()
        series.register(LoadCollector(self.load_times))
        ProcessCollector(registry=series)
        PlatformCollector(registry=series)
        GCCollector(registry=series)
        series.register(EngineCollector(engine))
        series.register(RefusalCollector(refused))
        series.register(StoreCollector(stores))
        Gauge(
            "stepweave_store_free_bytes",
            "Bytes that are free where jobs and image files are stored; NaN if that cannot be "
            "told.",
            registry=series,
        ).set_function(free_bytes)
        self.vram = VramCollector(engine)
        series.register(self.vram)

    def loaded(self, pipeline: str, revision: str | None, device: str, dtype: str) -> None:
        """The model was loaded: the class of its pipeline, its commit on the hub if it is from
        there, and where it is."""
        self.vram.device = device
        self._model.info(
            {"pipeline": pipeline, "revision": revision or "", "device": device, "dtype": dtype}
        )

    def step(self, module: str, rows: int, cap: int, seconds: float) -> None:
        """A forward was run. Called on the engine's thread."""
        found = self._of_module.get(module)
        if found is None:
            found = self._of_module[module] = (
                self.step_seconds.labels(module),
                self.batch_rows.labels(module),
                self.batch_fill_ratio.labels(module),
            )
        for histogram, value in zip(found, (seconds, rows, rows / max(1, cap)), strict=True):
            histogram.observe(value)

    def generated(self, job: Job, due: float | None) -> None:
        """A job succeeded, which was expected to at `due`, in seconds of the monotonic clock, if
        that was known."""
        if job.begun is not None:
            self.queue_seconds.observe(job.begun - job.accepted)
        if job.finished is None:
            return
        if due is not None:
            self.eta_error.observe(job.finished - due)
        if job.deadline is not None and job.finished > job.deadline:  # in its last forward
            self.deadline_missed.inc()

    def answered(self, status: int, client: str = "") -> None:
        """A request for images, of the client of that name, was answered with a status."""
        self.requests.labels(outcome_of(status), self._client(client)).inc()

    def _client(self, name: str) -> str:
        """The client's label. Keys may be replaced under ever new names, and each keeps its series
        until the process ends."""
        if name not in self._clients:
            if len(self._clients) >= MAX_CLIENT_LABELS:
                name = OTHER_CLIENT
            self._clients.add(name)
            for outcome in get_args(Outcome):
                # present at 0, so that a rate exists from the first scrape
                self.requests.labels(outcome, name)
        return name

    def render(self) -> bytes:
        """The exposition, in Prometheus's text format 0.0.4."""
        for name in self._named_clients():
            self._client(name)
        return generate_latest(self.registry)


def outcome_of(status: int) -> Outcome:
    """The outcome that an answer's status is counted as."""
    if status < 400:
        return "succeeded"
    if status in _OUTCOMES:
        return _OUTCOMES[status]
    return "invalid" if status < 500 else "failed"


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
                "Accepted requests for images that the engine has begun, whose upload is being "
                "read or whose images are being "
                "encoded.",
                in_flight - waiting,
            ),
            ("waiting", "Accepted requests for images that the engine has not begun.", waiting),
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
            "where there is none. They add "
            "up to the whole start.",
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
        for reason in UNSHARED_REASONS:
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
            "ran out of memory; calls that "
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
        backlog = GaugeMetricFamily(
            "stepweave_backlog_seconds",
            "Predicted seconds of work that was accepted and is not yet done.",
        )
        backlog.add_metric([], stats.backlog if stats else 0)
        error = GaugeMetricFamily(
            "stepweave_cost_model_error_ratio",
            "The median error of the last predicted forwards, as a share of the prediction.",
        )
        error.add_metric([], stats.cost_error if stats else 0)
        yield from (
            certificates,
            forwards,
            rows,
            calls,
            unshared,
            lookups,
            survived,
            unfit,
            backlog,
            error,
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

    device: str = (
        # set once the model is loaded; other devices are not asked, since that would open a context
        # on them
        "cpu"
    )

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
