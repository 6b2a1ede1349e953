"""monitoring/: checked by the kinds' schemas, by promtool and by a Prometheus that scrapes the real
server."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
from prometheus_client.parser import text_string_to_metric_families

from monitoring import dashboard
from monitoring import prometheus as local
from monitoring.draw import Span
from monitoring.draw import draw as draw_panels
from monitoring.prometheus import NoPrometheusError, Prometheus
from stepweave.telemetry.metrics import Metrics
from stepweave.telemetry.stages import STAGES, StageTimes, enter_stage
from tests.support.custom_resources import validate_custom
from tests.support.environment import ROOT, free_port
from tests.support.served import Served
from tests.support.waiting import SECONDS

MONITORING = ROOT / "monitoring"
WINDOW = "2m"  # what Grafana's $__rate_interval stands for here
LABELS = {"namespace": "art", "pod": "stepweave-0"}  # what the PodMonitor adds in a cluster
# in a cluster, and outside of one
JOBS: dict[str, dict[str, str]] = {"stepweave-shapes": LABELS, "stepweave": {}}
OF_SERVERS = re.compile("(process|python)_.*")  # other programs expose them, too


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((MONITORING / name).read_text()))


def rule_groups() -> dict[str, Any]:
    """The PrometheusRule's spec: a rules file."""
    (rule,) = documents("prometheusrule.yaml")
    spec: dict[str, Any] = rule["spec"]
    return spec


ALERTS = {rule["alert"]: rule for group in rule_groups()["groups"] for rule in group["rules"]}
PANELS = [
    panel for panel in json.loads(dashboard.FILE.read_text())["panels"] if panel["type"] != "row"
]
VARIABLES = {
    "model_name": "shapes",
    "namespace": "art",
    "job": "stepweave-shapes",
    "pod": "stepweave-0",
}


def queries(chosen: dict[str, str] = {}) -> dict[str, str]:  # noqa: B006
    """The dashboard's expressions, with some of its variables chosen and "All" of the others."""
    values = {"__rate_interval": WINDOW, **dict.fromkeys(VARIABLES, ".*"), **chosen}
    return {
        f"{panel['title']} {target['refId']}": re.sub(
            r"\$(\w+)", lambda match: values[match[1]], target["expr"]
        )
        for panel in PANELS
        for target in panel["targets"]
    }


QUERIES = queries()


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
        assert all(
            alert["annotations"][text].endswith(".") for text in ("summary", "description")
        ), name


def test_the_variables_are_those_that_every_query_filters_by() -> None:
    written = json.loads(dashboard.FILE.read_text())["templating"]["list"]
    assert [one["name"] for one in written] == [
        "datasource",
        "namespace",
        "job",
        "model_name",
        "pod",
    ]
    for one in written[1:]:
        assert one["allValue"] == ".*", "a server without the label would be left out"
        assert one["current"]["value"] == "$__all"
        for panel in PANELS:
            for target in panel["targets"]:
                assert f'{one["name"]}=~"${one["name"]}"' in target["expr"]


def test_what_other_programs_expose_too_is_asked_of_servers_only() -> None:
    for title, expr in QUERIES.items():
        for selector in selectors(promql.parse(expr)):
            if OF_SERVERS.fullmatch(selector.name or ""):
                assert 'model_name!=""' in selector.prettify(), title


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
        case (
            promql.AggregateExpr() | promql.ParenExpr() | promql.UnaryExpr() | promql.SubqueryExpr()
        ):
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
        test[rule["operator"]](rule["key"], rule.get("values", []))
        for rule in selector.get("matchExpressions", [])
    )


def test_one_pod_monitor_selects_each_kind_of_pod() -> None:
    monitors = {
        monitor["metadata"]["name"]: monitor["spec"] for monitor in documents("podmonitor.yaml")
    }
    own = {"app.kubernetes.io/name": "stepweave", "pod-template-hash": "5f7"}
    kserve = {
        "app": "isvc.shapes-predictor",
        "component": "predictor",
        "serving.kserve.io/inferenceservice": "shapes",
        **runtime_labels(),
    }
    # an InferenceService's own labels go over its runtime's
    usual = {
        f"app.kubernetes.io/{name}": "shop"
        for name in ("name", "instance", "part-of", "component", "managed-by")
    } | {"app.kubernetes.io/version": "1"}
    for labels, expected in (
        (own, ["stepweave"]),
        (kserve, ["stepweave-kserve"]),
        (own | kserve, ["stepweave-kserve"]),
        (kserve | usual, ["stepweave-kserve"]),
    ):
        assert [
            name for name, spec in monitors.items() if selects(spec["selector"], labels)
        ] == expected
    sklearn = {"component": "predictor", "serving.kserve.io/inferenceservice": "iris"}
    for other in ({"app": "other"}, sklearn):
        assert not any(selects(spec["selector"], other) for spec in monitors.values())
    for spec in monitors.values():
        assert spec["namespaceSelector"] == {"any": True}, (
            "pods of other namespaces would not be scraped"
        )
        assert spec["podMetricsEndpoints"][0]["port"] == "http"
        assert all(endpoint["path"] == "/metrics" for endpoint in spec["podMetricsEndpoints"])


