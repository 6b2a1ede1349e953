"""Draw the dashboard's panels from the data of a Prometheus: `python -m monitoring.draw`.

Without `--prometheus` it starts a server, a Prometheus that scrapes it, and a load: two clients, a
burst that overflows the queue, clients that disconnect, and invalid requests.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import matplotlib
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from monitoring import dashboard, prometheus
from monitoring.prometheus import Prometheus

ROOT = Path(__file__).parents[1]
POINTS = 240  # per line
COLUMNS = 24  # of Grafana's grid
UNIT = 0.5, 0.36  # inches of a column, and of a row
DPI = 80
COLOURS = 256  # of the file
LEGEND = 8  # entries at most
Sample = dict[str, Any]  # of Prometheus's API: `metric`, and `value` or `values`
KEYS = {
    "alice": "alice-draws-with-this-key",
    "bob": "bob-draws-with-this-key",
    "prometheus": "prometheus-scrapes",
}


@dataclass(frozen=True)
class Span:
    """A time range in Unix seconds, and values of the dashboard's variables, `.*` for others."""

    start: float
    end: float
    variables: Mapping[str, str]

    def expression(self, expr: str) -> str:
        window = f"{max(4, round((self.end - self.start) / 15))}s"

        def value(match: re.Match[str]) -> str:
            return window if match[1] == "__rate_interval" else self.variables.get(match[1], ".*")

        return re.sub(r"\$(\w+)", value, expr)


def formatted(value: float, unit: str) -> str:
    """Format a value approximately as Grafana does."""
    if not math.isfinite(value):
        return "no data" if math.isnan(value) else str(value)
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "bytes":
        power = min(4, int(math.log(abs(value), 1024))) if abs(value) >= 1 else 0
        return f"{value / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
    if unit == "s" and 0 < abs(value) < 1:
        return f"{1000 * value:.3g} ms"
    return f"{value:.3g}" + {"s": " s", "reqps": " req/s", "cps": " /s"}.get(unit, "")


def legend_of(template: str, metric: Mapping[str, str]) -> str:
    return (
        re.sub(r"\{\{(\w+)\}\}", lambda match: metric.get(match[1], ""), template).strip()
        or "(none)"
    )


def draw(source: Prometheus, out: Path, span: Span, rows: Sequence[str] = ()) -> list[str]:
    """Write a PNG of the dashboard, or of some rows; returns the titles of panels without data."""
    panels = json.loads(dashboard.FILE.read_text())["panels"]
    titles = [panel["title"] for panel in panels if panel["type"] == "row"]
    if unknown := set(rows) - set(titles):
        raise SystemExit(
            f"there is no row {', '.join(sorted(unknown))}; choose from {', '.join(titles)}"
        )
    chosen, row = [], ""
    for panel in panels:
        row = panel["title"] if panel["type"] == "row" else row
        if not rows or row in rows:
            chosen.append(panel)
    tops: dict[float, float] = {}  # by position in the dashboard; omitted rows leave no gap
    height = 0.0
    for top in sorted({panel["gridPos"]["y"] for panel in chosen}):
        tops[top] = height
        height += max(panel["gridPos"]["h"] for panel in chosen if panel["gridPos"]["y"] == top)
    figure = plt.figure(figsize=(COLUMNS * UNIT[0], height * UNIT[1]), facecolor="white")
    empty = []
    for panel in chosen:
        grid = panel["gridPos"]
        left, width = grid["x"] / COLUMNS, grid["w"] / COLUMNS
        bottom, tall = 1 - (tops[grid["y"]] + grid["h"]) / height, grid["h"] / height
        if panel["type"] == "row":
            figure.text(
                left + 0.008, bottom + tall / 2, panel["title"], weight="bold", va="center", size=12
            )
            continue
        inches = width * COLUMNS * UNIT[0], tall * height * UNIT[1]
        line = panel["type"] == "timeseries"
        pad = (
            (0.75 if line else 0.1) / inches[0],
            (0.35 if line else 0.05) / inches[1],
            0.12 / inches[0],
            0.3 / inches[1],
        )
        axes = figure.add_axes(
            (
                left + pad[0] * width,
                bottom + pad[1] * tall,
                width * (1 - pad[0] - pad[2]),
                tall * (1 - pad[1] - pad[3]),
            )
        )
        axes.set_title(panel["title"], size=9, loc="left")
        if not {"timeseries": _lines, "stat": _number, "table": _table}[panel["type"]](
            axes, panel, source, span
        ):
            empty.append(panel["title"])
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI)
    plt.close(figure)
    out.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(buffer) as image:
        image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(out, optimize=True)
    return empty


