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
    LoraCollector,
    RefusalCollector,
    RequestCollector,
    StoreCollector,
    VramCollector,
)
from stepweave.telemetry.stages import StageTimes

if TYPE_CHECKING:
    from stepweave.adapters.loras import LoraStats
    from stepweave.engine import EngineStats, Job
    from stepweave.store import StoreHealth

disable_created_metrics()  # type: ignore[no-untyped-call]  # one more series for each counter, which nothing here reads

Outcome = Literal[End, "refused", "late", "invalid", "unavailable"]
_OUTCOMES: dict[int, Outcome] = {499: "cancelled", 429: "refused", 504: "late", 503: "unavailable"}
MAX_CLIENT_LABELS = 2 * MAX_CLIENTS  # present and former clients, and the empty name
OTHER_CLIENT = "(other)"  # no client's name
IMAGE_RESULTS = ("ok", "constant", "flagged", "non_finite")
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
RATIOS = (0.125, 0.25, 0.5, 0.75, 0.9, 1)
ERROR_SECONDS = (-60, -30, -10, -5, -2, -1, -0.5, -0.1, 0.1, 0.5, 1, 2, 5, 10, 30, 60)
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600)


class Metrics:
    """Counters that the server updates, and gauges that are read at each scrape. Each series has
    the label `model_name`.

    The other arguments are called at each scrape: `in_flight` counts accepted requests, `waiting`
    those of them that wait; `engine` gives the engine's statistics, or None; `refused` the requests
    that admission refused, by reason; `stores` the health of each store; `free_bytes` their free
    space, or NaN; `clients` the names of the clients with an API key; `loras` the statistics of
    LoRAs, or None.
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
        loras: Callable[[], LoraStats | None] = lambda: None,
    ) -> None:
        self.in_flight = in_flight
        self.registry = CollectorRegistry()
        series = CollectorRegistry()
        # the exposition must be UTF-8; the name of a directory may not be
        label = model_name.encode("utf-8", "replace").decode()
        self.registry.register(LabelledCollector(series, {"model_name": label}))
        Gauge(
            "stepweave_ready", "1 if the server accepts requests, else 0.", registry=series
        ).set_function(ready)
        series.register(RequestCollector(in_flight, waiting))
        self.requests = Counter(
            "stepweave_requests_total",
            "HTTP requests for images by outcome (with Prefer: respond-async, the outcome of the "
            "job): succeeded; failed (500, or an incomplete answer); cancelled (the client "
            "disconnected, or the job was cancelled); refused (429); late (504); invalid (other "
            "4xx); unavailable (503). `client` is the name of the API key, empty without one.",
            ["outcome", "client"],
            registry=series,
        )
        self.requests_begun = 0
        self._named_clients = clients
        self._clients: set[str] = set()
        self._client("")
        self.request_seconds = Histogram(
            "stepweave_request_duration_seconds",
            "Seconds from accepting a request to its finished image files, including waiting; "
            "successful requests only.",
            buckets=SECONDS,
            registry=series,
        )
        self.queue_seconds = Histogram(
            "stepweave_queue_duration_seconds",
            "Seconds from accepting a job to its first forward; successful jobs only.",
            buckets=SECONDS,
            registry=series,
        )
        self.step_seconds = Histogram(
            "stepweave_step_duration_seconds",
            "Seconds of a forward of a module, including the jobs' own code until their next call.",
            ["module"],
            buckets=STEP_SECONDS,
            registry=series,
        )
        self.batch_rows = Histogram(
            "stepweave_batch_rows", "Rows of a forward.", ["module"], buckets=ROWS, registry=series
        )
        self.batch_fill_ratio = Histogram(
            "stepweave_batch_fill_ratio",
            "Rows of a forward as a share of its limit (by knee and memory).",
            ["module"],
            buckets=RATIOS,
            registry=series,
        )
        self.eta_error = Histogram(
            "stepweave_eta_error_seconds",
            "Seconds by which a job ended later (negative: earlier) than predicted at admission.",
            buckets=ERROR_SECONDS,
            registry=series,
        )
        self.deadline_missed = Counter(
            "stepweave_deadline_missed_total",
            "Accepted jobs that missed their deadline, including those that ended during their "
            "last forward.",
            registry=series,
        )
        self.steps_saved = Counter(
            "stepweave_steps_saved_total",
            "Denoising steps not run because of a cancellation, a disconnected client or a missed "
            "deadline.",
            registry=series,
        )
        self.images = Counter(
            "stepweave_images_total",
            "Images by result: ok, constant (a single colour), flagged (by the pipeline's safety "
            "checker) or non_finite (NaN or infinite values; the request fails).",
            ["result"],
            registry=series,
        )
        for result in IMAGE_RESULTS:
            self.images.labels(result)
        self._of_module: dict[str, tuple[Histogram, Histogram, Histogram]] = {}
        self._model = Info("stepweave_model", "The served pipeline.", registry=series)
        self.load_times = StageTimes()
        series.register(LoadCollector(self.load_times))
        ProcessCollector(registry=series)
        PlatformCollector(registry=series)
        GCCollector(registry=series)
        series.register(EngineCollector(engine))
        series.register(RefusalCollector(refused))
        series.register(LoraCollector(loras))
        series.register(StoreCollector(stores))
        Gauge(
            "stepweave_store_free_bytes",
            "Free bytes of the disk with jobs and image files; NaN if unknown.",
            registry=series,
        ).set_function(free_bytes)
        self.vram = VramCollector(engine)
        series.register(self.vram)

    def loaded(self, pipeline: str, revision: str | None, device: str, dtype: str) -> None:
        """Record the loaded model: its pipeline's class, hub commit, device and data type."""
        self.vram.device = device
        self._model.info(
            {"pipeline": pipeline, "revision": revision or "", "device": device, "dtype": dtype}
        )

    def step(self, module: str, rows: int, cap: int, seconds: float) -> None:
        """Record a forward of `rows` rows, at most `cap`. Called on the engine's thread."""
        histograms = self._of_module.get(module)
        if histograms is None:
            histograms = self._of_module[module] = (
                self.step_seconds.labels(module),
                self.batch_rows.labels(module),
                self.batch_fill_ratio.labels(module),
            )
        values = (seconds, rows, rows / max(1, cap))
        for histogram, value in zip(histograms, values, strict=True):
            histogram.observe(value)

    def generated(self, job: Job, due: float | None) -> None:
        """Record a successful job, predicted to end at `due`, seconds of the monotonic clock."""
        if job.begun is not None:
            self.queue_seconds.observe(job.begun - job.accepted)
        if job.finished is None:
            return
        if due is not None:
            self.eta_error.observe(job.finished - due)
        if job.deadline is not None and job.finished > job.deadline:  # in its last forward
            self.deadline_missed.inc()

    def answered(self, status: int, client: str = "") -> None:
        """Count a request for images by its status and its client's name."""
        self.requests.labels(outcome_of(status), self._client(client)).inc()

    def _client(self, name: str) -> str:
        """The client's label, of a limited number, since series stay until the process ends."""
        if name not in self._clients:
            if len(self._clients) >= MAX_CLIENT_LABELS:
                name = OTHER_CLIENT
            self._clients.add(name)
            for outcome in get_args(Outcome):
                # creates the series with 0, so that there is a rate from the first scrape on
                self.requests.labels(outcome, name)
        return name

    def render(self) -> bytes:
        """The metrics in Prometheus's text format 0.0.4."""
        for name in self._named_clients():
            self._client(name)
        return generate_latest(self.registry)


def outcome_of(status: int) -> Outcome:
    """The label `outcome` of an HTTP status."""
    if status < 400:
        return "succeeded"
    if status in _OUTCOMES:
        return _OUTCOMES[status]
    return "invalid" if status < 500 else "failed"
