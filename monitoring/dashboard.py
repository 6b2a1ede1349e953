"""The Grafana dashboard as code. `python monitoring/dashboard.py` writes
`monitoring/dashboard.json`.

Every query has a result where there is no traffic, no GPU or no ready server (percentiles of
nothing are not a number): an empty panel means that nothing is scraped, not that nothing happens.
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
OF_SERVERS = 'model_name!=""'  # of metrics that other programs expose, too
WINDOW = "$__rate_interval"


def series(metric: str, *matchers: str) -> str:
    """A selector of `metric` within what the dashboard's variables select."""
    return f"{metric}{{{', '.join([*matchers, SELECTED])}}}"


def share(part: str, whole: str) -> str:
    """The share of `part` in `whole`, two matchers of `outcome`; 0 without traffic."""
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
    """Of what a module's forwards had; 0 without any."""
    return ratio(rate(f"{metric}_sum", "module"), rate(f"{metric}_count", "module"))


def vram(kinds: str) -> str:
    """Bytes of the kinds that `kinds`, a regular expression, matches, on each device."""
    matcher = f'kind=~"{kinds}"'
    return f"sum without (kind) ({series('stepweave_vram_bytes', matcher)})"


def rate(metric: str, by: str, *matchers: str) -> str:
    return f"sum by ({by}) (rate({series(metric, *matchers)}[{WINDOW}]))"


def ratio(part: str, whole: str) -> str:
    """0 while nothing happens."""
    return f"{part} / clamp_min({whole}, 1e-9)"


READY = series("stepweave_ready")
REFUSED_SHARE = share('outcome=~"refused|unavailable"', 'outcome!="invalid"')
FAILED_SHARE = share('outcome="failed"', 'outcome=~"succeeded|failed"')
# memory that torch has reserved and not allocated is free for the next image
VRAM_SHARE = (
    f"({vram('total|allocated')} - {vram('free|reserved')}) / clamp_min({vram('total')}, 1)"
)