def _ranges(panel: dict[str, Any], source: Prometheus, span: Span) -> Iterator[tuple[str, Sample]]:
    """The series of a panel with their legends."""
    step = max(1, round((span.end - span.start) / POINTS))
    for target in panel["targets"]:
        series = source.get(
            "query_range",
            query=span.expression(target["expr"]),
            start=str(span.start),
            end=str(span.end),
            step=str(step),
        )["result"]
        for sample in series:
            yield legend_of(target["legendFormat"], sample["metric"]), sample


def _lines(axes: Axes, panel: dict[str, Any], source: Prometheus, span: Span) -> bool:
    unit, drawn, highest = panel["fieldConfig"]["defaults"]["unit"], 0, 0.0
    for legend, sample in _ranges(panel, source, span):
        times, values = zip(
            *((at - span.start, float(value)) for at, value in sample["values"]), strict=True
        )
        drawn += 1
        highest = max([highest, *(value for value in values if math.isfinite(value))])
        last = next((value for value in reversed(values) if not math.isnan(value)), math.nan)
        label = f"{legend}: {formatted(last, unit)}" if drawn <= LEGEND else None
        axes.plot(times, values, linewidth=1.2, label=label)
    axes.set_xlim(0, span.end - span.start)
    # as in Grafana, from 0
    if "min" in panel["fieldConfig"]["defaults"]:
        axes.set_ylim(0, 1.08 * highest if highest > 0 else 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: formatted(value, unit)))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} s"))
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    if drawn:
        axes.legend(fontsize=6, loc="best", frameon=True, framealpha=0.7)
    return drawn > 0


def _number(axes: Axes, panel: dict[str, Any], source: Prometheus, span: Span) -> bool:
    defaults = panel["fieldConfig"]["defaults"]
    axes.set_axis_off()
    for _, sample in _ranges(panel, source, span):
        values = [float(value) for _, value in sample["values"]]
        last = next((value for value in reversed(values) if not math.isnan(value)), math.nan)
        steps = defaults["thresholds"]["steps"]
        colour = [
            step["color"] for step in steps if step["value"] is None or last >= step["value"]
        ] or ["text"]
        background = axes.inset_axes((0, 0, 1, 0.5))
        background.fill_between(range(len(values)), values, alpha=0.2)
        background.set_axis_off()
        axes.text(
            0.5,
            0.55,
            formatted(last, defaults["unit"]),
            size=18,
            ha="center",
            va="center",
            transform=axes.transAxes,
            color={"text": "black"}.get(colour[-1], colour[-1]),
        )
        return True
    return False