def runtime_labels() -> dict[str, str]:
    """The labels that KServe puts on the pods of our runtime."""
    runtime = yaml.safe_load((ROOT / "k8s/kserve/clusterservingruntime.yaml").read_text())
    labels: dict[str, str] = runtime["spec"]["labels"]
    return labels


def test_pods_are_scraped_whatever_their_image_and_the_alerts_know_each_workload() -> None:
    (job,) = re.findall(r'job=~"([^"]+)"', ALERTS["StepweaveNotReady"]["expr"])
    assert re.fullmatch(job, "stepweave")
    for monitor in documents("podmonitor.yaml"):
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            (name,) = endpoint["relabelings"]  # that neither keeps nor drops
            assert name["action"] == "replace" and name["targetLabel"] == "job"
            assert re.fullmatch(job, name["replacement"].replace("$1", "shapes"))


def test_no_alert_is_about_a_pod_that_drains_within_its_grace() -> None:
    patience = re.findall(
        r"max_over_time\(stepweave_ready\[(\d+)m\]\)", ALERTS["StepweaveNoneReady"]["expr"]
    )
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
        ["kubectl", "kustomize", MONITORING],
        capture_output=True,
        text=True,
        check=True,
        timeout=SECONDS,
    )
    kinds = {document["kind"]: document for document in yaml.safe_load_all(built.stdout)}
    assert set(kinds) == {"ConfigMap", "PodMonitor", "PrometheusRule"}
    assert kinds["ConfigMap"]["data"] == {"stepweave.json": dashboard.FILE.read_text()}


@pytest.fixture(scope="session")
def binaries() -> dict[str, str]:
    """Paths of `prometheus` and `promtool`: those of the machine, else Debian's."""
    try:
        return local.binaries()
    except NoPrometheusError as error:
        pytest.skip(f"NOT CHECKED WITH PROMETHEUS: it is not available here: {error}")


def test_every_alert_is_of_a_namespace_and_a_job() -> None:
    """Alertmanager routes by them, and a sum over several hides what one of them suffers."""
    for name, alert in ALERTS.items():
        kept = set(re.findall(r"\b(?:by|on) \(([^)]*)\)", alert["expr"]))
        assert {"namespace", "job"} <= alert["labels"].keys() or all(
            labels.startswith("namespace, job") for labels in kept
        ), name
    tests = yaml.safe_load((MONITORING / "alerts.test.yaml").read_text())["tests"]
    namespaces: dict[str, set[str]] = {name: set() for name in ALERTS}
    for test in tests:
        seen = set(
            re.findall(r'namespace="(\w+)"', json.dumps(test["input_series"]).replace("\\", ""))
        )
        for case in test.get("alert_rule_test", []):
            for fired in case.get("exp_alerts", []):
                assert "job" in fired["exp_labels"], case
                if len(seen) > 1:  # the others' servers are well
                    namespaces[case["alertname"]] |= {fired["exp_labels"]["namespace"]}
    assert all(namespaces.values()), namespaces


def promtool(binaries: dict[str, str], *arguments: str | Path, stdin: bytes | None = None) -> None:
    command = [binaries["promtool"], *map(str, arguments)]
    ended = subprocess.run(command, input=stdin, capture_output=True, timeout=SECONDS)
    assert ended.returncode == 0, (ended.stdout + ended.stderr).decode()


def test_promtool_takes_the_rules_and_each_alert_fires_when_it_should(
    binaries: dict[str, str], tmp_path: Path
) -> None:
    rules = tmp_path / "alerts.yaml"
    rules.write_text(yaml.safe_dump(rule_groups()))
    promtool(binaries, "check", "rules", rules)
    tests = shutil.copy(MONITORING / "alerts.test.yaml", tmp_path)
    promtool(binaries, "test", "rules", tests)
    cases = [
        case
        for test in yaml.safe_load(Path(tests).read_text())["tests"]
        for case in test.get("alert_rule_test", [])
    ]
    for fires in (True, False):
        assert {case["alertname"] for case in cases if ("exp_alerts" in case) == fires} == set(
            ALERTS
        )


def test_promtool_takes_the_configuration_of_compose(binaries: dict[str, str]) -> None:
    promtool(binaries, "check", "config", MONITORING / "compose" / "prometheus.yaml")


