"""The Kubernetes manifests: rendered, validated strictly, and checked for what no schema says.

Each check is a generator of problems, so that the last tests can show that it finds the mistake that it is there for.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import kubernetes_validate
import pytest
import uvicorn
import yaml
from starlette.requests import Request

from stepweave.api.middleware import DRAIN
from stepweave.api.urls import base_url
from stepweave.config import Settings
from stepweave.draining import TOKEN_FILE
from stepweave.errors import ConfigError, InvalidRequest
from stepweave.server import ENDING_SECONDS, Server
from tests.conftest import ROOT, InProcess, free_port
from tests.schemas import validate_custom
from tests.waiting import SECONDS

Document = dict[str, Any]

K8S = ROOT / "k8s"
OVERLAYS = sorted(path.parent.name for path in K8S.glob("overlays/*/kustomization.yaml"))
VERSIONS = (
    "1.27",
    "1.37",
)  # the first with unhealthyPodEvictionPolicy on by default, and the last that the validator knows

GPU = "nvidia.com/gpu"
REFUSING_SECONDS = 4  # between the end of a drain's notice and SIGTERM
USER = 1034  # of images that `bentoml containerize` builds
MODEL_MOUNT = "/mnt/models"  # where KServe puts a storageUri
KEDA_TRIGGERS = {"prometheus", "cron", "cpu", "memory", "metrics-api", "external", "kubernetes-workload"}
KSERVE_AUTOSCALERS = {"hpa", "keda", "external", "none"}
CLUSTER_SCOPED = {"Namespace", "ClusterServingRuntime"}
# Seconds that one step of one picture is given, by device, and the pixels that this holds up to. On two busy cores the
# embedded model takes 0.05 at 128x128. A GPU's second is a budget: a slower card needs a longer grace period or lower limits.
STEP = {"cpu": (128 * 128, 0.2), "cuda": (1024 * 1024, 1.0)}


# --- rendering and schemas ---


@functools.cache
def _rendered(directory: Path) -> str:
    if shutil.which("kubectl") is None:
        pytest.skip("NOT CHECKED: there is no kubectl on this machine to render the manifests with")
    result = subprocess.run(["kubectl", "kustomize", str(directory)], capture_output=True, text=True, timeout=SECONDS)
    assert result.returncode == 0 and not result.stderr, result.stderr
    return result.stdout


def render(directory: str) -> list[Document]:
    """The documents of one kustomization, for the caller to change."""
    return list(yaml.safe_load_all(_rendered(K8S / directory)))


def overlay(name: str) -> list[Document]:
    return render(f"overlays/{name}")


def is_custom(document: Document) -> bool:
    return any(group in document["apiVersion"] for group in ("keda.sh/", "serving.kserve.io/"))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("directory", ["base", *(f"overlays/{name}" for name in OVERLAYS)])
def test_built_in_kinds_are_valid(directory: str, version: str) -> None:
    for document in render(directory):
        if not is_custom(document):
            assert kubernetes_validate.validate(document, version, strict=True) == version


@pytest.mark.parametrize("name", ["gpu-keda", "kserve", "kserve-keda"])
def test_custom_kinds_are_valid(name: str) -> None:
    documents = [document for document in overlay(name) if is_custom(document)]
    assert documents
    for document in documents:
        validate_custom(document)


# --- what a pod will be ---


@dataclass(frozen=True)
class Workload:
    """A Deployment, or the one that KServe will make of an InferenceService."""

    name: str
    labels: dict[str, str]
    pod: Document
    document: Document

    @property
    def container(self) -> Document:
        return self.pod["containers"][0]

    @property
    def env(self) -> dict[str, str]:
        return {item["name"]: item["value"] for item in self.container["env"] if "value" in item}


def merge(under: Any, over: Any) -> Any:
    """`over` laid onto `under` as the API's strategic merge does it, by the lists' keys."""
    if isinstance(under, dict) and isinstance(over, dict):
        return under | {key: merge(under[key], value) if key in under else value for key, value in over.items()}
    if isinstance(under, list) and isinstance(over, list) and all(isinstance(item, dict) for item in under + over):
        key = "mountPath" if any("mountPath" in item for item in under + over) else "name"
        names = {item[key]: item for item in under}
        return list((names | {item[key]: merge(names.get(item[key], {}), item) for item in over}).values())
    return over


def of_kind(documents: list[Document], *kinds: str) -> list[Document]:
    return [document for document in documents if document["kind"] in kinds]


def workloads(documents: list[Document]) -> list[Workload]:
    found = []
    for document in of_kind(documents, "Deployment"):
        template = document["spec"]["template"]
        found.append(Workload(document["metadata"]["name"], template["metadata"]["labels"], template["spec"], document))
    runtimes = {runtime["metadata"]["name"]: runtime["spec"] for runtime in of_kind(documents, "ClusterServingRuntime")}
    for document in of_kind(documents, "InferenceService"):
        name = document["metadata"]["name"]
        predictor = {key: value for key, value in document["spec"]["predictor"].items() if key != "model"}
        model = document["spec"]["predictor"]["model"]
        pod = merge(copy.deepcopy(runtimes[model["runtime"]]), predictor)
        (server,) = [container for container in pod["containers"] if container["name"] == "kserve-container"]
        pod["containers"] = [merge(server, model)]
        labels = {"app": f"isvc.{name}-predictor", "serving.kserve.io/inferenceservice": name}
        found.append(Workload(f"{name}-predictor", labels, pod, document))
    return found


def quantity(text: str) -> float:
    """The value of a Kubernetes quantity. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(m|k|[MGTPE]|[KMGTPE]i)?", str(text))
    if match is None:
        raise ValueError(f"{text!r} is no quantity")
    number, unit = match.groups()
    powers = {"m": 1e-3, None: 1, "k": 1e3} | {u: 1000.0 ** (i + 2) for i, u in enumerate("MGTPE")}
    return float(number) * (powers | {f"{u}i": 1024.0 ** (i + 1) for i, u in enumerate("KMGTPE")})[unit]