def query(expr: str, legend: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().datasource(SOURCE).expr(expr).legend_format(legend).range()


def number(
    title: str, description: str, unit: str, expr: str, *steps: tuple[float | None, str]
) -> stat.Panel:
    """One number, now; each of `steps` is a lower bound and the colour from there on."""
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
    """Lines over time; each of `queries` is an expression and its legend. Only a `signed` one has
    room below 0."""
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
            "What each server has loaded; a row without a model is a server that has none yet."
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
    """A variable of the values of `label`; "All" also matches servers that lack it, such as those
    outside Kubernetes."""
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
                "Servers that take work.",
                "none",
                f"sum({READY}) or vector(0)",
                (None, "red"),
                (1, "green"),
            ).span(4),
            number(
                "Requests in flight",
                "Requests for images accepted and not yet answered, running or waiting.",
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
                "Nineteen of twenty requests were done within this time, waiting included.",
                "s",
                percentile(0.95),
            ).span(5),
            number(
                "VRAM in use",
                "Of the fullest GPU, what the next image cannot have; 0 without a GPU.",
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
                "Accepted requests that the engine has started, and those that it has not. A queue "
                "that stays calls for replicas.",
                "none",
                (f"sum({series('stepweave_requests_running')})", "running"),
                (f"sum({series('stepweave_requests_waiting')})", "waiting"),
            ),
            graph(
                "Rate by outcome",
                "Requests for images per second, by what they were answered with.",
                "reqps",
                (outcome_rate, "{{outcome}}"),
            ),
            graph(
                "Requests by client",
                "Requests for images per second, by the name of the API key; those without a valid "
                "key have no name.",
                "reqps",
                (rate("stepweave_requests_total", "client"), "{{client}}"),
            ),
            graph(
                "Refused and failed",
                "Refused: of valid requests, answered with 429 or 503. Failed: of those that ran.",
                "percentunit",
                (REFUSED_SHARE, "refused"),
                (FAILED_SHARE, "failed"),
            ),
            graph(
                "Latency percentiles",
                "From acceptance to finished image files, waiting included; of requests that "
                "succeeded.",
                "s",
                *((percentile(q), f"p{q * 100:.0f}") for q in (0.5, 0.95, 0.99)),
            ),
            graph(
                "Readiness",
                "1 while a server takes work; 0 while it loads, drains before its end, or is "
                "stuck.",
                "none",
                (f"max by (pod, instance) ({READY})", "{{pod}} {{instance}}"),
            ),
            graph(
                "Steps saved",
                "Denoising steps per second that were not run since their job was cancelled, its "
                "client had left, or its deadline had passed.",
                "cps",
                (rate("stepweave_steps_saved_total", "job"), "{{job}}"),
            ),
        ],
        "Engine": [
            graph(
                "Rows per forward",
                "Mean rows of a module's forwards: how well steps are batched. Guidance takes two "
                "rows an image.",
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
                "Share of a module's calls that ran together with others; 0 where jobs run alone.",
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
                "Kinds of calls that may share forwards (certified), run alone so far (pending) or "
                "for good (failed).",
                "none",
                (f"sum by (state) ({series('stepweave_certificates')})", "{{state}}"),
            ),
            graph(
                "Prompt cache hits",
                "Share of prompts whose encoding was remembered.",
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
                "What the engine survived per second: shared forwards run again alone, forwards "
                "that ran out of memory, calls run some rows at a time for want of it, and errors; "
                "and jobs that failed for want of memory.",
                "cps",
                (rate("stepweave_engine_recoveries_total", "reason"), "{{reason}}"),
                (
                    rate("stepweave_out_of_memory_failures_total", "job"),
                    "failed for want of memory",
                ),
            ),
            graph(
                "Images by result",
                "Images per second: ok; of one colour throughout; flagged by the pipeline's safety "
                "checker; NaN or infinite, whose requests failed.",
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
                "Predicted seconds of work accepted and not yet done: what a low-priority request "
                "that comes now would wait.",
                "s",
                (
                    f"max by (pod, instance) ({series('stepweave_backlog_seconds')})",
                    "{{pod}} {{instance}}",
                ),
            ),
            graph(
                "Wait for the first forward",
                "From a job's acceptance to its first forward; of jobs that succeeded.",
                "s",
                *(
                    (percentile(q, "stepweave_queue_duration_seconds"), f"p{q * 100:.0f}")
                    for q in (0.5, 0.95, 0.99)
                ),
            ),
            graph(
                "Seconds of a step",
                "Median of a module's forwards with what follows each, until all its jobs wait "
                "again.",
                "s",
                (percentile(0.5, "stepweave_step_duration_seconds", "module"), "{{module}}"),
            ),
            graph(
                "Rows of a batch, and fill",
                "Mean rows of a forward, and as a share of those that it was allowed: the knee "
                "beyond which more do not pay, or what fits into memory.",
                "none",
                (mean("stepweave_batch_rows"), "rows of {{module}}"),
                (mean("stepweave_batch_fill_ratio"), "fill of {{module}}"),
            ),
            graph(
                "Refused by reason",
                "Requests per second that admission did not let in: no place, too long a wait, a "
                "deadline that cannot be met, too little memory; and jobs that were let in and "
                "missed their deadline.",
                "reqps",
                (rate("stepweave_refused_total", "reason"), "{{reason}}"),
                (rate("stepweave_deadline_missed_total", "job"), "deadline missed"),
            ),
            graph(
                "Error of predictions",
                "Median seconds by which jobs ended later than foretold (below 0: earlier), and "
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
                "Allocated, reserved and peak are the process's own; free and total the device's. "
                "0 without a GPU.",
                "bytes",
                (
                    f"max by (pod, instance, device, kind) ({series('stepweave_vram_bytes')})",
                    "{{kind}} {{pod}} {{device}}",
                ),
            ),
            graph(
                "Resident memory",
                "Main memory of each server process; one that only grows will be killed at the "
                "pod's limit.",
                "bytes",
                (
                    "max by (pod, instance) "
                    f"({series('process_resident_memory_bytes', OF_SERVERS)})",
                    "{{pod}} {{instance}}",
                ),
            ),
            graph(
                "CPU",
                "CPU cores that each server process keeps busy.",
                "none",
                (
                    rate("process_cpu_seconds_total", "pod, instance", OF_SERVERS),
                    "{{pod}} {{instance}}",
                ),
            ),
            graph(
                "Seconds of the last start, by stage",
                "What each server's start took, of the running stage so far; the stages add up to "
                "the whole.",
                "s",
                (
                    f"max by (pod, instance, stage) ({series('stepweave_model_load_seconds')})",
                    "{{stage}} {{pod}} {{instance}}",
                ),
            ),
        ],
        "Storage": [
            graph(
                "Failures of the stores",
                "Calls per second that failed, of the stores of jobs and of image files: full, "
                "busy (another process has it locked) or failed otherwise.",
                "cps",
                (rate("stepweave_store_failures_total", "store, reason"), "{{store}} {{reason}}"),
            ),
            graph(
                "Free bytes of the stores",
                "Room that is left where jobs and image files are stored.",
                "bytes",
                (
                    f"min by (pod, instance) ({series('stepweave_store_free_bytes')})",
                    "{{pod}} {{instance}}",
                ),
            ),
            graph(
                "Writable stores",
                "1 while writes to a store work; 0 while its disk is full, read-only or gone, or "
                "its file is locked.",
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
