"""The Grafana dashboard as code: `python monitoring/dashboard.py` writes
`monitoring/dashboard.json`.

Every query has a result even without traffic, GPU or ready server (percentiles are then NaN), so an
empty panel means that nothing is scraped.
"""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

from grafana_foundation_sdk.builders import common, prometheus, stat, table, timeseries
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

FILE = Path(__file__).with_name("dashboard.json")
SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
SELECTED = 'model_name=~"$model_name", namespace=~"$namespace", job=~"$job", pod=~"$pod"'
OF_SERVERS = 'model_name!=""'  # for metrics that other programs also expose
WINDOW = "$__rate_interval"


def series(metric: str, *matchers: str) -> str:
    """A selector of `metric` with the dashboard's variables."""
    return f"{metric}{{{', '.join([*matchers, SELECTED])}}}"


def share(part: str, whole: str) -> str:
    """Requests matching `part` as a share of those matching `whole` (matchers of `outcome`); 0
    without traffic."""
    rates = [
        f"sum(rate({series('stepweave_requests_total', outcome)}[{WINDOW}]))"
        for outcome in (part, whole)
    ]
    return f"{rates[0]} / clamp_min({rates[1]}, 1e-9)"


def percentile(q: float, metric: str = "stepweave_request_duration_seconds", *by: str) -> str:
    labels = ", ".join(("le", *by))
    return (
        f"histogram_quantile({q}, sum by ({labels}) (rate({series(f'{metric}_bucket')}[{WINDOW}])))"
    )


def mean(metric: str) -> str:
    """The mean of a histogram per module; 0 without forwards."""
    return ratio(rate(f"{metric}_sum", "module"), rate(f"{metric}_count", "module"))


def vram(kinds: str) -> str:
    """Bytes on each device of the kinds that match the regular expression `kinds`."""
    matcher = f'kind=~"{kinds}"'
    return f"sum without (kind) ({series('stepweave_vram_bytes', matcher)})"


def rate(metric: str, by: str, *matchers: str) -> str:
    return f"sum by ({by}) (rate({series(metric, *matchers)}[{WINDOW}]))"


def ratio(part: str, whole: str) -> str:
    """A ratio; 0 if `whole` is 0."""
    return f"{part} / clamp_min({whole}, 1e-9)"


READY = series("stepweave_ready")
REFUSED_SHARE = share('outcome=~"refused|unavailable"', 'outcome!="invalid"')
FAILED_SHARE = share('outcome="failed"', 'outcome=~"succeeded|failed"')
# memory that torch has reserved but not allocated is available to the next image
VRAM_SHARE = (
    f"({vram('total|allocated')} - {vram('free|reserved')}) / clamp_min({vram('total')}, 1)"
)