def selects(selector: Document, labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", {})
    return bool(wanted) and wanted.items() <= labels.items()


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


# --- the checks ---


def settings_of(work: Workload) -> Settings:
    """The settings as the server would read them in this pod. Raises ConfigError."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("STEPWEAVE_")]:
            patch.delenv(name)
        for name, value in work.env.items():
            if name.startswith("STEPWEAVE_"):
                # a mounted directory is not on this machine: any other stands for it
                patch.setenv(name, str(ROOT) if value.startswith("/") else value)
        return Settings.load()


def probe_problems(work: Workload) -> Iterator[str]:
    ports = {port["name"]: port["containerPort"] for port in work.container["ports"]}
    for probe, path in (("startupProbe", "/livez"), ("readinessProbe", "/readyz"), ("livenessProbe", "/livez")):
        spec = work.container.get(probe, {})
        if spec.get("httpGet", {}).get("path") != path:
            yield f"{probe} does not get {path}"
        elif spec["httpGet"]["port"] not in ports:
            yield f"{probe}: there is no port named {spec['httpGet']['port']!r}"
        elif spec["timeoutSeconds"] > spec["periodSeconds"]:
            yield f"{probe} may take longer than its period"
    arguments = " ".join(work.container["args"])
    if f"serve --host 0.0.0.0 --port {ports.get('http')}" not in arguments:
        yield f"the server does not listen on the port named http of every address: {arguments}"


def grace_problems(work: Workload) -> Iterator[str]:
    try:
        settings = settings_of(work)
    except ConfigError as error:
        yield f"settings: {error.message}"
        return
    pixels, seconds = STEP["cpu" if settings.device == "cpu" else "cuda"]
    if settings.max_pixels > pixels:
        yield f"STEPWEAVE_MAX_PIXELS={settings.max_pixels}, but the grace period is worked out for {pixels}"
    # what was accepted before the drain is finished: the jobs that run and a full queue
    at_once = settings.threads if settings.batching == "threads" else 1
    accepted = (settings.max_queue + at_once) * settings.max_images * settings.max_steps * seconds
    if settings.grace < accepted:
        yield f"STEPWEAVE_GRACE {settings.grace:g} < {accepted:.0f} s of accepted work"
    # the grace begins with the drain or, if that found no ear, after the whole of preStop
    pause, given = pre_stop_seconds(work), work.pod.get("terminationGracePeriodSeconds", 30)
    if given < pause + settings.grace + ENDING_SECONDS:
        yield (
            f"terminationGracePeriodSeconds {given} < preStop {pause} + STEPWEAVE_GRACE {settings.grace:g} + "
            f"{ENDING_SECONDS:g} s for the last step"
        )


def pre_stop_script(work: Workload) -> str:
    command = work.container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [""])
    # isolated and without site-packages: nothing in the image or the environment can break it, or slow it down
    return command[-1] if command[:-1] == ["python3", "-IS", "-c"] else ""


def pre_stop_seconds(work: Workload) -> int:
    """At most: its sleeps, and what it waits for the server."""
    return sum(map(int, re.findall(r"(?:sleep\(|timeout=)(\d+)\)", pre_stop_script(work))))


def drain_problems(work: Workload) -> Iterator[str]:
    script = pre_stop_script(work)
    asking = f'"POST", "{DRAIN}"'
    if asking not in script:
        yield "preStop does not drain the server"
        return
    before, after = (sum(map(int, re.findall(r"sleep\((\d+)\)", part))) for part in script.split(asking))
    probe = work.container["readinessProbe"]
    noticed = probe["periodSeconds"]  # by who asks for /readyz himself, as often as the kubelet does
    notice = float(work.env.get("STEPWEAVE_DRAIN_NOTICE", Settings.model_fields["drain_notice"].default))
    if after < max(noticed, notice + REFUSING_SECONDS) or before + after > 30:
        yield f"preStop sleeps {before} s and {after} s: too short for proxies to notice, or too long to wait"
    path = f'open("{work.env.get("STEPWEAVE_STATE_DIR")}/{TOKEN_FILE}")'
    if path not in script or 'headers={"Authorization": f"Bearer {token}"}' not in script:
        yield f"preStop does not bear the token of the state directory, as by {path}"
    for port in {port["containerPort"] for port in work.container["ports"] if port["name"] == "http"}:
        if f'HTTPConnection("127.0.0.1", {port}, timeout=' not in script:
            yield f"preStop does not ask port {port} of this pod, or without a timeout"


def state_problems(work: Workload) -> Iterator[str]:
    try:
        settings = settings_of(work)
    except ConfigError:
        return
    directory = work.env.get("STEPWEAVE_STATE_DIR")
    mounts = {mount["mountPath"]: mount["name"] for mount in work.container["volumeMounts"]}
    if directory not in mounts:
        yield f"STEPWEAVE_STATE_DIR {directory} is no volume of its own: a restart of the container forgets it"
        return
    (volume,) = [volume for volume in work.pod["volumes"] if volume["name"] == mounts[directory]]
    if list(mounts.values()).count(volume["name"]) > 1 or "emptyDir" not in volume:
        yield "the state's volume is not one pod's alone, and for nothing else"
        return
    if volume["emptyDir"].get("medium") == "Memory":
        yield "the state's volume counts as the container's memory"
    # a record has both prompts twice, as asked for and as answered, each character at most 6 bytes of JSON
    records = settings.keep_jobs * 2 * 2 * settings.max_prompt_characters * 6
    if quantity(volume["emptyDir"].get("sizeLimit", "0")) < settings.keep_bytes + records:
        yield f"the state's volume is smaller than {settings.keep_bytes} bytes of pictures and {records} of jobs"


def secret_problems(work: Workload) -> Iterator[str]:
    if "STEPWEAVE_API_KEYS" in work.env:
        yield "API keys are written into the manifest"
    references = {item["name"]: item.get("valueFrom", {}).get("secretKeyRef") for item in work.container["env"]}
    if not references.get("STEPWEAVE_API_KEYS"):
        yield "API keys do not come from a Secret"
    path = Path(work.env.get("STEPWEAVE_API_KEYS_FILE", ""))
    mounts = [mount for mount in work.container["volumeMounts"] if mount["mountPath"] == str(path.parent)]
    volumes = [volume for volume in work.pod["volumes"] if volume["name"] in [mount["name"] for mount in mounts]]
    secrets = [volume["secret"] for volume in volumes if "secret" in volume]
    if not secrets or path.name not in [item["path"] for item in secrets[0].get("items", [])]:
        yield "the file of API keys is not a Secret's alone"  # then the directory would not be empty without it
    elif not secrets[0].get("optional"):
        yield "without its Secret for STEPWEAVE_API_KEYS_FILE the pod does not start"
    if any("subPath" in mount for mount in mounts):
        yield "the file of API keys does not follow its Secret"
    for name, reference in references.items():
        if reference and not reference.get("optional"):
            yield f"without its Secret for {name} the pod does not start"


def url_problems(work: Workload, documents: list[Document]) -> Iterator[str]:
    """Pictures are answered as URLs to who calls the Service by any of its names."""
    spaces = [namespace["metadata"]["name"] for namespace in of_kind(documents, "Namespace")]
    with contextlib.suppress(ConfigError):
        settings = settings_of(work)
        for name in [f"{work.name}.{space}{rest}" for space in spaces for rest in (".svc", ".svc.cluster.local")]:
            scope = {"type": "http", "scheme": "http", "path": "/", "headers": [(b"host", name.encode())]}
            try:
                base_url(Request(scope), settings)
            except InvalidRequest:
                yield f"no URL of a picture for who calls {name}"


def security_problems(work: Workload) -> Iterator[str]:
    context = work.pod.get("securityContext", {}) | work.container.get("securityContext", {})
    wanted = {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    yield from (f"security: {key} is not {value}" for key, value in wanted.items() if context.get(key) != value)
    for key in ("automountServiceAccountToken", "enableServiceLinks"):
        if work.pod.get(key) is not False:
            yield f"security: {key} is not false"


def volume_problems(work: Workload, documents: list[Document]) -> Iterator[str]:
    volumes = {volume["name"]: volume for volume in work.pod["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in work.container["volumeMounts"]}
    if set(mounts.values()) != set(volumes):
        yield f"mounted {sorted(mounts.values())}, but the volumes are {sorted(volumes)}"
    for name in ("HOME", "BENTOML_HOME", "TMPDIR", "HF_HOME"):
        path = Path(work.env.get(name, "/tmp"))
        if not any(path.is_relative_to(mount) for mount in mounts):
            yield f"{name} is {path}, where nothing can be written"
    model = work.env.get("STEPWEAVE_MODEL", "")
    brought = [MODEL_MOUNT] if "storageUri" in work.container else []
    if model.startswith("/") and model not in [*mounts, *brought]:
        yield f"STEPWEAVE_MODEL={model} is not mounted"
    claims = {claim["metadata"]["name"]: claim for claim in of_kind(documents, "PersistentVolumeClaim")}
    for volume in volumes.values():
        if "persistentVolumeClaim" in volume:
            claim = claims.get(volume["persistentVolumeClaim"]["claimName"])
            if claim is None:
                yield f"there is no claim {volume['persistentVolumeClaim']['claimName']}"
            elif claim["spec"]["accessModes"] != ["ReadWriteMany"]:
                yield "a second pod on another node could not mount the claim: it is not ReadWriteMany"


def resource_problems(work: Workload) -> Iterator[str]:
    requests, limits = (work.container["resources"].get(key, {}) for key in ("requests", "limits"))
    try:
        for key in ("cpu", "memory"):
            if key not in requests or quantity(requests[key]) > quantity(limits.get(key, requests[key])):
                yield f"{key} has no request, or one over its limit"
        for volume in work.pod["volumes"]:
            quantity(volume.get("emptyDir", {}).get("sizeLimit", "1"))
        if "memory" not in limits:
            yield "memory has no limit"
        if requests.get(GPU) != limits.get(GPU):
            yield f"{GPU}: request {requests.get(GPU)} is not limit {limits.get(GPU)}"
    except ValueError as error:
        yield str(error)
    if work.env.get("STEPWEAVE_DEVICE") != "cuda":
        if GPU in requests:
            yield f"a {GPU} that STEPWEAVE_DEVICE does not use"
        return
    if requests.get(GPU) != "1":
        yield f"one process drives one GPU, but {requests.get(GPU)} are requested"
    if not any(item["key"] == GPU and item["operator"] == "Exists" for item in work.pod.get("tolerations", [])):
        yield f"no toleration of {GPU}"
    if work.env.get("PYTORCH_CUDA_ALLOC_CONF") != "expandable_segments:True":
        yield "PYTORCH_CUDA_ALLOC_CONF lets memory fragment"
    shared = [mount["name"] for mount in work.container["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
    memory = [volume["name"] for volume in work.pod["volumes"] if volume.get("emptyDir", {}).get("medium") == "Memory"]
    if not shared or not set(shared) <= set(memory):
        yield "/dev/shm is not memory"


def deployment_problems(deployment: Document) -> Iterator[str]:
    if not selects(deployment["spec"]["selector"], deployment["spec"]["template"]["metadata"]["labels"]):
        yield "the Deployment's selector is not in its pods' labels"


def companion_problems(work: Workload, documents: list[Document]) -> Iterator[str]:
    """What must stand beside every workload and point at its pods."""
    spread = work.pod.get("topologySpreadConstraints", [])
    if not spread or not all(selects(constraint["labelSelector"], work.labels) for constraint in spread):
        yield "no topology spread of these pods"
    budgets = [budget["spec"] for budget in of_kind(documents, "PodDisruptionBudget")]
    if not any(selects(budget["selector"], work.labels) for budget in budgets):
        yield "no PodDisruptionBudget selects these pods"
    if any(("minAvailable" in budget) == ("maxUnavailable" in budget) for budget in budgets):
        yield "a PodDisruptionBudget has one of minAvailable and maxUnavailable"
    ports = {port["name"] for port in work.container["ports"]}
    policies = [policy["spec"] for policy in of_kind(documents, "NetworkPolicy")]
    if not any(selects(policy["podSelector"], work.labels) for policy in policies):
        yield "no NetworkPolicy selects these pods"
    opened = {port["port"] for policy in policies for rule in policy["ingress"] for port in rule["ports"]}
    if not opened <= ports:
        yield f"a NetworkPolicy opens {opened}, but the ports are {ports}"
    fetches = "/" in work.env.get("STEPWEAVE_MODEL", "shapes")
    out = {port["port"] for policy in policies for rule in policy["egress"] for port in rule["ports"]}
    if out != ({53, 443} if fetches else set()):
        yield f"a NetworkPolicy lets out to {out or 'nothing'}"
    for service in of_kind(documents, "Service"):
        if not selects({"matchLabels": service["spec"]["selector"]}, work.labels):
            yield "the Service's selector is not in the pods' labels"
        if not {port["targetPort"] for port in service["spec"]["ports"]} <= ports:
            yield "the Service's targetPort is no port of the pods"


def autoscaler_problems(documents: list[Document]) -> Iterator[str]:
    works = {work.name: work for work in workloads(documents)}
    targets = []
    for scaler in of_kind(documents, "HorizontalPodAutoscaler", "ScaledObject"):
        spec = scaler["spec"]
        target = spec["scaleTargetRef"]["name"]
        targets.append(target)
        if target not in works:
            yield f"{scaler['kind']} scales {target!r}, which is not there"
            continue
        work = works[target]
        if scaler["kind"] == "ScaledObject":
            least, most = spec["minReplicaCount"], spec["maxReplicaCount"]
            behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
            values = [trigger["metadata"].get("threshold") for trigger in spec["triggers"]]
            yield from scaled_object_problems(scaler, work, set(works))
        else:
            least, most, behavior = spec["minReplicas"], spec["maxReplicas"], spec["behavior"]
            metrics = [metric[metric["type"][0].lower() + metric["type"][1:]] for metric in spec["metrics"]]
            values = [
                metric["target"].get(metric["target"]["type"][0].lower() + metric["target"]["type"][1:])
                for metric in metrics
            ]
        if not 1 <= least <= most:
            yield f"{least} to {most} replicas"
        if None in values:
            yield f"a metric of the {scaler['kind']} has no target value"
        elif max(map(quantity, values)) > int(work.env["STEPWEAVE_MAX_QUEUE"]):
            yield f"requests are refused before the {scaler['kind']} adds a replica"
        for policy in behavior["scaleDown"]["policies"]:
            if (policy["type"], policy["value"]) != ("Pods", 1) or policy["periodSeconds"] < 300:
                yield "scales down faster than one pod per 5 minutes"
        if work.document["kind"] == "Deployment" and "replicas" in work.document["spec"]:
            yield "the Deployment's replicas undo the autoscaler's at each apply"
    yield from (f"two autoscalers of {name!r}" for name in set(targets) if targets.count(name) > 1)


def scaled_object_problems(scaler: Document, work: Workload, names: set[str]) -> Iterator[str]:
    if "fallback" not in scaler["spec"]:
        yield "KEDA has no fallback for a Prometheus that is down"
    for trigger in scaler["spec"]["triggers"]:
        if trigger["type"] not in KEDA_TRIGGERS:
            yield f"KEDA has no trigger {trigger['type']!r}"
        if trigger["metricType"] != "AverageValue":
            yield "KEDA's fallback needs AverageValue"
        if trigger["metadata"].get("ignoreNullValues") != "false":
            yield "a scrape that fails would count as no load"
        query = trigger["metadata"]["query"]
        if not is_one_series(query):
            yield f"not one series: {query}"
        labels = dict(re.findall(r'(\w+)=~?"([^"]*)"', query))
        if labels.get("namespace") != scaler["metadata"]["namespace"]:
            yield f"the query's namespace is not {scaler['metadata']['namespace']!r}"
        chosen = {
            name for name in names | {"stepweave", "stepweave-predictor"} if pod_matches(labels.get("pod", ""), name)
        }
        if chosen != {work.name}:
            yield f"the query's pods are those of {sorted(chosen)}, not of {work.name!r}"


def is_one_series(query: str) -> bool:
    """Whether the query is a plain sum, which is one series without labels and there as soon as one pod is scraped."""
    return re.fullmatch(r"sum\(\w+(\{[^{}]*(\{\d+\})?[^{}]*\})?\)", query) is not None


def pod_matches(pattern: str, deployment: str) -> bool:
    return re.fullmatch(pattern, f"{deployment}-7d9f8c6b5d-x2x4z") is not None


def kserve_problems(documents: list[Document]) -> Iterator[str]:
    """KServe's own rules, which its CRD does not hold."""
    scaled = {scaler["spec"]["scaleTargetRef"]["name"] for scaler in of_kind(documents, "ScaledObject")}
    runtimes = {runtime["metadata"]["name"]: runtime["spec"] for runtime in of_kind(documents, "ClusterServingRuntime")}
    for service in of_kind(documents, "InferenceService"):
        annotations, predictor = service["metadata"].get("annotations", {}), service["spec"]["predictor"]
        mode = annotations.get("serving.kserve.io/deploymentMode")
        scaling = annotations.get("serving.kserve.io/autoscalerClass", "hpa")
        if mode not in {"Standard", "Knative"}:
            yield f"KServe has no deploymentMode {mode!r}"
        if mode == "Standard":
            yield from (f"{key} is Knative's" for key in ("containerConcurrency", "scaleTarget") if key in predictor)
            if predictor.get("scaleMetric") in {"concurrency", "rps"}:
                yield f"scaleMetric {predictor['scaleMetric']} is Knative's"
        if scaling not in KSERVE_AUTOSCALERS:
            yield f"KServe has no autoscalerClass {scaling!r}"
        if "scaleMetric" in predictor and scaling == "keda":
            yield "scaleMetric does not go with autoscalerClass keda"
        for metric in predictor.get("autoScaling", {}).get("metrics", []):
            if metric["type"] == "External":
                if scaling not in {"keda", "external"}:
                    yield f"an External metric does not go with autoscalerClass {scaling}"
                if not metric["external"]["metric"].get("query"):
                    yield "an External metric has no query"
        if predictor.get("minReplicas", 1) > predictor.get("maxReplicas", predictor.get("minReplicas", 1)):
            yield "minReplicas > maxReplicas"
        if (scaling == "external") != (f"{service['metadata']['name']}-predictor" in scaled):
            yield f"autoscalerClass {scaling} and the ScaledObjects disagree"
        runtime = runtimes[predictor["model"]["runtime"]]
        if predictor["model"]["modelFormat"]["name"] not in {item["name"] for item in runtime["supportedModelFormats"]}:
            yield "the runtime does not support the model's format"
        if predictor["model"]["protocolVersion"] not in runtime["protocolVersions"]:
            yield "the runtime does not speak the protocol"
        if predictor["model"].get("readinessProbe") != runtime["containers"][0]["readinessProbe"]:
            yield "the InferenceService's readinessProbe is not the runtime's"


def scope_problems(documents: list[Document]) -> Iterator[str]:
    spaces = {namespace["metadata"]["name"] for namespace in of_kind(documents, "Namespace")}
    for document in documents:
        given = document["metadata"].get("namespace")
        if (given is not None) if document["kind"] in CLUSTER_SCOPED else ({given} != spaces):
            yield f"{document['kind']} has the namespace {given}"


@functools.cache
def exposed() -> frozenset[str]:
    """The sample names of the server's own registry."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("STEPWEAVE_")]:
            patch.delenv(name)
        server = Server(Settings())
    families = list(server.metrics.registry.collect())
    server.close()
    return frozenset(sample.name for family in families for sample in family.samples)


def problems(documents: list[Document]) -> list[str]:
    """Everything wrong with what one `kubectl apply -k` would bring."""
    found = [*scope_problems(documents), *autoscaler_problems(documents), *kserve_problems(documents)]
    for deployment in of_kind(documents, "Deployment"):
        found += deployment_problems(deployment)
    for work in workloads(documents):
        found += [*probe_problems(work), *grace_problems(work), *security_problems(work), *resource_problems(work)]
        found += [*volume_problems(work, documents), *companion_problems(work, documents)]
        found += [*drain_problems(work), *state_problems(work), *secret_problems(work), *url_problems(work, documents)]
    named = {name for text in strings(documents) for name in re.findall(r"\bstepweave_\w+", text)}
    return found + [f"the server exposes no {name}" for name in sorted(named - exposed())]


# --- the manifests pass ---


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_has_no_problem(name: str) -> None:
    documents = overlay(name)
    assert len(workloads(documents)) == 1
    assert problems(documents) == []


def test_the_overlays_are_those_of_the_readme_and_use_every_component() -> None:
    readme = (K8S / "README.md").read_text()
    assert set(re.findall(r"^\| `([\w-]+)`", readme, re.MULTILINE)) == set(OVERLAYS)
    texts = "".join(path.read_text() for path in K8S.glob("overlays/*/kustomization.yaml"))
    assert all(f"components/{path.name}\n" in texts for path in K8S.glob("components/*"))


def test_both_pods_drain_alike() -> None:
    own, kserve = (workloads(overlay(name))[0].container["lifecycle"] for name in ("gpu", "kserve"))
    assert own == kserve


def run_pre_stop(port: int, state: Path) -> int:
    """The manifest's own command, but for its sleeps and with the given port and state directory; its exit status."""
    (work,) = workloads(overlay("gpu"))
    *_, script = command = list(work.container["lifecycle"]["preStop"]["exec"]["command"])
    command[0] = sys.executable
    command[-1] = re.sub(r"sleep\(\d+\)", "sleep(0)", script.replace("3000", str(port)))
    assert "/var/lib/stepweave/" in command[-1]
    command[-1] = command[-1].replace("/var/lib/stepweave/", f"{state}/")
    assert str(port) in command[-1]
    return subprocess.run(command, timeout=SECONDS, env={"http_proxy": "http://127.0.0.1:9"}).returncode


def test_pre_stop_drains_the_server_in_its_pod(in_process: Callable[..., InProcess], tmp_path: Path) -> None:
    made, port = in_process(state_dir=str(tmp_path), drain_notice=0), free_port()
    runner = uvicorn.Server(uvicorn.Config(made.client.app, "127.0.0.1", port, lifespan="off", log_level="warning"))
    thread = threading.Thread(target=runner.run)
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=SECONDS) as client:
            deadline = time.monotonic() + SECONDS
            while not runner.started:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert client.get("/readyz").status_code == 200
            assert run_pre_stop(port, tmp_path) == 0
            assert client.get("/readyz").status_code == 503
            assert client.get("/livez").status_code == 200
            refused = client.post("/v1/images/generations", json={"prompt": "a red circle"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert int(refused.headers["retry-after"]) > 0
    finally:
        runner.should_exit = True
        thread.join(SECONDS)


def test_pre_stop_does_not_fail_when_the_server_is_gone(tmp_path: Path) -> None:
    assert run_pre_stop(free_port(), tmp_path) == 0


def blocks_of_the_readme() -> list[Document]:
    texts = re.findall(r"^```yaml\n(.*?)^```", (K8S / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return [document for text in texts for document in yaml.safe_load_all(text)]


def test_the_readmes_ingress_lets_through_what_the_server_takes() -> None:
    (ingress,) = of_kind(blocks_of_the_readme(), "Ingress")
    assert kubernetes_validate.validate(ingress, VERSIONS[-1], strict=True) == VERSIONS[-1]
    (service,) = of_kind(overlay("gpu"), "Service")
    (rule,) = ingress["spec"]["rules"]
    backend = rule["http"]["paths"][0]["backend"]["service"]
    assert backend["name"] == service["metadata"]["name"]
    assert backend["port"]["name"] in {port["name"] for port in service["spec"]["ports"]}
    assert ingress["metadata"]["namespace"] == service["metadata"]["namespace"]
    said = {
        key.removeprefix("nginx.ingress.kubernetes.io/"): text
        for key, text in ingress["metadata"]["annotations"].items()
    }
    settings = settings_of(workloads(overlay("gpu"))[0])
    assert said["proxy-body-size"] == f"{settings.max_upload_bytes >> 20}m"
    assert said["proxy-buffering"] == "off"
    assert int(said["proxy-read-timeout"]) >= settings.grace


def test_the_readmes_patch_gives_the_ingress_urls(tmp_path: Path) -> None:
    (ingress,) = of_kind(blocks_of_the_readme(), "Ingress")
    (block,) = [block for block in blocks_of_the_readme() if "STEPWEAVE_BASE_URL" in str(block)]
    block["resources"] = ["k8s/overlays/gpu"]
    shutil.copytree(K8S, tmp_path / "k8s")
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(block))
    documents = list(yaml.safe_load_all(_rendered(tmp_path)))
    assert problems(documents) == []
    assert settings_of(workloads(documents)[0]).base_url == f"https://{ingress['spec']['rules'][0]['host']}"


def test_the_readmes_patch_has_prometheus_bear_a_key_of_the_same_secret(tmp_path: Path) -> None:
    (block,) = [block for block in blocks_of_the_readme() if "authorization" in str(block)]
    block["resources"] = ["monitoring"]
    shutil.copytree(ROOT / "monitoring", tmp_path / "monitoring")
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(block))
    documents = list(yaml.safe_load_all(_rendered(tmp_path)))
    (secret,) = {
        item["valueFrom"]["secretKeyRef"]["name"]
        for name in ("gpu", "kserve")
        for item in workloads(overlay(name))[0].container["env"]
        if item["name"] == "STEPWEAVE_API_KEYS"
    }
    monitors = of_kind(documents, "PodMonitor")
    assert len(monitors) == 2
    for monitor in monitors:
        given = monitor["spec"]["podMetricsEndpoints"][0]["authorization"]
        assert given["credentials"]["name"] == secret
        assert f"--from-literal {given['credentials']['key']}=" in (K8S / "README.md").read_text()
        validate_custom(monitor)


@pytest.mark.parametrize("path", sorted(K8S.rglob("*.yaml")), ids=lambda path: str(path.relative_to(K8S)))
def test_every_file_begins_with_its_reason(path: Path) -> None:
    assert path.read_text().startswith("# ")


def test_the_two_autoscalers_scale_alike() -> None:
    (hpa,) = of_kind(overlay("gpu-hpa"), "HorizontalPodAutoscaler")
    (keda,) = of_kind(overlay("gpu-keda"), "ScaledObject")
    hpa, keda = hpa["spec"], keda["spec"]
    assert keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == hpa["behavior"]
    assert (keda["minReplicaCount"], keda["maxReplicaCount"]) == (hpa["minReplicas"], hpa["maxReplicas"])
    metric = hpa["metrics"][0]["pods"]
    assert metric["target"]["averageValue"] == keda["triggers"][0]["metadata"]["threshold"]
    assert f"sum({metric['metric']['name']}{{" in keda["triggers"][0]["metadata"]["query"]


@pytest.mark.parametrize(
    ("resource", "components"), [("gpu", ["hpa", "keda"]), ("gpu-hpa", ["keda"]), ("gpu-keda", ["hpa"])]
)
def test_two_autoscalers_cannot_be_built(tmp_path: Path, resource: str, components: list[str]) -> None:
    render("overlays/gpu")  # skips where there is no kubectl
    shutil.copytree(K8S, tmp_path / "k8s")
    both = tmp_path / "k8s" / "overlays" / "both"
    both.mkdir()
    content = {"resources": [f"../{resource}"], "components": [f"../../components/{name}" for name in components]}
    (both / "kustomization.yaml").write_text(yaml.safe_dump(content))
    result = subprocess.run(["kubectl", "kustomize", str(both)], capture_output=True, text=True, timeout=SECONDS)
    assert result.returncode != 0
    assert "/spec/replicas" in result.stderr


# --- the checks can fail ---


def at(documents: list[Document], kind: str, *path: str | int) -> Any:
    (value,) = of_kind(documents, kind)
    for key in path:
        value = value[key]
    return value


POD = ("spec", "template", "spec")
SERVER = (*POD, "containers", 0)
TRIGGER = ("spec", "triggers", 0)
MODEL = ("spec", "predictor", "model")
ABSENT = object()
CLASS = "serving.kserve.io/autoscalerClass"
EXTERNAL = {"metrics": [{"type": "External", "external": {"metric": {}, "target": {"type": "Value", "value": "2"}}}]}


@pytest.mark.parametrize(
    ("name", "kind", "path", "value", "problem"),
    [
        ("gpu", "Deployment", (*SERVER, "resources", "requests", GPU), "2", "is not limit 1"),
        ("gpu", "Deployment", (*SERVER, "resources", "requests", "memory"), "32Gi", "over its limit"),
        ("gpu", "Deployment", (*SERVER, "resources", "limits", "memory"), "24 GB", "'24 GB' is no quantity"),
        ("gpu", "Deployment", (*SERVER, "readinessProbe", "httpGet", "port"), "web", "no port named 'web'"),
        ("gpu", "Deployment", (*SERVER, "readinessProbe", "httpGet", "path"), "/livez", "does not get /readyz"),
        ("gpu", "Deployment", (*SERVER, "startupProbe"), ABSENT, "startupProbe does not get /livez"),
        ("gpu", "Deployment", (*SERVER, "lifecycle", "preStop"), {"sleep": {"seconds": 10}}, "does not drain"),
        ("gpu", "Deployment", (*SERVER, "lifecycle", "preStop", "exec", "command", 0), "curl", "does not drain"),
        ("gpu", "Deployment", (*SERVER, "ports", 0, "containerPort"), 8000, "does not ask port 8000"),
        ("gpu", "Deployment", (*SERVER, "args", 2), "127.0.0.1", "does not listen"),
        ("gpu", "Deployment", (*SERVER, "volumeMounts", 1, "mountPath"), "/scratch", "nothing can be written"),
        ("gpu", "Deployment", (*SERVER, "volumeMounts", 0, "name"), "tmp", "/dev/shm is not memory"),
        ("gpu", "Deployment", (*SERVER, "securityContext", "readOnlyRootFilesystem"), False, "readOnlyRootFilesystem"),
        (
            "gpu",
            "Deployment",
            (*POD, "terminationGracePeriodSeconds"),
            540,
            "540 < preStop 15 + STEPWEAVE_GRACE 500 + 30",
        ),
        ("gpu", "Deployment", (*POD, "volumes", -1, "emptyDir", "sizeLimit"), "1Gi", "state's volume is smaller"),
        ("gpu", "Deployment", (*POD, "volumes", -1, "emptyDir", "medium"), "Memory", "the container's memory"),
        ("gpu", "Deployment", (*POD, "volumes", -1, "emptyDir"), ABSENT, "not one pod's alone"),
        ("gpu", "Deployment", (*SERVER, "volumeMounts", -1, "name"), "tmp", "not one pod's alone"),
        ("gpu", "Deployment", (*SERVER, "volumeMounts", -1, "mountPath"), "/srv", "is no volume of its own"),
        ("gpu", "Deployment", (*POD, "enableServiceLinks"), True, "enableServiceLinks"),
        ("gpu", "Deployment", (*POD, "tolerations"), [], "no toleration"),
        ("gpu", "Deployment", (*POD, "topologySpreadConstraints"), [], "no topology spread"),
        ("gpu", "Deployment", ("spec", "selector", "matchLabels", "tier"), "gpu", "Deployment's selector"),
        ("gpu", "Service", ("spec", "selector", "tier"), "gpu", "Service's selector"),
        ("gpu", "Service", ("spec", "ports", 0, "targetPort"), "web", "Service's targetPort"),
        ("gpu", "PodDisruptionBudget", ("spec", "minAvailable"), 1, "one of minAvailable and maxUnavailable"),
        ("gpu", "PodDisruptionBudget", ("spec", "maxUnavailable"), ABSENT, "one of minAvailable and maxUnavailable"),
        ("gpu", "PodDisruptionBudget", ("spec", "selector", "matchLabels", "a"), "b", "no PodDisruptionBudget"),
        ("gpu", "NetworkPolicy", ("spec", "egress"), [], "lets out to nothing"),
        ("gpu", "NetworkPolicy", ("spec", "ingress", 0, "ports", 0, "port"), "web", "NetworkPolicy opens"),
        ("gpu", "PersistentVolumeClaim", ("spec", "accessModes"), ["ReadWriteOnce"], "not ReadWriteMany"),
        ("gpu", "PersistentVolumeClaim", ("metadata", "name"), "other", "there is no claim"),
        ("gpu", "PersistentVolumeClaim", ("metadata", "namespace"), "other", "has the namespace other"),
        ("gpu-hpa", "Deployment", ("spec", "replicas"), 1, "undo the autoscaler's"),
        ("gpu-hpa", "HorizontalPodAutoscaler", ("spec", "minReplicas"), 9, "9 to 4 replicas"),
        ("gpu-hpa", "HorizontalPodAutoscaler", ("spec", "scaleTargetRef", "name"), "other", "which is not there"),
        (
            "gpu-hpa",
            "HorizontalPodAutoscaler",
            ("spec", "metrics", 0, "pods", "target", "averageValue"),
            ABSENT,
            "no target value",
        ),
        (
            "gpu-hpa",
            "HorizontalPodAutoscaler",
            ("spec", "metrics", 0, "pods", "target", "averageValue"),
            "5",
            "refused before",
        ),
        (
            "gpu-hpa",
            "HorizontalPodAutoscaler",
            ("spec", "metrics", 0, "pods", "metric", "name"),
            "stepweave_in_flight",
            "exposes no stepweave_in_flight",
        ),
        ("gpu-keda", "ScaledObject", (*TRIGGER, "type"), "prometheuss", "no trigger 'prometheuss'"),
        ("gpu-keda", "ScaledObject", (*TRIGGER, "metricType"), "Value", "needs AverageValue"),
        ("gpu-keda", "ScaledObject", (*TRIGGER, "metadata", "ignoreNullValues"), "true", "count as no load"),
        ("gpu-keda", "ScaledObject", (*TRIGGER, "metadata", "threshold"), ABSENT, "no target value"),
        ("gpu-keda", "ScaledObject", (*TRIGGER, "metadata", "query"), "sum(up)", "not of 'stepweave'"),
        ("gpu-keda", "ScaledObject", ("spec", "fallback"), ABSENT, "no fallback"),
        ("gpu-keda", "ScaledObject", ("spec", "minReplicaCount"), 0, "0 to 4 replicas"),
        ("kserve", "InferenceService", ("metadata", "annotations", CLASS), "magic", "no autoscalerClass 'magic'"),
        ("kserve", "InferenceService", ("metadata", "annotations"), {}, "no deploymentMode None"),
        ("kserve", "InferenceService", ("spec", "predictor", "containerConcurrency"), 4, "is Knative's"),
        ("kserve", "InferenceService", ("spec", "predictor", "autoScaling"), EXTERNAL, "has no query"),
        ("kserve", "InferenceService", ("spec", "predictor", "autoScaling"), EXTERNAL, "with autoscalerClass none"),
        ("kserve", "InferenceService", ("spec", "predictor", "maxReplicas"), 0, "minReplicas > maxReplicas"),
        ("kserve", "InferenceService", (*MODEL, "modelFormat", "name"), "onnx", "does not support"),
        ("kserve", "InferenceService", (*MODEL, "storageUri"), ABSENT, "STEPWEAVE_MODEL=/mnt/models is not mounted"),
        ("kserve", "InferenceService", (*MODEL, "readinessProbe"), {"tcpSocket": {}}, "is not the runtime's"),
        ("kserve", "InferenceService", ("spec", "predictor", "terminationGracePeriodSeconds"), 30, "30 < preStop"),
        ("kserve", "ClusterServingRuntime", ("metadata", "namespace"), "a", "has the namespace a"),
        ("kserve-keda", "InferenceService", ("metadata", "annotations", CLASS), "none", "ScaledObjects disagree"),
    ],
)
def test_a_mistake_is_reported(name: str, kind: str, path: tuple[str | int, ...], value: Any, problem: str) -> None:
    documents = overlay(name)
    holder = at(documents, kind, *path[:-1])
    if value is ABSENT:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    assert any(problem in found for found in problems(documents)), problems(documents)


@pytest.mark.parametrize(
    ("setting", "value", "problem"),
    [
        ("STEPWEAVE_MAX_STEP", "50", "there is no such setting (did you mean STEPWEAVE_MAX_STEPS?)"),
        ("STEPWEAVE_MAX_STEPS", "many", "STEPWEAVE_MAX_STEPS='many'"),
        ("STEPWEAVE_REVISION", "main", "STEPWEAVE_REVISION='main'"),
        ("STEPWEAVE_MAX_STEPS", "100", "STEPWEAVE_GRACE 500 < 1000 s of accepted work"),
        ("STEPWEAVE_BATCHING", "threads", "STEPWEAVE_GRACE 500 < 800 s of accepted work"),
        ("STEPWEAVE_GRACE", "300", "STEPWEAVE_GRACE 300 < 500 s of accepted work"),
        ("STEPWEAVE_GRACE", "600", "terminationGracePeriodSeconds 600 < preStop 15 + STEPWEAVE_GRACE 600"),
        ("STEPWEAVE_STATE_DIR", "/var/lib/other", "STEPWEAVE_STATE_DIR /var/lib/other is no volume of its own"),
        ("STEPWEAVE_KEEP_BYTES", "2147483648", "smaller than 2147483648 bytes of pictures"),
        ("STEPWEAVE_KEEP_JOBS", "20000", "smaller than 1073741824 bytes of pictures and 1920000000 of jobs"),
        ("STEPWEAVE_API_KEYS", "secret", "API keys are written into the manifest"),
        ("STEPWEAVE_TRUSTED_HOSTS", "localhost", "no URL of a picture for who calls stepweave.stepweave.svc"),
        ("STEPWEAVE_MAX_PIXELS", "4194304", "worked out for 1048576"),
        ("STEPWEAVE_DEVICE", "cpu", f"a {GPU} that STEPWEAVE_DEVICE does not use"),
        ("HOME", "/home/bentoml", "HOME is /home/bentoml"),
        ("PYTORCH_CUDA_ALLOC_CONF", "", "lets memory fragment"),
    ],
)
def test_a_wrong_variable_is_reported(setting: str, value: str, problem: str) -> None:
    documents = overlay("gpu")
    environment = at(documents, "Deployment", *SERVER, "env")
    environment[:] = [item for item in environment if item["name"] != setting] + [{"name": setting, "value": value}]
    assert any(problem in found for found in problems(documents)), problems(documents)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("sleep(10)", "sleep(9)", "preStop sleeps 0 s and 9 s: too short"),
        ("/var/lib/stepweave/drain", "/tmp/drain", "does not bear the token"),
        ("Bearer {token}", "Basic {token}", "does not bear the token"),
        ("sleep(10)", "sleep(60)", "preStop sleeps 0 s and 60 s: too short for proxies to notice, or too long"),
        ("3000", "8000", "does not ask port 3000"),
        (", timeout=5", "", "without a timeout"),
        ("/drain", "/readyz", "does not drain"),
        ("timeout=5", "timeout=90", "< preStop 100 + STEPWEAVE_GRACE 500"),
    ],
)
def test_a_mistake_in_pre_stop_is_reported(old: str, new: str, problem: str) -> None:
    documents = overlay("gpu")
    command = at(documents, "Deployment", *SERVER, "lifecycle", "preStop", "exec", "command")
    assert old in command[-1]
    command[-1] = command[-1].replace(old, new)
    assert any(problem in found for found in problems(documents)), problems(documents)


