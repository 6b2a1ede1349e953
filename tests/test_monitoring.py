"""monitoring/: checked by the kinds' schemas, by promtool and by a Prometheus that scrapes the real server."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import promql_parser as promql
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from PIL import Image

from monitoring import dashboard
from stepweave.telemetry.metrics import Metrics
from tests.conftest import ROOT, Served, free_port
from tests.schemas import validate_custom
from tests.waiting import SECONDS

MONITORING = ROOT / "monitoring"
WINDOW = "2m"  # what Grafana's $__rate_interval stands for here
LABELS = {"namespace": "art", "pod": "stepweave-0"}  # what the PodMonitor adds in a cluster


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((MONITORING / name).read_text()))


def rule_groups() -> dict[str, Any]:
    """The PrometheusRule's spec: a rules file."""
    (rule,) = documents("prometheusrule.yaml")
    spec: dict[str, Any] = rule["spec"]
    return spec


ALERTS = {rule["alert"]: rule for group in rule_groups()["groups"] for rule in group["rules"]}
PANELS = [panel for panel in json.loads(dashboard.FILE.read_text())["panels"] if panel["type"] != "row"]
QUERIES = {
    f"{panel['title']} {target['refId']}": re.sub(
        r"\$(\w+)", lambda match: {"__rate_interval": WINDOW}.get(match[1], ".*"), target["expr"]
    )
    for panel in PANELS
    for target in panel["targets"]
}


def test_the_dashboard_is_what_its_code_makes() -> None:
    assert dashboard.FILE.read_text() == dashboard.render(), "run: python monitoring/dashboard.py"


def test_grafana_knows_every_field_of_the_dashboard() -> None:
    register_default_plugins()
    written = json.loads(dashboard.FILE.read_text())
    assert json.loads(json.dumps(Dashboard.from_json(written), cls=JSONEncoder)) == written


def test_every_panel_is_explained_and_reads_the_chosen_source() -> None:
    for panel in PANELS:
        assert panel["title"] and panel["description"].endswith("."), panel
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
        for target in panel["targets"]:
            assert target["expr"].count("{") == target["expr"].count(dashboard.SELECTED), target
    cells = [
        (x, y)
        for grid in (panel["gridPos"] for panel in PANELS)
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(cells) == len(set(cells)), "panels overlap"
    assert max(x for x, _ in cells) < 24


def test_every_alert_is_explained() -> None:
    for name, alert in ALERTS.items():
        assert name.startswith("Stepweave")
        assert alert["for"], name
        assert alert["labels"]["severity"] in {"critical", "warning"}, name
        assert all(alert["annotations"][text].endswith(".") for text in ("summary", "description")), name


def selectors(node: promql.Expr | None) -> Iterator[promql.VectorSelector]:
    """The vector selectors within an expression."""
    match node:
        case promql.VectorSelector():
            yield node
        case promql.MatrixSelector():
            yield node.vector_selector
        case promql.BinaryExpr():
            yield from selectors(node.lhs)
            yield from selectors(node.rhs)
        case promql.Call():
            for argument in node.args:
                yield from selectors(argument)
        case promql.AggregateExpr() | promql.ParenExpr() | promql.UnaryExpr() | promql.SubqueryExpr():
            yield from selectors(node.expr)
        case promql.NumberLiteral() | promql.StringLiteral():
            pass
        case _:
            raise AssertionError(f"unexpected {node!r}")


@pytest.mark.parametrize("expr", [*QUERIES.values(), *(alert["expr"] for alert in ALERTS.values())])
def test_every_expression_reads_metrics_that_the_server_has(expr: str) -> None:
    names = {selector.name for selector in selectors(promql.parse(expr))}
    exposition = Metrics(in_flight=lambda: 0, waiting=lambda: 0).render().decode()
    # those by module have no samples without an engine
    known = set(re.findall(r"^(?:# TYPE )?(\w+)[{ ]", exposition, re.MULTILINE)) | {"up"}
    histograms = re.findall(r"^# TYPE (\w+) histogram", exposition, re.MULTILINE)
    known |= {f"{name}_{part}" for name in histograms for part in ("bucket", "sum", "count")}
    assert names
    assert names <= known


@pytest.mark.parametrize("name", ["podmonitor.yaml", "prometheusrule.yaml"])
def test_the_manifests_fit_the_operators_schemas(name: str) -> None:
    for document in documents(name):
        validate_custom(document)


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """What Kubernetes's label selector says of a pod's labels."""
    test: dict[str, Callable[[str, list[str]], bool]] = {
        "In": lambda key, values: labels.get(key) in values,
        "NotIn": lambda key, values: labels.get(key) not in values,
        "Exists": lambda key, _: key in labels,
        "DoesNotExist": lambda key, _: key not in labels,
    }
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        test[rule["operator"]](rule["key"], rule.get("values", [])) for rule in selector.get("matchExpressions", [])
    )