def test_promtool_takes_the_servers_metrics(binaries: dict[str, str], served: Served) -> None:
    for exposition in (
        httpx.get(f"{served.url}/metrics", timeout=SECONDS).content,
        Metrics(lambda: 0, lambda: 0, "shapes").render(),  # of a server that has loaded nothing yet
    ):
        promtool(binaries, "check", "metrics", stdin=exposition)


def test_every_series_names_the_model_and_no_metric_is_exposed_twice(served: Served) -> None:
    exposition = httpx.get(f"{served.url}/metrics", timeout=SECONDS).text
    families = list(text_string_to_metric_families(exposition))
    assert len({family.name for family in families}) == len(families)
    samples = [sample for family in families for sample in family.samples]
    assert samples
    assert {sample.labels["model_name"] for sample in samples} == {"shapes"}
    names = {family.name for family in families}
    assert {"process_resident_memory_bytes", "process_cpu_seconds", "python_info"} <= names
    assert not [name for name in names if re.match("stepweave_(process|python)", name)]
    for family in families:
        assert (
            not family.name.endswith("_seconds")
            or family.type != "histogram"
            or re.search("_(duration|error)_", family.name)
        )
        assert family.documentation


def test_the_document_lists_every_metric_with_its_type_and_labels(served: Served) -> None:
    document = (ROOT / "docs/metrics.md").read_text()
    listed = {
        name: (kind, set(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels in re.findall(
            r"^\| `(stepweave_\w+)` \| (\w+) \| (.*?) \|", document, re.MULTILINE
        )
    }
    exposed: dict[str, tuple[str, set[str]]] = {}
    for family in text_string_to_metric_families(
        httpx.get(f"{served.url}/metrics", timeout=SECONDS).text
    ):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels}
        exposed[name] = family.type, labels - {"model_name", "le"}
    ours = {name: value for name, value in exposed.items() if name.startswith("stepweave_")}
    assert listed == ours
    for name in re.findall(r"`((?:stepweave|process|python)_\w+?)(?:\{|`)", document):
        assert name in exposed, name
    table = re.search(r"^\| alert \|.*?\n\n", document, re.MULTILINE | re.DOTALL)
    assert table is not None
    assert set(re.findall(r"`(Stepweave\w+)`", table[0])) == set(ALERTS)


def test_running_and_waiting_requests_are_always_those_in_flight() -> None:
    def counts(in_flight: int, waiting: int) -> list[float | None]:
        registry = Metrics(lambda: in_flight, lambda: waiting, "shapes").registry
        return [
            registry.get_sample_value(f"stepweave_requests_{name}", {"model_name": "shapes"})
            for name in ("running", "waiting", "in_flight")
        ]

    assert counts(5, 2) == [3, 2, 5]
    assert counts(1, 2) == [0, 1, 1]  # one came between the two readings


def test_the_stages_of_a_start_add_up_to_it() -> None:
    now = 100.0
    times = StageTimes(lambda: now)
    assert times.seconds() == dict.fromkeys(STAGES, 0)
    with times.timed():
        for stage, seconds in (
            ("starting", 1.0),
            ("loading", 2.0),
            ("downloading", 3.0),
            ("loading", 4.0),
        ):
            enter_stage(stage)
            now += seconds
    enter_stage("importing")  # of no start that is timed
    assert times.seconds() == {
        **dict.fromkeys(STAGES, 0),
        "starting": 1,
        "downloading": 3,
        "loading": 6,
    }
    times.enter("ready")
    now += 5
    assert sum(times.seconds().values()) == 10


def test_the_stages_of_a_real_start_are_told(served: Served) -> None:
    times = {
        sample.labels["stage"]: sample.value
        for family in text_string_to_metric_families(
            httpx.get(f"{served.url}/metrics", timeout=SECONDS).text
        )
        for sample in family.samples
        if family.name == "stepweave_model_load_seconds"
    }
    assert set(times) == set(STAGES)
    assert times["downloading"] == 0  # the embedded model is there
    for stage in (
        "starting",
        "importing",
        "loading",
        "warming_up",
        "certifying",
        "trying_limits",
        "profiling",
    ):
        assert times[stage] > 0, stage
    (ready,) = re.findall(r"ready after ([\d.]+) s", served.log.read_text())
    assert sum(times.values()) - times["starting"] <= float(ready) + 0.1  # as it is rounded
    again = httpx.get(f"{served.url}/metrics", timeout=SECONDS).text
    assert f'stage="loading"}} {times["loading"]}' in again  # no clock goes on


@pytest.fixture
def prometheus(binaries: dict[str, str], served: Served, tmp_path: Path) -> Iterator[Prometheus]:
    """Prometheus with the alerts, scraping the real server each second: as in a cluster, and as
    outside of one."""
    rules = tmp_path / "alerts.yaml"
    rules.write_text(yaml.safe_dump(rule_groups()))
    jobs = [
        {
            "job_name": job,
            "static_configs": [{"targets": [f"127.0.0.1:{served.port}"], "labels": labels}],
        }
        for job, labels in JOBS.items()
    ]
    with local.run(binaries["prometheus"], tmp_path, free_port(), jobs, [rules]) as prometheus:
        yield prometheus


def draw(served: Served, timeout: float | httpx.Timeout = SECONDS, **fields: Any) -> int:
    body = {"prompt": "a small blue star", "num_inference_steps": 2, **fields}
    return httpx.post(f"{served.url}/v1/images/generations", json=body, timeout=timeout).status_code


@pytest.mark.full
def test_every_query_has_data_when_prometheus_scrapes_the_real_server(
    prometheus: Prometheus, served: Served, tmp_path: Path
) -> None:
    begun = time.time()
    outside = {"job": "stepweave"}  # without the labels of a cluster
    for job in JOBS:
        # two scrapes
        prometheus.wait_for(
            f'rate(stepweave_request_duration_seconds_count{{job="{job}"}}[{WINDOW}])'
        )
    for chosen in ({}, VARIABLES, outside):
        for title, expr in queries(chosen).items():
            assert prometheus.values(expr), f"no data before the first request: {title}: {expr}"
    for variable, value in VARIABLES.items():
        for title, expr in queries({variable: "another"}).items():
            if "vector(0)" not in expr:
                assert not prometheus.values(expr), (
                    f"not filtered by {variable}={value}: {title}: {expr}"
                )

    with ThreadPoolExecutor(3) as pool:
        # prompts that were never encoded before, so that the encoders run, too
        assert (
            list(pool.map(lambda seed: draw(served, seed=seed, prompt=f"a ring, {seed}"), range(6)))
            == [200] * 6
        )
    assert draw(served, size="65x65") == 400
    drawing = io.BytesIO()  # for the forwards that only edits and ControlNets have
    Image.new("RGB", (64, 64)).save(drawing, "PNG")
    fields = {"prompt": "a small blue star", "num_inference_steps": "2"}
    for name, more in (("image", {}), ("control_image", {"controlnet": "outlines"})):
        answer = httpx.post(
            f"{served.url}/v1/images/edits",
            data={**fields, **more},
            files={name: drawing.getvalue()},
            timeout=SECONDS,
        )
        assert answer.status_code == 200, answer.text
    with pytest.raises(httpx.ReadTimeout):  # a client that leaves
        draw(
            served,
            timeout=httpx.Timeout(SECONDS, read=0.5),
            num_inference_steps=200,
            size="256x256",
        )
    for outcome in ("succeeded", "invalid", "cancelled"):
        prometheus.wait_for(f'rate(stepweave_requests_total{{outcome="{outcome}"}}[{WINDOW}]) > 0')
    prometheus.wait_for(f"rate(stepweave_steps_saved_total[{WINDOW}]) > 0")
    assert prometheus.values("stepweave_ready") == [1, 1]

    for chosen in ({}, VARIABLES, outside):
        for title, expr in queries(chosen).items():
            values = prometheus.values(expr)
            assert values, f"no data: {title}: {expr}"
            assert all(map(math.isfinite, values)), f"not a number: {title}: {expr}"

    drawn = tmp_path / "dashboard.png"
    assert draw_panels(prometheus, drawn, Span(begun, time.time(), VARIABLES)) == []
    with Image.open(drawn) as image:
        assert len(image.convert("RGB").getcolors(1 << 16) or ()) > 8
    # of nothing
    assert "Resident memory" in draw_panels(
        prometheus, drawn, Span(begun, time.time(), {"model_name": "another"})
    )

    # a comparison keeps only the samples that alert: what it compares must exist while all is well
    compared = 0
    for name, alert in ALERTS.items():
        assert prometheus.values(alert["expr"]) == [], name
        expr = promql.parse(alert["expr"])
        if isinstance(expr, promql.BinaryExpr) and str(expr.op) == ">":
            compared += 1
            assert prometheus.values(expr.lhs.prettify()), f"nothing to compare: {name}"
    assert compared == len(ALERTS) - 4  # the others ask for what is absent

    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"]: rule["health"] for rule in rules} == dict.fromkeys(ALERTS, "ok")
    for variable, value in VARIABLES.items():
        found = prometheus.get(
            f"label/{variable}/values", **{"match[]": "stepweave_requests_in_flight"}
        )
        assert found == (sorted(JOBS) if variable == "job" else [value])
