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

from stepweave.config.clients import MAX_CLIENTS
from stepweave.outcome import End
from stepweave.telemetry.collectors import (
    EngineCollector,
    LabelledCollector,
    LoadCollector,
    RefusalCollector,
    RequestCollector,
    StoreCollector,
    VramCollector,
)
from stepweave.telemetry.stages import StageTimes

if TYPE_CHECKING:
    from stepweave.engine import EngineStats, Job
    from stepweave.store import StoreHealth

disable_created_metrics()  # type: ignore[no-untyped-call]  # one more series for each counter, which nothing here reads

Outcome = Literal[End, "refused", "late", "invalid", "unavailable"]
_OUTCOMES: dict[int, Outcome] = {499: "cancelled", 429: "refused", 504: "late", 503: "unavailable"}
# those that a server may have, as many that it had, and the empty one
MAX_CLIENT_LABELS = 2 * MAX_CLIENTS
OTHER_CLIENT = "(other)"  # no client's name
IMAGE_RESULTS = ("ok", "constant", "flagged", "non_finite")
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
            "Prefer: respond-async when its job is over, by what is kept): succeeded; failed (500, "
            "or an answer that broke off); cancelled (the client left first, or the job was "
            "cancelled); refused (429); late (504); invalid (any other 4xx); unavailable (503). "
            "`client` is the name of the API key, empty without one.",
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
            "waiting included; of requests that succeeded.",
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
            "safety checker) or non_finite (NaN or infinite values: their request failed).",
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