def _table(axes: Axes, panel: dict[str, Any], source: Prometheus, span: Span) -> bool:
    axes.set_axis_off()
    (target,) = panel["targets"]
    samples = source.get("query", query=span.expression(target["expr"]), time=str(span.end))[
        "result"
    ]
    if not samples:
        return False
    columns = sorted({label for sample in samples for label in sample["metric"]})
    cells = [[sample["metric"].get(label, "") for label in columns] for sample in samples]
    table = axes.table(cells, colLabels=columns, loc="upper center", cellLoc="left")
    table.auto_set_font_size(False)
    table.set_fontsize(7)
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[int]:
    """Run a server of the embedded model with a small queue; yields its port before it is ready."""
    clients = folder / "clients"
    clients.write_text("".join(f"{name}: {key}\n" for name, key in KEYS.items()))
    port, log = free_port(), folder / "server.log"
    settings = {
        "STEPWEAVE_API_KEYS_FILE": str(clients),
        "STEPWEAVE_MAX_QUEUE": "8",
        "STEPWEAVE_STATE_DIR": str(folder / "state"),
        "BENTOML_DO_NOT_TRACK": "True",
        "OMP_WAIT_POLICY": "passive",
    }
    others = {
        name: value for name, value in os.environ.items() if not name.startswith("STEPWEAVE_")
    }
    command = [
        sys.executable,
        "-m",
        "bentoml",
        "serve",
        "service.py",
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=others | settings, stdout=output, stderr=output
        )
    try:
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(prometheus.SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def load(url: str, seconds: float) -> None:
    """Send the server requests for a while: a few at a time, then a burst, then a few again."""
    end = time.monotonic() + seconds
    begun = time.monotonic()

    def generate(number: int, client: str, **fields: Any) -> None:
        body = {
            "prompt": f"a large red circle on a blue background, {number % 7}",
            "seed": number,
            **fields,
        }
        with contextlib.suppress(httpx.ReadTimeout):  # a client that disconnects
            httpx.post(
                f"{url}/v1/images/generations",
                json=body,
                headers={"Authorization": f"Bearer {KEYS[client]}"},
                timeout=httpx.Timeout(
                    prometheus.SECONDS, read=1 if number % 9 == 8 else prometheus.SECONDS
                ),
                trust_env=False,
            )

    def visit(worker: int) -> None:
        number = worker
        while time.monotonic() < end:
            share = (time.monotonic() - begun) / seconds
            if worker < (16 if 0.4 < share < 0.6 else 3):
                fields: dict[str, Any] = {"num_inference_steps": 10 + 10 * (number % 4)}
                if number % 9 == 8:
                    fields = {"num_inference_steps": 200, "size": "256x256"}
                if number % 13 == 12:
                    fields["size"] = "65x65"  # invalid
                generate(number, "alice" if worker % 3 else "bob", **fields)
            time.sleep(0.3)
            number += 16

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(visit, range(16)))


def draw_own(out: Path, seconds: float, rows: Sequence[str]) -> list[str]:
    """Start server and Prometheus, send load for some seconds, and draw the whole time."""
    program = prometheus.binaries()["prometheus"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.time()
        with serve(folder) as port:
            scrape = {
                "job_name": "stepweave",
                "authorization": {"credentials": KEYS["prometheus"]},
                "static_configs": [{"targets": [f"127.0.0.1:{port}"]}],
            }
            with prometheus.run(program, folder, free_port(), [scrape]) as source:
                source.wait_for("stepweave_ready == 1")
                load(f"http://127.0.0.1:{port}", seconds)
                time.sleep(2)  # the last scrape
                return draw(source, out, Span(started, time.time(), {}), rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prometheus", metavar="URL", help="draw the data of this Prometheus; start nothing"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=60,
        help="with --prometheus: minutes until now to draw (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=60,
        help="without --prometheus: duration of the load (default: %(default)s)",
    )
    parser.add_argument(
        "--rows",
        type=lambda text: text.split(","),
        default=[],
        help="comma-separated titles of rows to draw (default: all)",
    )
    parser.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="with --prometheus: value of a variable of the dashboard; repeatable",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "build" / "dashboard.png",
        help="file to write (default: build/dashboard.png)",
    )
    options = parser.parse_args()
    if options.prometheus:
        now = time.time()
        variables = dict(text.split("=", 1) for text in options.set)
        span = Span(now - 60 * options.minutes, now, variables)
        empty = draw(Prometheus(options.prometheus), options.out, span, options.rows)
    else:
        empty = draw_own(options.out, options.seconds, options.rows)
    print(
        f"{options.out}: {options.out.stat().st_size} bytes; panels without data: "
        f"{', '.join(empty) or 'none'}"
    )


if __name__ == "__main__":
    main()