def test_a_secret_that_must_be_there_is_reported() -> None:
    documents = overlay("gpu")
    for item in at(documents, "Deployment", *SERVER, "env"):
        item.get("valueFrom", {}).get("secretKeyRef", {}).pop("optional", None)
    assert "without its Secret for HF_TOKEN the pod does not start" in problems(documents)
    environment = at(documents, "Deployment", *SERVER, "env")
    environment[:] = [item for item in environment if item["name"] != "STEPWEAVE_API_KEYS"]
    assert "API keys do not come from a Secret" in problems(documents)


@pytest.mark.parametrize(
    ("name", "kind", "pod"), [("gpu", "Deployment", POD), ("kserve", "ClusterServingRuntime", ("spec",))]
)
def test_a_file_of_keys_that_does_not_follow_an_optional_secret_is_reported(
    name: str, kind: str, pod: tuple[str, ...]
) -> None:
    def found(change: Callable[[Document, Document], object]) -> list[str]:
        documents = overlay(name)
        (mount,) = [one for one in at(documents, kind, *pod, "containers", 0, "volumeMounts") if one["name"] == "keys"]
        (volume,) = [one for one in at(documents, kind, *pod, "volumes") if one["name"] == "keys"]
        change(mount, volume)
        return problems(documents)

    assert found(lambda mount, volume: None) == []
    for change, problem in (
        (lambda mount, volume: mount.update(subPath="clients"), "does not follow its Secret"),
        (lambda mount, volume: mount.update(mountPath="/etc/other"), "not a Secret's alone"),
        (lambda mount, volume: volume["secret"].pop("items"), "not a Secret's alone"),
        (lambda mount, volume: volume["secret"].pop("optional"), "the pod does not start"),
    ):
        assert any(problem in one for one in found(change)), problem