def query(expr: str, legend: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().datasource(SOURCE).expr(expr).legend_format(legend).range()


def number(
    title: str, description: str, unit: str, expr: str, *steps: tuple[float | None, str]
) -> stat.Panel:
    """A panel with a current number; each of `steps` is a lower bound and its colour."""
    thresholds = [
        model.Threshold(value=value, color=color) for value, color in steps or [(None, "text")]
    ]
    return (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .min(0)
        .thresholds(build.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(thresholds))
        .color_scheme(build.FieldColor().mode(model.FieldColorModeId.THRESHOLDS))
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .graph_mode(options.BigValueGraphMode.AREA)
        .height(4)
        .with_target(query(expr, title).ref_id("A"))
    )


def graph(
    title: str, description: str, unit: str, *queries: tuple[str, str], signed: bool = False
) -> timeseries.Panel:
    """A panel of lines over time; each of `queries` is an expression and its legend. The axis
    starts
    at 0 unless `signed`."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .line_width(1)
        .fill_opacity(10)
        .show_points(options.VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .display_mode(options.LegendDisplayMode.TABLE)
            .placement(options.LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs(["lastNotNull", "max"])
        )
        .tooltip(
            common.VizTooltipOptions()
            .mode(options.TooltipDisplayMode.MULTI)
            .sort(options.SortOrder.DESCENDING)
        )
        .height(9)
        .span(12)
    )
    if not signed:
        panel.min(0)
    for ref, (expr, legend) in zip("ABCDEFGH", queries, strict=False):
        panel.with_target(query(expr, legend).ref_id(ref))
    return panel


def models() -> table.Panel:
    expr = (
        f"max by (pod, instance, model_name, pipeline, revision, device, dtype) "
        f"({series('stepweave_model_info')})"
    )
    hidden = {"Time": True, "Value": True}
    return (
        table.Panel()
        .title("Models")
        .description(
            "The model of each server; a row without one is a server that is still loading."
        )
        .datasource(SOURCE)
        .unit("none")
        .align(options.FieldTextAlignment.AUTO)
        .height(6)
        .span(24)
        .with_target(query(expr, "").instant().format(PromQueryFormat.TABLE).ref_id("A"))
        .with_transformation(
            model.DataTransformerConfig(id_val="organize", options={"excludeByName": hidden})
        )
    )


def label_variable(label: str, within: str = "") -> build.QueryVariable:
    """A variable with the values of `label`; "All" also matches servers without it, such as those
    outside of Kubernetes."""
    return (
        build.QueryVariable(label)
        .datasource(SOURCE)
        .query(f"label_values(stepweave_requests_in_flight{within}, {label})")
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(model.VariableOption(text="All", value="$__all"))
    )


def dashboard() -> model.Dashboard:
    """The dashboard, in Grafana's own types."""
    outcome_rate = f"sum by (outcome) (rate({series('stepweave_requests_total')}[{WINDOW}]))"
    rows: dict[str, list[stat.Panel | timeseries.Panel | table.Panel]] = {
        "Now": [
            number(
                "Ready servers",
                "Servers that accept requests.",
                "none",
                f"sum({READY}) or vector(0)",
                (None, "red"),
                (1, "green"),
            ).span(4),
            number(
                "Requests in flight",
                "Accepted requests, running and waiting.",
                "none",
                f"sum({series('stepweave_requests_in_flight')})",
            ).span(5),
            number(
                "Requests refused",
                "Share of valid requests answered with 429 (queue full) or 503 (not ready).",
                "percentunit",
                REFUSED_SHARE,
                (None, "green"),
                (0.01, "orange"),
                (0.1, "red"),
            ).span(5),
            number(
                "95th percentile",
                "95 % of requests were done within this time, including waiting.",
                "s",
                percentile(0.95),
            ).span(5),
            number(
                "VRAM in use",
                "Memory of the fullest GPU that is not available to the next image; 0 without a "
                "GPU.",
                "percentunit",
                f"max({VRAM_SHARE})",
                (None, "green"),
                (0.9, "orange"),
                (0.95, "red"),
            ).span(5),
        ],
        "Traffic": [
            graph(
                "Running and waiting",
                "Accepted requests that the engine has started, and those that it has not. If "
                "requests wait all the time, add replicas.",
                "none",
                (f"sum({series('stepweave_requests_running')})", "running"),
                (f"sum({series('stepweave_requests_waiting')})", "waiting"),
            ),
            graph(
                "Rate by outcome",
                "Requests for images per second, by outcome.",
                "reqps",
                (outcome_rate, "{{outcome}}"),
            ),
            graph(
                "Requests by client",
                "Requests for images per second, by the name of the API key (empty without a valid "
                "key).",
                "reqps",
                (rate("stepweave_requests_total", "client"), "{{client}}"),
            ),
            graph(
                "Refused and failed",
                "Refused: share of valid requests answered with 429 or 503. Failed: share of "
                "requests that ran.",
                "percentunit",
                (REFUSED_SHARE, "refused"),
                (FAILED_SHARE, "failed"),
            ),
            graph(
                "Latency percentiles",
                "Seconds from accepting a request to its finished image files, including waiting; "
                "successful requests only.",
                "s",
                *((percentile(q), f"p{q * 100:.0f}") for q in (0.5, 0.95, 0.99)),
            ),
            graph(
                "Readiness",
                "1 if a server accepts requests; 0 if it is loading, draining or stuck.",
                "none",
                (f"max by (pod, instance) ({READY})", "{{pod}} {{instance}}"),
            ),
            graph(
                "Steps saved",
                "Denoising steps per second not run because of a cancellation, a disconnected "
                "client or a missed deadline.",
                "cps",
                (rate("stepweave_steps_saved_total", "job"), "{{job}}"),
            ),
        ],
        "Engine": [
            graph(
                "Rows per forward",
                "Mean rows of a module's forwards: how well steps are batched. With guidance an "
                "image has two rows.",
                "none",
                (
                    ratio(
                        rate("stepweave_forward_rows_total", "module"),
                        rate("stepweave_forwards_total", "module"),
                    ),
                    "{{module}}",
                ),
            ),
            graph(
                "Calls that share a forward",
                "Share of a module's calls that ran together with others; 0 if jobs run alone.",
                "percentunit",
                (
                    ratio(
                        rate("stepweave_calls_total", "module", 'shared="yes"'),
                        rate("stepweave_calls_total", "module"),
                    ),
                    "{{module}}",
                ),
            ),
            graph(
                "Certificates",
                "Kinds of calls that may share forwards (certified), run alone until proven "
                "(pending), or always run alone (failed).",
                "none",
                (f"sum by (state) ({series('stepweave_certificates')})", "{{state}}"),
            ),
            graph(
                "Prompt cache hits",
                "Share of prompts whose encoding was cached.",
                "percentunit",
                (
                    ratio(
                        rate("stepweave_encoder_cache_lookups_total", "job", 'result="hit"'),
                        rate("stepweave_encoder_cache_lookups_total", "job"),
                    ),
                    "{{job}}",
                ),
            ),
            graph(
                "Recoveries",
                "Failures per second that the engine recovered from: shared forwards retried "
                "alone, forwards that ran out of memory, calls divided into parts, other errors; "
                "and jobs that failed because they exceed the device's memory.",
                "cps",
                (rate("stepweave_engine_recoveries_total", "reason"), "{{reason}}"),
                (
                    rate("stepweave_out_of_memory_failures_total", "job"),
                    "failed: out of memory",
                ),
            ),
            graph(
                "Images by result",
                "Images per second: ok; constant (a single colour); flagged by the pipeline's "
                "safety checker; non_finite (NaN or infinite values; the request fails).",
                "cps",
                (rate("stepweave_images_total", "result"), "{{result}}"),
            ),
            graph(
                "Forwards by module",
                "Forwards per second.",
                "cps",
                (rate("stepweave_forwards_total", "module"), "{{module}}"),
            ),
        ],
        "Scheduling": [
            graph(
                "Backlog",
                "Predicted seconds of accepted, unfinished work: how long a new low-priority "
                "request would wait.",
                "s",
                (
                    f"max by (pod, instance) ({series('stepweave_backlog_seconds')})",
                    "{{pod}} {{instance}}",
                ),
            ),
            graph(
                "Wait for the first forward",
                "Seconds from accepting a job to its first forward; successful jobs only.",
                "s",
                *(
                    (percentile(q, "stepweave_queue_duration_seconds"), f"p{q * 100:.0f}")
                    for q in (0.5, 0.95, 0.99)
                ),
            ),
            graph(
                "Seconds of a step",
                "Median seconds of a module's forwards, including the jobs' own code until their "
                "next call.",
                "s",
                (percentile(0.5, "stepweave_step_duration_seconds", "module"), "{{module}}"),
            ),
            graph(
                "Rows of a batch, and fill",
                "Mean rows of a forward, also as a share of its limit: the knee, beyond which more "
                "rows do not pay, or what fits into memory.",
                "none",
                (mean("stepweave_batch_rows"), "rows of {{module}}"),
                (mean("stepweave_batch_fill_ratio"), "fill of {{module}}"),
            ),
            graph(
                "Refused by reason",
                "Requests per second refused by admission: queue full, wait too long, deadline "
                "cannot be met, too little memory; and accepted jobs that missed their deadline.",
                "reqps",
                (rate("stepweave_refused_total", "reason"), "{{reason}}"),
                (rate("stepweave_deadline_missed_total", "job"), "deadline missed"),
            ),
            graph(
                "Error of predictions",
                "Median seconds by which jobs ended later than predicted (negative: earlier), and "
                "the cost model's error for a single forward.",
                "none",
                (percentile(0.5, "stepweave_eta_error_seconds"), "end of a job, s"),
                (f"max({series('stepweave_cost_model_error_ratio')})", "forward, share"),
                signed=True,
            ),
        ],
        "Process": [
            graph(
                "VRAM by kind",
                "Allocated, reserved and peak of the process; free and total of the device. 0 "
                "without a GPU.",
                "bytes",
                (
                    f"max by (pod, instance, device, kind) ({series('stepweave_vram_bytes')})",
                    "{{kind}} {{pod}} {{device}}",
                ),
            ),
            graph(
                "Resident memory",
                "Main memory of each server process; at the pod's limit it is killed.",
                "bytes",
                (
                    "max by (pod, instance) "
                    f"({series('process_resident_memory_bytes', OF_SERVERS)})",
                    "{{pod}} {{instance}}",
                ),
            ),
            graph(
                "CPU",
                "CPU cores used by each server process.",
                "none",
                (
                    rate("process_cpu_seconds_total", "pod, instance", OF_SERVERS),
                    "{{pod}} {{instance}}",
                ),
            ),
            graph(
                "Seconds of the last start, by stage",
                "Seconds of each stage of a server's start (of a running stage, so far); they add "
                "up to the whole start.",
                "s",
                (
                    f"max by (pod, instance, stage) ({series('stepweave_model_load_seconds')})",
                    "{{stage}} {{pod}} {{instance}}",
                ),
            ),
        ],
        "LoRAs": [
            graph(
                "LoRAs in memory",
                "LoRAs in the memory of each server process.",
                "none",
                (
                    f"max by (pod, instance) ({series('stepweave_loras_loaded')})",
                    "{{pod}} {{instance}}",
                ),
            ),
            graph(
                "Memory of LoRAs",
                "Bytes of the LoRAs in memory of each server process.",
                "bytes",
                (
                    f"max by (pod, instance) ({series('stepweave_lora_bytes')})",
                    "{{pod}} {{instance}}",
                ),
            ),
            graph(
                "LoRAs read and evicted",
                "LoRAs per second that were read, refused because of their file, or left memory "
                "for others; and the share of time in which one was being read.",
                "none",
                (rate("stepweave_lora_loads_total", "result"), "read, {{result}}"),
                (rate("stepweave_lora_evictions_total", "job"), "evicted"),
                (rate("stepweave_lora_load_seconds_total", "job"), "share of time"),
            ),
        ],
        "Storage": [
            graph(
                "Failures of the stores",
                "Failed operations per second of the stores of jobs and image files: full, busy "
                "(locked by another process) or failed.",
                "cps",
                (rate("stepweave_store_failures_total", "store, reason"), "{{store}} {{reason}}"),
            ),
            graph(
                "Free bytes of the stores",
                "Free bytes of the disk with jobs and image files.",
                "bytes",
                (
                    f"min by (pod, instance) ({series('stepweave_store_free_bytes')})",
                    "{{pod}} {{instance}}",
                ),
            ),
            graph(
                "Writable stores",
                "1 if writes to a store work; 0 if its disk is full, read-only or missing, or its "
                "file is locked.",
                "none",
                (
                    f"min by (pod, instance, store) ({series('stepweave_store_writable')})",
                    "{{store}} {{pod}} {{instance}}",
                ),
            ),
        ],
        "Servers": [models()],
    }
    result = (
        build.Dashboard("Stepweave")
        .uid("stepweave")
        .description("Stepweave, a diffusion model server: traffic, latency, batching and memory.")
        .tags(["stepweave"])
        .timezone("browser")
        .time("now-1h", "now")
        .refresh("30s")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .with_variable(
            build.DatasourceVariable("datasource").label("Data source").type("prometheus")
        )
        .with_variable(label_variable("namespace").label("Namespace"))
        .with_variable(label_variable("job", '{namespace=~"$namespace"}').label("Server"))
        .with_variable(
            label_variable("model_name", '{namespace=~"$namespace", job=~"$job"}').label("Model")
        )
        .with_variable(label_variable("pod", f"{{{SELECTED.rpartition(', ')[0]}}}").label("Pod"))
    )
    ids = count(1)
    for title, panels in rows.items():
        result.with_row(build.Row(title).id(next(ids)))
        for panel in panels:
            result.with_panel(panel.id(next(ids)))
    return result.build()


def render() -> str:
    return json.dumps(dashboard(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    FILE.write_text(render())