def test_one_pod_monitor_selects_each_kind_of_pod() -> None:
    monitors = {monitor["metadata"]["name"]: monitor["spec"] for monitor in documents("podmonitor.yaml")}
    own = {"app.kubernetes.io/name": "stepweave", "pod-template-hash": "5f7"}
    kserve = {
        "app": "isvc.shapes-predictor",
        "component": "predictor",
        "serving.kserve.io/inferenceservice": "shapes",
    }
    for labels, expected in (
        (own, ["stepweave"]),
        (kserve, ["stepweave-kserve"]),
        (own | kserve, ["stepweave-kserve"]),
    ):
        assert [name for name, spec in monitors.items() if selects(spec["selector"], labels)] == expected
    assert not any(selects(spec["selector"], {"app": "other"}) for spec in monitors.values())
    for spec in monitors.values():
        assert spec["podMetricsEndpoints"][0]["port"] == "http"
        assert all(endpoint["path"] == "/metrics" for endpoint in spec["podMetricsEndpoints"])


def test_kserves_pods_are_told_from_others_by_their_image_and_name_their_job() -> None:
    _, kserve = documents("podmonitor.yaml")
    (job,) = re.findall(r'job=~"([^"]+)"', ALERTS["StepweaveNotReady"]["expr"])
    for endpoint in kserve["spec"]["podMetricsEndpoints"]:
        keep, name = endpoint["relabelings"]
        for image in ("stepweave:0.2", "registry.example/team/stepweave@sha256:0a", "stepweave-cuda"):
            assert re.fullmatch(keep["regex"], image)
        assert not re.fullmatch(keep["regex"], "kserve/sklearnserver:v0.20")
        assert re.fullmatch(job, name["replacement"].replace("$1", "shapes"))
    assert re.fullmatch(job, "stepweave")


def test_no_alert_is_about_a_pod_that_drains_within_its_grace() -> None:
    patience = re.findall(r"max_over_time\(stepweave_ready\[(\d+)m\]\)", ALERTS["StepweaveNoneReady"]["expr"])
    longest = max(
        int(seconds)
        for path in (ROOT / "k8s").rglob("*.yaml")
        for seconds in re.findall(r"terminationGracePeriodSeconds: (\d+)", path.read_text())
    )
    assert [int(minutes) * 60 >= longest for minutes in patience] == [True]
    assert int(ALERTS["StepweaveNotReady"]["for"].removesuffix("m")) * 60 > longest


def test_kustomize_takes_the_folder() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("KUSTOMIZATION NOT BUILT: there is no kubectl")
    built = subprocess.run(
        ["kubectl", "kustomize", MONITORING], capture_output=True, text=True, check=True, timeout=SECONDS
    )
    kinds = {document["kind"]: document for document in yaml.safe_load_all(built.stdout)}
    assert set(kinds) == {"ConfigMap", "PodMonitor", "PrometheusRule"}
    assert kinds["ConfigMap"]["data"] == {"stepweave.json": dashboard.FILE.read_text()}


@pytest.fixture(scope="session")
def binaries() -> dict[str, str]:
    """Paths of `prometheus` and `promtool`: those of the machine, else Debian's."""
    found = {name: shutil.which(name) for name in ("prometheus", "promtool")}
    if not all(found.values()):
        script = subprocess.run([MONITORING / "install-prometheus"], capture_output=True, text=True, timeout=SECONDS)
        if script.returncode:
            pytest.skip(f"NOT CHECKED WITH PROMETHEUS: it cannot be had here: {script.stderr.strip()}")
        found = {name: str(Path(script.stdout.strip()) / name) for name in found}
    return {name: path for name, path in found.items() if path}


def promtool(binaries: dict[str, str], *arguments: str | Path, stdin: bytes | None = None) -> None:
    command = [binaries["promtool"], *map(str, arguments)]
    ended = subprocess.run(command, input=stdin, capture_output=True, timeout=SECONDS)
    assert ended.returncode == 0, (ended.stdout + ended.stderr).decode()


def test_promtool_takes_the_rules_and_each_alert_fires_when_it_should(binaries: dict[str, str], tmp_path: Path) -> None:
    rules = tmp_path / "alerts.yaml"
    rules.write_text(yaml.safe_dump(rule_groups()))
    promtool(binaries, "check", "rules", rules)
    tests = shutil.copy(MONITORING / "alerts.test.yaml", tmp_path)
    promtool(binaries, "test", "rules", tests)
    cases = [
        case for test in yaml.safe_load(Path(tests).read_text())["tests"] for case in test.get("alert_rule_test", [])
    ]
    for fires in (True, False):
        assert {case["alertname"] for case in cases if ("exp_alerts" in case) == fires} == set(ALERTS)