@pytest.mark.parametrize("query", ["a", "sum(a) by (b)", "sum by (b) (a)", "max(a) + sum(b)", "sum(a) or vector(0)"])
def test_a_query_of_more_than_one_series_or_an_invented_zero_is_reported(query: str) -> None:
    assert not is_one_series(query)
    documents = overlay("gpu-keda")
    at(documents, "ScaledObject", *TRIGGER, "metadata")["query"] = query
    assert any("not one series" in found for found in problems(documents))


def test_a_second_autoscaler_is_reported() -> None:
    documents = [*overlay("gpu-keda"), *of_kind(overlay("gpu-hpa"), "HorizontalPodAutoscaler")]
    assert "two autoscalers of 'stepweave'" in problems(documents)


@pytest.mark.parametrize(("scaling", "metric"), [("keda", "memory"), ("hpa", "concurrency")])
def test_a_scale_metric_that_kserve_refuses_is_reported(scaling: str, metric: str) -> None:
    documents = overlay("kserve")
    at(documents, "InferenceService", "metadata", "annotations")[CLASS] = scaling
    at(documents, "InferenceService", "spec", "predictor")["scaleMetric"] = metric
    assert any(found.startswith("scaleMetric") for found in problems(documents))


def test_an_unknown_field_of_a_built_in_kind_is_invalid() -> None:
    (deployment,) = of_kind(overlay("gpu"), "Deployment")
    server = at([deployment], "Deployment", *SERVER)
    server["redinessProbe"] = server.pop("readinessProbe")
    with pytest.raises(kubernetes_validate.ValidationError, match="redinessProbe"):
        kubernetes_validate.validate(deployment, VERSIONS[-1], strict=True)


@pytest.mark.parametrize(
    ("name", "kind", "change"),
    [
        ("gpu-keda", "ScaledObject", lambda document: document["spec"].update(minReplicas=1)),
        ("kserve", "InferenceService", lambda document: document["spec"]["predictor"].update(replicas=1)),
        ("kserve", "ClusterServingRuntime", lambda document: document["spec"].pop("containers")),
    ],
)
def test_a_mistake_in_a_custom_kind_is_invalid(name: str, kind: str, change: Callable[[Document], object]) -> None:
    (document,) = of_kind(overlay(name), kind)
    change(document)
    with pytest.raises(jsonschema.ValidationError):
        validate_custom(document)