def test_promtool_takes_the_servers_metrics(binaries: dict[str, str], served: Served) -> None:
    promtool(binaries, "check", "metrics", stdin=httpx.get(f"{served.url}/metrics", timeout=SECONDS).content)


@dataclass
class Prometheus:
    """A running Prometheus."""

    url: str

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an answer of its API; an expression that it cannot parse is an error."""
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=SECONDS).json()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    def values(self, expr: str) -> list[float]:
        """The current values of an expression."""
        return [float(sample["value"][1]) for sample in self.get("query", query=expr)["result"]]

    def wait_for(self, expr: str) -> None:
        """Wait until an expression has a result."""
        deadline = time.monotonic() + SECONDS
        while not self.values(expr):
            assert time.monotonic() < deadline, f"still empty: {expr}"
            time.sleep(0.25)


@pytest.fixture
def prometheus(binaries: dict[str, str], served: Served, tmp_path: Path) -> Iterator[Prometheus]:
    """Prometheus with the alerts, scraping the real server each second."""
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(rule_groups()))
    target = {"targets": [f"127.0.0.1:{served.port}"], "labels": LABELS}
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": ["alerts.yaml"],
        "scrape_configs": [{"job_name": "stepweave", "static_configs": [target]}],
    }
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    address, log = f"127.0.0.1:{free_port()}", tmp_path / "prometheus.log"
    command = [
        binaries["prometheus"],
        f"--config.file={tmp_path / 'prometheus.yaml'}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address={address}",
        "--log.level=warn",
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | {"GOMAXPROCS": "1"})
    try:
        deadline = time.monotonic() + SECONDS
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://{address}/-/ready", timeout=SECONDS).status_code == 200:
                    break
            time.sleep(0.1)
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def draw(served: Served, timeout: float | httpx.Timeout = SECONDS, **fields: Any) -> int:
    body = {"prompt": "a small blue star", "num_inference_steps": 2, **fields}
    return httpx.post(f"{served.url}/v1/images/generations", json=body, timeout=timeout).status_code


def test_every_query_has_data_when_prometheus_scrapes_the_real_server(prometheus: Prometheus, served: Served) -> None:
    prometheus.wait_for(f"rate(stepweave_request_seconds_count[{WINDOW}])")  # two scrapes
    for title, expr in QUERIES.items():
        assert prometheus.values(expr), f"no data before the first request: {title}: {expr}"

    with ThreadPoolExecutor(3) as pool:
        # prompts that were never encoded before, so that the encoders run, too
        assert list(pool.map(lambda seed: draw(served, seed=seed, prompt=f"a ring, {seed}"), range(6))) == [200] * 6
    assert draw(served, size="65x65") == 400
    picture = io.BytesIO()  # an edit, for the forwards that only edits have
    Image.new("RGB", (64, 64)).save(picture, "PNG")
    fields, image = {"prompt": "a small blue star", "num_inference_steps": "2"}, {"image": picture.getvalue()}
    assert httpx.post(f"{served.url}/v1/images/edits", data=fields, files=image, timeout=SECONDS).status_code == 200
    with pytest.raises(httpx.ReadTimeout):  # a client that leaves
        draw(served, timeout=httpx.Timeout(SECONDS, read=0.5), num_inference_steps=200, size="256x256")
    for outcome in ("succeeded", "invalid", "cancelled"):
        prometheus.wait_for(f'rate(stepweave_requests_total{{outcome="{outcome}"}}[{WINDOW}]) > 0')
    prometheus.wait_for(f"rate(stepweave_steps_saved_total[{WINDOW}]) > 0")
    assert prometheus.values("stepweave_ready") == [1]

    for title, expr in QUERIES.items():
        values = prometheus.values(expr)
        assert values, f"no data: {title}: {expr}"
        assert all(map(math.isfinite, values)), f"not a number: {title}: {expr}"

    # a comparison keeps only the samples that alert: what it compares must exist while all is well
    compared = 0
    for name, alert in ALERTS.items():
        assert prometheus.values(alert["expr"]) == [], name
        expr = promql.parse(alert["expr"])
        if isinstance(expr, promql.BinaryExpr) and str(expr.op) == ">":
            compared += 1
            assert prometheus.values(expr.lhs.prettify()), f"nothing to compare: {name}"
    assert compared == len(ALERTS) - 2  # the others ask for what is absent

    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"]: rule["health"] for rule in rules} == dict.fromkeys(ALERTS, "ok")
    for variable in ("namespace", "job", "pod"):
        found = prometheus.get(f"label/{variable}/values", **{"match[]": "stepweave_requests_in_flight"})
        assert found == [{"job": "stepweave", **LABELS}[variable]]
