"""The Kubernetes manifests: rendered, validated strictly, and checked for what no schema says.

Each check is a generator of problems, so that the last tests can show that it finds the mistake
that it is there for.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import kubernetes_validate
import promql_parser
import pytest
import uvicorn
import yaml
from starlette.requests import Request

from stepweave.api.middleware.probes import DRAIN
from stepweave.api.urls import base_url
from stepweave.config import EMBEDDED_MODEL, Settings
from stepweave.errors import ConfigError, InvalidRequestError
from stepweave.serving.drain import TOKEN_FILE
from stepweave.serving.lifecycle import ENDING_SECONDS, KEEPING_SECONDS
from stepweave.serving.server import Server
from tests.support.custom_resources import SCHEMAS, validate_custom
from tests.support.environment import ROOT, free_port
from tests.support.in_process import InProcess
from tests.support.served import Served, serve
from tests.support.waiting import SECONDS, wait_until

Document = dict[str, Any]

K8S = ROOT / "k8s"
OVERLAYS = sorted(path.parent.name for path in K8S.glob("overlays/*/kustomization.yaml"))
# the first with unhealthyPodEvictionPolicy and matchLabelKeys on by default, and the last that the
# validator knows
VERSIONS = tuple(f"1.{minor}" for minor in range(27, 38))

GPU = "nvidia.com/gpu"
POD_SECONDS = 30  # that a pod has to end in where nothing is said
REFUSING_SECONDS = 4  # between the end of a drain's notice and SIGTERM
USER = 1034  # of the image
KSERVE_TIMEOUT = 60  # seconds of a request through its gateway where nothing is said
MODEL_MOUNT = "/mnt/models"  # where KServe puts a storageUri
KEDA_TRIGGERS = {
    "prometheus",
    "cron",
    "cpu",
    "memory",
    "metrics-api",
    "external",
    "kubernetes-workload",
}
KSERVE_AUTOSCALERS = {"hpa", "keda", "external", "none"}
CLUSTER_SCOPED = {"Namespace", "ClusterServingRuntime", "ClusterStorageContainer"}
THRESHOLD = "stepweave/scale-at-backlog-seconds"  # the annotation
STARTING = 120  # seconds that a replica takes to start, its scrape and the autoscaler included
FETCHING = 300  # the same where each pod fetches its model: 21 GB take 170 s at 1 Gbit/s
EXCESS = 0.5  # of what the replicas serve, that comes beyond it meanwhile
USUAL_STEPS = 30  # of a request; the most are for the grace period
INITIALIZER_MEMORY = "8Gi"  # at least, where a model of tens of GB is downloaded
INITIALIZER_REQUEST = {"cpu": "100m", "memory": "100Mi"}  # of KServe's own


# --- rendering and schemas ---


@functools.cache
def _rendered(directory: Path) -> str:
    if shutil.which("kubectl") is None:
        pytest.skip("NOT CHECKED: there is no kubectl on this machine to render the manifests with")
    result = subprocess.run(
        ["kubectl", "kustomize", str(directory)], capture_output=True, text=True, timeout=SECONDS
    )
    assert result.returncode == 0 and not result.stderr, result.stderr
    return result.stdout


def render(directory: str) -> list[Document]:
    """The documents of one kustomization, for the caller to change."""
    return list(yaml.safe_load_all(_rendered(K8S / directory)))


def first_of(name: str) -> list[str]:
    """What the README's table has applied before an overlay, in order."""
    (row,) = re.findall(
        rf"^\| `{name}` \| .* \| (.*) \|$", (K8S / "README.md").read_text(), re.MULTILINE
    )
    return re.findall(r"`k8s/([a-z-]+)`", row)


def overlay(name: str) -> list[Document]:
    """An overlay, and what of KServe's kinds is applied before it for the whole cluster."""
    before = [document for folder in first_of(name) for document in render(folder)]
    return [
        *of_kind(before, "ClusterServingRuntime", "ClusterStorageContainer"),
        *render(f"overlays/{name}"),
    ]


def built(directory: Path, kustomizations: dict[str, Document]) -> list[Document]:
    """What is rendered of the first of kustomizations, by folder, beside a copy of the project's in
    `directory`."""
    render("base")  # skips where there is no kubectl
    for folder in ("k8s", "monitoring"):
        shutil.copytree(ROOT / folder, directory / folder)
    for folder, content in kustomizations.items():
        (directory / folder).mkdir(exist_ok=True)
        (directory / folder / "kustomization.yaml").write_text(yaml.safe_dump(content))
    return list(yaml.safe_load_all(_rendered(directory / next(iter(kustomizations)))))


def is_custom(document: Document) -> bool:
    return any(group in document["apiVersion"] for group in ("keda.sh/", "serving.kserve.io/"))


@pytest.mark.parametrize(
    "directory", ["base", "models", "kserve", *(f"overlays/{name}" for name in OVERLAYS)]
)
def test_built_in_kinds_are_valid(directory: str) -> None:
    for document in render(directory):
        if not is_custom(document):
            for version in VERSIONS:
                assert kubernetes_validate.validate(document, version, strict=True) == version


def test_the_documents_name_the_first_version_that_is_tested() -> None:
    for page in (ROOT / "README.md", ROOT / "docs/deploy.md", K8S / "README.md"):
        assert f"Kubernetes {VERSIONS[0]} or newer" in page.read_text()
    assert f"schemas of {VERSIONS[0]} to {VERSIONS[-1]}" in (K8S / "README.md").read_text()


@pytest.mark.parametrize("name", ["gpu-keda", "kserve", "kserve-keda"])
def test_custom_kinds_are_valid(name: str) -> None:
    documents = [document for document in overlay(name) if is_custom(document)]
    assert documents
    for document in documents:
        validate_custom(document)


# --- what a pod will be ---


@dataclass(frozen=True)
class Budget:
    """What a device is given, at most. A slower card needs fewer rows, or a longer grace period."""

    pixels: int  # of an image
    step: float  # seconds of a step that has STEPWEAVE_MAX_ROWS rows
    decode: float  # seconds to decode an image


# on two busy cores the embedded model takes 0.025 s for a row at 128x128
BUDGETS = {"cpu": Budget(128 * 128, 0.8, 0.05), "cuda": Budget(1024 * 1024, 1.0, 0.5)}


def budget_of(settings: Settings) -> Budget:
    return BUDGETS["cpu" if settings.device == "cpu" else "cuda"]


def full_queue(settings: Settings) -> float:
    """Seconds of work that a server has accepted at most: the formula of k8s/README.md."""
    budget = budget_of(settings)
    images = (settings.max_queue + 1) * settings.max_images
    batches = math.ceil(images * 2 / settings.max_rows)  # guidance takes two rows
    return batches * settings.max_steps * budget.step + images * budget.decode


def bridged(work: Workload, threshold: float) -> float:
    """Usual requests of one image that have come until another replica has started."""
    settings = settings_of(work)
    seconds = min(USUAL_STEPS, settings.max_steps) * budget_of(settings).step  # of a full batch
    fetches = not work.container.get("storageUri", "pvc://").startswith("pvc://")
    return (
        settings.max_rows / 2 / seconds * (threshold + EXCESS * (FETCHING if fetches else STARTING))
    )


@dataclass(frozen=True)
class Workload:
    """A Deployment, or the one that KServe will make of an InferenceService."""

    name: str
    namespace: str
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
        return under | {
            key: merge(under[key], value) if key in under else value for key, value in over.items()
        }
    if (
        isinstance(under, list)
        and isinstance(over, list)
        and all(isinstance(item, dict) for item in under + over)
    ):
        key = "mountPath" if any("mountPath" in item for item in under + over) else "name"
        names = {item[key]: item for item in under}
        return list(
            (names | {item[key]: merge(names.get(item[key], {}), item) for item in over}).values()
        )
    return over


def of_kind(documents: list[Document], *kinds: str) -> list[Document]:
    return [document for document in documents if document["kind"] in kinds]


def workloads(documents: list[Document]) -> list[Workload]:
    found = []
    for document in of_kind(documents, "Deployment"):
        meta, template = document["metadata"], document["spec"]["template"]
        found.append(
            Workload(
                meta["name"],
                meta["namespace"],
                template["metadata"]["labels"],
                template["spec"],
                document,
            )
        )
    runtimes = of_kind(documents, "ClusterServingRuntime")
    return found + [
        predictor_of(document, runtimes) for document in of_kind(documents, "InferenceService")
    ]


def runtime_of(service: Document, runtimes: list[Document]) -> Document | None:
    """Which runtime KServe takes, as its GetSupportingRuntimes does."""
    model = service["spec"]["predictor"]["model"]
    for runtime in runtimes:
        named, spec = model.get("runtime") == runtime["metadata"]["name"], runtime["spec"]
        labels = {
            (one["name"], version)
            for one in spec["supportedModelFormats"]
            for version in (None, one.get("version"))
            if named or one.get("autoSelect")
        }
        speaks = model.get("protocolVersion", "v1") in spec["protocolVersions"] or (
            named and "protocolVersion" not in model
        )
        if (
            (named or "runtime" not in model)
            and speaks
            and (model["modelFormat"]["name"], model["modelFormat"].get("version")) in labels
        ):
            return runtime
    return None


def predictor_of(document: Document, runtimes: list[Document]) -> Workload:
    """The Deployment that KServe makes in Standard mode: the InferenceService's pod over the
    runtime's."""
    name, namespace = document["metadata"]["name"], document["metadata"]["namespace"]
    predictor = {
        key: value for key, value in document["spec"]["predictor"].items() if key != "model"
    }
    model = document["spec"]["predictor"]["model"]
    # that none supports it is a problem, told elsewhere
    runtime = runtime_of(document, runtimes) or runtimes[0]
    # nothing else of a runtime's pod is taken
    kept = (
        "nodeSelector",
        "affinity",
        "tolerations",
        "volumes",
        "imagePullSecrets",
        "schedulerName",
    )
    pod = {key: value for key, value in copy.deepcopy(runtime["spec"]).items() if key in kept}
    (server,) = [one for one in runtime["spec"]["containers"] if one["name"] == "kserve-container"]
    text = json.dumps(merge(copy.deepcopy(server), model))
    container = json.loads(text.replace("{{.Name}}", name).replace("{{.Namespace}}", namespace))
    container["env"] = [*container["env"], {"name": "INFERENCE_SERVICE_NAME", "value": name}]
    labels = {"app": f"isvc.{name}-predictor", "serving.kserve.io/inferenceservice": name}
    return Workload(
        f"{name}-predictor",
        namespace,
        labels,
        merge(pod, predictor) | {"containers": [container]},
        document,
    )


def quantity(text: str) -> float:
    """The value of a Kubernetes quantity. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(m|k|[MGTPE]|[KMGTPE]i)?", str(text))
    if match is None:
        raise ValueError(f"{text!r} is no quantity")
    number, unit = match.groups()
    powers = {"m": 1e-3, None: 1, "k": 1e3} | {u: 1000.0 ** (i + 2) for i, u in enumerate("MGTPE")}
    return (
        float(number)
        * (powers | {f"{u}i": 1024.0 ** (i + 1) for i, u in enumerate("KMGTPE")})[unit]
    )


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
    for probe, path in (
        ("startupProbe", "/livez"),
        ("readinessProbe", "/readyz"),
        ("livenessProbe", "/livez"),
    ):
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
    pixels = budget_of(settings).pixels
    if settings.max_pixels > pixels:
        yield (
            f"STEPWEAVE_MAX_PIXELS={settings.max_pixels}, but the grace period is worked out for "
            f"{pixels}"
        )
    if settings.batching != "step":
        yield (
            f"STEPWEAVE_BATCHING={settings.batching}, but the grace period is worked out for "
            f"shared steps"
        )
    if (settings.max_queue + 1) * 2 < settings.max_rows:
        yield (
            f"{settings.max_queue + 1} requests of one image never fill a step of "
            f"{settings.max_rows} rows"
        )
    # what was accepted before the drain is finished: the jobs that run and a full queue
    accepted = full_queue(settings)
    if settings.grace < accepted:
        yield f"STEPWEAVE_GRACE {settings.grace:g} < {accepted:.0f} s of accepted work"
    # the grace begins with the drain or, if that found no ear, after the whole of preStop
    pause, given = (
        pre_stop_seconds(work),
        work.pod.get("terminationGracePeriodSeconds", POD_SECONDS),
    )
    if given < pause + settings.grace + ENDING_SECONDS:
        yield (
            f"terminationGracePeriodSeconds {given} < preStop {pause} + STEPWEAVE_GRACE "
            f"{settings.grace:g} + "
            f"{ENDING_SECONDS:g} s for the last step"
        )


def failure_problems(work: Workload) -> Iterator[str]:
    """A start that fails ends the container, and the end of its log is where `kubectl describe`
    shows it."""
    if work.env.get("STEPWEAVE_EXIT_ON_FAILURE") != "true":
        yield "a model that cannot be loaded does not end the container"
    if work.container.get("terminationMessagePolicy") != "FallbackToLogsOnError":
        yield "the cause of a start that fails is in the log only"


def pre_stop_script(work: Workload) -> str:
    command = (
        work.container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [""])
    )
    # isolated and without site-packages: nothing in the image or the environment can break it, or
    # slow it down
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
    before, after = (
        sum(map(int, re.findall(r"sleep\((\d+)\)", part))) for part in script.split(asking)
    )
    probe = work.container["readinessProbe"]
    # by who asks for /readyz himself, as often as the kubelet does
    noticed = probe["periodSeconds"]
    notice = float(
        work.env.get("STEPWEAVE_DRAIN_NOTICE", Settings.model_fields["drain_notice"].default)
    )
    if after < max(noticed, notice + REFUSING_SECONDS) or before + after > 30:
        yield (
            f"preStop sleeps {before} s and {after} s: too short for proxies to notice, or too "
            f"long to wait"
        )
    path = f'open("{work.env.get("STEPWEAVE_STATE_DIR")}/{TOKEN_FILE}")'
    if path not in script or 'headers={"Authorization": f"Bearer {token}"}' not in script:
        yield f"preStop does not bear the token of the state directory, as by {path}"
    for port in {
        port["containerPort"] for port in work.container["ports"] if port["name"] == "http"
    }:
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
        yield (
            f"STEPWEAVE_STATE_DIR {directory} is no volume of its own: a restart of the container "
            f"forgets it"
        )
        return
    (volume,) = [volume for volume in work.pod["volumes"] if volume["name"] == mounts[directory]]
    if list(mounts.values()).count(volume["name"]) > 1 or "emptyDir" not in volume:
        yield "the state's volume is not one pod's alone, and for nothing else"
        return
    if volume["emptyDir"].get("medium") == "Memory":
        yield "the state's volume counts as the container's memory"
    # a record has both prompts twice, as asked for and as answered, each character at most 6 bytes
    # of JSON
    records = settings.keep_jobs * 2 * 2 * settings.max_prompt_characters * 6
    if quantity(volume["emptyDir"].get("sizeLimit", "0")) < settings.keep_bytes + records:
        yield (
            f"the state's volume is smaller than {settings.keep_bytes} bytes of images and "
            f"{records} of jobs"
        )


def secret_problems(work: Workload) -> Iterator[str]:
    if "STEPWEAVE_API_KEYS" in work.env:
        yield "API keys are written into the manifest"
    references = {
        item["name"]: item.get("valueFrom", {}).get("secretKeyRef")
        for item in work.container["env"]
    }
    if not references.get("STEPWEAVE_API_KEYS"):
        yield "API keys do not come from a Secret"
    path = Path(work.env.get("STEPWEAVE_API_KEYS_FILE", ""))
    mounts = [
        mount for mount in work.container["volumeMounts"] if mount["mountPath"] == str(path.parent)
    ]
    volumes = [
        volume
        for volume in work.pod["volumes"]
        if volume["name"] in [mount["name"] for mount in mounts]
    ]
    secrets = [volume["secret"] for volume in volumes if "secret" in volume]
    if not secrets or path.name not in [item["path"] for item in secrets[0].get("items", [])]:
        # then the directory would not be empty without it
        yield "the file of API keys is not a Secret's alone"
    elif not secrets[0].get("optional"):
        yield "without its Secret for STEPWEAVE_API_KEYS_FILE the pod does not start"
    if any("subPath" in mount for mount in mounts):
        yield "the file of API keys does not follow its Secret"
    for name, reference in references.items():
        if reference and not reference.get("optional"):
            yield f"without its Secret for {name} the pod does not start"


def url_problems(work: Workload) -> Iterator[str]:
    """Images are answered as URLs to who calls the Service by any of its names."""
    rests = (
        "",
        f".{work.namespace}",
        f".{work.namespace}.svc",
        f".{work.namespace}.svc.cluster.local",
    )
    names = [f"{work.name}{rest}" for rest in rests]
    # the last two by KServe's own domainTemplate and ingressDomain
    if work.document["kind"] == "InferenceService":
        name = work.document["metadata"]["name"]
        names += [f"{name}{rest}" for rest in rests]
        names += [f"{host}-{work.namespace}.example.com" for host in (name, work.name)]
    with contextlib.suppress(ConfigError):
        settings = settings_of(work)
        for name in names:
            scope = {
                "type": "http",
                "scheme": "http",
                "path": "/",
                "headers": [(b"host", name.encode())],
            }
            try:
                base_url(Request(scope), settings)
            except InvalidRequestError:
                yield f"no URL of an image for who calls {name}"


def account_problems(pod: Document, documents: list[Document]) -> Iterator[str]:
    accounts = {one["metadata"]["name"]: one for one in of_kind(documents, "ServiceAccount")}
    account = accounts.get(pod.get("serviceAccountName", "default"))
    if account is None:
        yield "security: no ServiceAccount of its own"
    elif account.get("automountServiceAccountToken") is not False or "secrets" in account:
        yield "security: the ServiceAccount has a token, or a Secret that must be there"


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
    yield from (
        f"security: {key} is not {value}"
        for key, value in wanted.items()
        if context.get(key) != value
    )
    for key in ("automountServiceAccountToken", "enableServiceLinks"):
        if work.pod.get(key) is not False:
            yield f"security: {key} is not false"


def volume_problems(work: Workload, documents: list[Document]) -> Iterator[str]:
    volumes = {volume["name"]: volume for volume in work.pod["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in work.container["volumeMounts"]}
    if set(mounts.values()) != set(volumes):
        yield f"mounted {sorted(mounts.values())}, but the volumes are {sorted(volumes)}"
    writable = [
        mount["mountPath"] for mount in work.container["volumeMounts"] if not mount.get("readOnly")
    ]
    for name in ("HOME", "BENTOML_HOME", "TMPDIR", "HF_HOME"):
        path = Path(work.env.get(name, "/tmp"))
        if not any(path.is_relative_to(mount) for mount in writable):
            yield f"{name} is {path}, where nothing can be written"
    if "/" in work.env.get("STEPWEAVE_MODEL", "shapes"):
        cache = Path(work.env.get("HF_HUB_CACHE", MODEL_MOUNT))
        if work.env.get("HF_HUB_OFFLINE") != "1" or not any(
            cache.is_relative_to(one) for one in [*mounts, MODEL_MOUNT]
        ):
            yield "the model is not brought by others: there is no way out to the hub"
    model = work.env.get("STEPWEAVE_MODEL", "")
    brought = [MODEL_MOUNT] if "storageUri" in work.container else []
    if model.startswith("/") and model not in [*mounts, *brought]:
        yield f"STEPWEAVE_MODEL={model} is not mounted"
    known = [*documents, *render("models")]
    claims = {claim["metadata"]["name"]: claim for claim in of_kind(known, "PersistentVolumeClaim")}
    for volume in volumes.values():
        if "persistentVolumeClaim" in volume:
            claim = claims.get(volume["persistentVolumeClaim"]["claimName"])
            if claim is None:
                yield f"there is no claim {volume['persistentVolumeClaim']['claimName']}"
            elif not all(
                mount.get("readOnly")
                for mount in work.container["volumeMounts"]
                if mount["name"] == volume["name"]
            ):
                yield "the servers may write to a volume that they share"


def resource_problems(work: Workload) -> Iterator[str]:
    requests, limits = (work.container["resources"].get(key, {}) for key in ("requests", "limits"))
    try:
        for key in ("cpu", "memory"):
            if key not in requests or quantity(requests[key]) > quantity(
                limits.get(key, requests[key])
            ):
                yield f"{key} has no request, or one over its limit"
        disks = [
            one["emptyDir"]
            for one in work.pod["volumes"]
            if "emptyDir" in one and "medium" not in one["emptyDir"]
        ]
        scratch = sum(quantity(disk.get("sizeLimit", "1")) for disk in disks)
        if quantity(requests.get("ephemeral-storage", "0")) < scratch:
            yield (
                f"ephemeral-storage is requested for less than {scratch:.0f} bytes, the emptyDirs' "
                f"limits"
            )
        if "memory" not in limits:
            yield "memory has no limit"
        if requests.get(GPU) != limits.get(GPU):
            yield f"{GPU}: request {requests.get(GPU)} is not limit {limits.get(GPU)}"
    except ValueError as error:
        yield str(error)
    if work.env.get("STEPWEAVE_DEVICE") != "cuda":
        if GPU in requests and work.env.get("STEPWEAVE_DEVICE") != "auto":
            yield f"a {GPU} that STEPWEAVE_DEVICE does not use"
        return
    if requests.get(GPU) != "1":
        yield f"one process drives one GPU, but {requests.get(GPU)} are requested"
    if not any(
        item["key"] == GPU and item["operator"] == "Exists"
        for item in work.pod.get("tolerations", [])
    ):
        yield f"no toleration of {GPU}"
    if work.env.get("PYTORCH_CUDA_ALLOC_CONF") != "expandable_segments:True":
        yield "PYTORCH_CUDA_ALLOC_CONF lets memory fragment"
    shared = [
        mount["name"]
        for mount in work.container["volumeMounts"]
        if mount["mountPath"] == "/dev/shm"
    ]
    memory = [
        volume["name"]
        for volume in work.pod["volumes"]
        if volume.get("emptyDir", {}).get("medium") == "Memory"
    ]
    if not shared or not set(shared) <= set(memory):
        yield "/dev/shm is not memory"


def deployment_problems(deployment: Document) -> Iterator[str]:
    if not selects(
        deployment["spec"]["selector"], deployment["spec"]["template"]["metadata"]["labels"]
    ):
        yield "the Deployment's selector is not in its pods' labels"


def companion_problems(work: Workload, documents: list[Document]) -> Iterator[str]:
    """What must stand beside every workload and point at its pods."""
    spread = work.pod.get("topologySpreadConstraints", [])
    if not spread or not all(
        selects(constraint["labelSelector"], work.labels) for constraint in spread
    ):
        yield "no topology spread of these pods"
    if any(constraint.get("matchLabelKeys") != ["pod-template-hash"] for constraint in spread):
        yield "in a rollout the topology spread counts the old pods"
    budgets = [budget["spec"] for budget in of_kind(documents, "PodDisruptionBudget")]
    if not any(selects(budget["selector"], work.labels) for budget in budgets):
        yield "no PodDisruptionBudget selects these pods"
    if any(("minAvailable" in budget) == ("maxUnavailable" in budget) for budget in budgets):
        yield "a PodDisruptionBudget has one of minAvailable and maxUnavailable"
    ports = {port["name"] for port in work.container["ports"]}
    policies = [policy["spec"] for policy in of_kind(documents, "NetworkPolicy")]
    if not any(selects(policy["podSelector"], work.labels) for policy in policies):
        yield "no NetworkPolicy selects these pods"
    opened = {
        port["port"] for policy in policies for rule in policy["ingress"] for port in rule["ports"]
    }
    if not opened <= ports:
        yield f"a NetworkPolicy opens {opened}, but the ports are {ports}"
    fetches = "storageUri" in work.container  # the initializer, in the same pod
    if any(policy.get("egress") == [] for policy in policies):
        yield "an empty egress is dropped by the API server, and each diff shows it"
    if any("Egress" not in policy["policyTypes"] for policy in policies):
        yield "a NetworkPolicy lets everything out"
    out = {
        port["port"]
        for policy in policies
        for rule in policy.get("egress", [])
        for port in rule["ports"]
    }
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
            metrics = [
                metric[metric["type"][0].lower() + metric["type"][1:]] for metric in spec["metrics"]
            ]
            values = [
                metric["target"].get(
                    metric["target"]["type"][0].lower() + metric["target"]["type"][1:]
                )
                for metric in metrics
            ]
        if not 1 <= least <= most:
            yield f"{least} to {most} replicas"
        if "pollingInterval" in spec:
            yield "KEDA warns of a pollingInterval that at least one replica makes useless"
        annotations = work.document["metadata"].get("annotations", {})
        if None in values:
            yield f"a metric of the {scaler['kind']} has no target value"
        elif set(values) != {annotations.get(THRESHOLD)}:
            yield (
                f"the {scaler['kind']}'s thresholds are {values}, not those of the annotation "
                f"{THRESHOLD}"
            )
        else:
            yield from threshold_problems(work, quantity(values[0]))
        for service in of_kind(documents, "Service"):
            kept = (
                service["spec"]
                .get("sessionAffinityConfig", {})
                .get("clientIP", {})
                .get("timeoutSeconds", 10_800)
            )
            if (
                service["spec"].get("sessionAffinity") != "ClientIP"
                or kept < Settings.model_fields["keep_seconds"].default
            ):
                yield "a job is not found again among several replicas"
        for policy in behavior["scaleDown"]["policies"]:
            if (policy["type"], policy["value"]) != ("Pods", 1) or policy["periodSeconds"] < 300:
                yield "scales down faster than one pod per 5 minutes"
        if work.document["kind"] == "Deployment" and "replicas" in work.document["spec"]:
            yield "the Deployment's replicas undo the autoscaler's at each apply"
    yield from (f"two autoscalers of {name!r}" for name in set(targets) if targets.count(name) > 1)


def threshold_problems(work: Workload, threshold: float) -> Iterator[str]:
    """A full batch must not buy a second GPU, and the queue bridges the other replica's start."""
    with contextlib.suppress(ConfigError):
        settings = settings_of(work)
        longest = settings.max_steps * budget_of(settings).step
        if threshold < longest:
            yield f"a replica is added at {threshold:g} s, less than one full batch's {longest:g} s"
        if bridged(work, threshold) > settings.max_queue:
            yield (
                f"{bridged(work, threshold):.0f} requests come before a replica has started: they "
                f"are refused"
            )


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
        if labels.get("namespace") != work.namespace:
            yield f"the query's namespace is not {work.namespace!r}"
        chosen = {
            name
            for name in names | {"stepweave", "stepweave-predictor"}
            if pod_matches(labels.get("pod", ""), name)
        }
        if chosen != {work.name}:
            yield f"the query's pods are those of {sorted(chosen)}, not of {work.name!r}"


def is_one_series(query: str) -> bool:
    """Whether the query is a plain sum, which is one series without labels and there as soon as one
    pod is scraped."""
    return re.fullmatch(r"sum\(\w+(\{[^{}]*(\{\d+\})?[^{}]*\})?\)", query) is not None


def pod_matches(pattern: str, deployment: str) -> bool:
    return re.fullmatch(pattern, f"{deployment}-7d9f8c6b5d-x2x4z") is not None


def kserve_problems(documents: list[Document]) -> Iterator[str]:
    """KServe's own rules, which its CRD does not hold."""
    scaled = {
        scaler["spec"]["scaleTargetRef"]["name"] for scaler in of_kind(documents, "ScaledObject")
    }
    runtimes = of_kind(documents, "ClusterServingRuntime")
    for service in of_kind(documents, "InferenceService"):
        annotations, predictor = (
            service["metadata"].get("annotations", {}),
            service["spec"]["predictor"],
        )
        mode = annotations.get("serving.kserve.io/deploymentMode")
        scaling = annotations.get("serving.kserve.io/autoscalerClass", "hpa")
        if mode not in {"Standard", "Knative"}:
            yield f"KServe has no deploymentMode {mode!r}"
        if mode == "Standard":
            yield from (
                f"{key} is Knative's"
                for key in ("containerConcurrency", "scaleTarget")
                if key in predictor
            )
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
                if scaling == "keda" and "value" not in metric["external"]["target"]:
                    yield "KServe passes on nothing but target.value"
        if predictor.get("minReplicas", 1) > predictor.get(
            "maxReplicas", predictor.get("minReplicas", 1)
        ):
            yield "minReplicas > maxReplicas"
        if (scaling == "external") != (f"{service['metadata']['name']}-predictor" in scaled):
            yield f"autoscalerClass {scaling} and the ScaledObjects disagree"
        runtime = runtime_of(service, runtimes)
        if runtime is None:
            yield "no runtime supports the model's format and protocol"
        elif (
            predictor["model"].get(
                "readinessProbe", runtime["spec"]["containers"][0]["readinessProbe"]
            )
            != (runtime["spec"]["containers"][0]["readinessProbe"])
        ):
            yield "the InferenceService's readinessProbe is not the runtime's"
        for work in workloads([service, *runtimes]) if runtime else ():
            yield from route_problems(service, work)
        yield from storage_problems(service, of_kind(documents, "ClusterStorageContainer"))


def route_problems(service: Document, work: Workload) -> Iterator[str]:
    """KServe's HTTPRoute ends an answer after `timeout`: one that waits for a full queue must not
    be ended."""
    given = service["spec"]["predictor"].get("timeout", KSERVE_TIMEOUT)
    with contextlib.suppress(ConfigError):
        if given < settings_of(work).grace:
            yield f"KServe's gateway ends a request after {given} s"


def storage_problems(service: Document, containers: list[Document]) -> Iterator[str]:
    predictor = service["spec"]["predictor"]
    uri, name = predictor["model"].get("storageUri"), predictor.get("storageContainerName")
    if uri is None:
        return
    # KServe looks for the named one before it asks whether the URI needs any
    spec = {one["metadata"]["name"]: one["spec"] for one in containers}.get(name or "")
    if name is not None and spec is None:
        yield f"there is no ClusterStorageContainer {name}"
    elif spec is not None and not any(
        uri.startswith(one["prefix"]) for one in spec["supportedUriFormats"]
    ):
        yield f"the ClusterStorageContainer does not know {uri}"
    if uri.startswith(("pvc://", "oci://")):  # mounted
        return
    if spec is None:
        yield "KServe's own storage initializer has 1 GiB of memory"
        return
    if quantity(spec["container"]["resources"]["limits"]["memory"]) < quantity(INITIALIZER_MEMORY):
        yield f"the storage initializer has less than {INITIALIZER_MEMORY} of memory"
    given = {item["name"]: item.get("value") for item in spec["container"]["env"]}
    if given.get("HF_XET_HIGH_PERFORMANCE") != "0":
        yield (
            "the storage initializer buffers 16 GB and more: KServe sets HF_XET_HIGH_PERFORMANCE "
            "where it is not set"
        )
    match = re.fullmatch(r"(\d+)gb", given.get("HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_LIMIT") or "")
    if match is None or int(match[1]) * 2e9 > quantity(INITIALIZER_MEMORY):
        yield "the storage initializer's buffers may take more than half of its memory"


def scope_problems(documents: list[Document]) -> Iterator[str]:
    spaces = {
        one["metadata"]["namespace"]
        for one in of_kind(documents, "Deployment", "InferenceService", "Job")
    }
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
    found = [
        *scope_problems(documents),
        *autoscaler_problems(documents),
        *kserve_problems(documents),
    ]
    for deployment in of_kind(documents, "Deployment"):
        found += deployment_problems(deployment)
    for work in workloads(documents):
        found += [
            *probe_problems(work),
            *grace_problems(work),
            *security_problems(work),
            *resource_problems(work),
        ]
        found += [*volume_problems(work, documents), *companion_problems(work, documents)]
        found += [*failure_problems(work), *account_problems(work.pod, documents)]
        found += [
            *drain_problems(work),
            *state_problems(work),
            *secret_problems(work),
            *url_problems(work),
        ]
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
    assert set(re.findall(r"^\| `([a-z-]+)` \| ", readme, re.MULTILINE)) == set(OVERLAYS)
    texts = readme + "".join(path.read_text() for path in K8S.glob("overlays/*/kustomization.yaml"))
    assert all(
        re.search(rf"components/{path.name}(\?.*)?\n", texts) for path in K8S.glob("components/*")
    )


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_has_all_that_it_names_once_what_the_readme_says_is_applied(name: str) -> None:
    own, before = (
        render(f"overlays/{name}"),
        [one for folder in first_of(name) for one in render(folder)],
    )
    there = {
        (one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"])
        for one in [*before, *own]
    }
    for document in [one for one in [*before, *own] if one["kind"] not in CLUSTER_SCOPED]:
        assert ("Namespace", None, document["metadata"]["namespace"]) in there, document
    (work,) = workloads(overlay(name))
    claims = [
        one["persistentVolumeClaim"]["claimName"]
        for one in work.pod["volumes"]
        if "persistentVolumeClaim" in one
    ]
    assert {("PersistentVolumeClaim", work.namespace, claim) for claim in claims} <= there
    for service in of_kind(own, "InferenceService"):
        predictor = service["spec"]["predictor"]
        assert ("ClusterServingRuntime", None, predictor["model"]["runtime"]) in there
        assert ("ClusterStorageContainer", None, predictor["storageContainerName"]) in there
    # the steps to follow say the same, in that order
    for page in (ROOT / "docs/deploy.md", K8S / "README.md"):
        text = page.read_text()
        steps = [
            text.find(f"kubectl apply -k k8s/{step}")
            for step in [*first_of(name), f"overlays/{name}"]
        ]
        assert -1 not in steps[:-1]
        assert [step for step in steps if step != -1] == sorted(
            step for step in steps if step != -1
        )


@pytest.mark.parametrize("name", OVERLAYS)
def test_deleting_an_overlay_takes_nothing_from_others(name: str) -> None:
    """Neither models nor keys, nor anything that another kustomization brings or uses, nor what is
    the cluster's."""
    mine = render(f"overlays/{name}")
    assert not of_kind(
        mine, "PersistentVolumeClaim", "Secret", "ClusterServingRuntime", "ClusterStorageContainer"
    )
    spaces = {one["metadata"]["name"] for one in of_kind(mine, "Namespace")}
    parts = {path.parent for path in K8S.glob("*/kustomization.yaml")} - {
        K8S / "base",
        K8S / "namespace",
    }
    for other in [*parts, *(K8S / "overlays" / one for one in OVERLAYS if one != name)]:
        for document in yaml.safe_load_all(_rendered(other)):
            assert document["metadata"].get("namespace") not in spaces, other
            assert document["kind"] != "Namespace" or document["metadata"]["name"] not in spaces, (
                other
            )
    kept = {(one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"])
            for folder in parts for one in yaml.safe_load_all(_rendered(folder))}  # fmt: skip
    assert not kept & {
        (one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"]) for one in mine
    }


def test_both_pods_drain_alike() -> None:
    demo, own, kserve = (
        workloads(overlay(name))[0].container["lifecycle"] for name in ("cpu-demo", "gpu", "kserve")
    )
    assert demo == own == kserve


def test_a_rollout_of_the_demo_finds_room_on_a_node_of_two_cores() -> None:
    """Its pods beside each other, and as much as Kubernetes itself asks for on such a node."""
    (work,) = workloads(overlay("cpu-demo"))
    rolling = work.document["spec"]["strategy"]["rollingUpdate"]
    assert (rolling["maxSurge"], rolling["maxUnavailable"]) == (1, 0)
    requests = work.container["resources"]["requests"]
    pods = work.document["spec"]["replicas"] + rolling["maxSurge"]
    assert pods * quantity(requests["cpu"]) + 1 <= 2
    assert pods * quantity(requests["memory"]) <= quantity("2Gi")


def run_pre_stop(port: int, state: Path, *, sleeps: bool = False) -> int:
    """The manifest's own command with the given port and state directory, and without its sleeps if
    so; its exit status."""
    (work,) = workloads(overlay("gpu"))
    *_, script = command = list(work.container["lifecycle"]["preStop"]["exec"]["command"])
    command[0] = sys.executable
    command[-1] = script.replace("3000", str(port))
    if not sleeps:
        command[-1] = re.sub(r"sleep\(\d+\)", "sleep(0)", command[-1])
    assert "/var/lib/stepweave/" in command[-1]
    command[-1] = command[-1].replace("/var/lib/stepweave/", f"{state}/")
    assert str(port) in command[-1]
    return subprocess.run(
        command, timeout=SECONDS, env={"http_proxy": "http://127.0.0.1:9"}
    ).returncode


def test_pre_stop_drains_the_server_in_its_pod(
    in_process: Callable[..., InProcess], tmp_path: Path
) -> None:
    made, port = in_process(state_dir=str(tmp_path), drain_notice=0), free_port()
    runner = uvicorn.Server(
        uvicorn.Config(made.client.app, "127.0.0.1", port, lifespan="off", log_level="warning")
    )
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
    texts = re.findall(
        r"^```yaml\n(.*?)^```", (K8S / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
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


def test_the_readmes_route_lets_through_what_the_server_takes() -> None:
    (route,) = of_kind(blocks_of_the_readme(), "HTTPRoute")
    (ingress,) = of_kind(blocks_of_the_readme(), "Ingress")
    assert route["spec"]["hostnames"] == [rule["host"] for rule in ingress["spec"]["rules"]]
    (service,) = of_kind(overlay("gpu"), "Service")
    (rule,) = route["spec"]["rules"]
    (backend,) = rule["backendRefs"]
    assert (backend["name"], route["metadata"]["namespace"]) == (
        "stepweave",
        service["metadata"]["namespace"],
    )
    assert backend["port"] in {port["port"] for port in service["spec"]["ports"]}
    # a limit would end a stream; 0s is none (GEP-2257)
    assert rule["timeouts"] == {"request": "0s", "backendRequest": "0s"}


def test_the_readmes_route_fits_its_schema() -> None:
    (route,) = of_kind(blocks_of_the_readme(), "HTTPRoute")
    schema = SCHEMAS / "httproute-gateway.networking.k8s.io-v1.json"
    if not schema.exists():
        pytest.skip(f"NOT CHECKED: there is no {schema}; STEPWEAVE_K8S_SCHEMAS names another place")
    validate_custom(route)


def of_the_readme(*texts: str) -> Document:
    """The one block that has all `texts` in it, its resources and components taken from this
    project."""
    (block,) = [
        block
        for block in blocks_of_the_readme()
        if all(text in json.dumps(block) for text in texts)
    ]
    for key in ("resources", "components"):
        block[key] = [
            re.sub(r"https://[^?]*//([^?]*)(\?ref=main)?", r"../\1", one)
            for one in block.get(key, [])
        ]
    return block


def test_the_readmes_patch_gives_the_ingress_urls(tmp_path: Path) -> None:
    (ingress,) = of_kind(blocks_of_the_readme(), "Ingress")
    documents = built(tmp_path, {"mine": of_the_readme("STEPWEAVE_BASE_URL")})
    assert problems(documents) == []
    assert (
        settings_of(workloads(documents)[0]).base_url
        == f"https://{ingress['spec']['rules'][0]['host']}"
    )


def test_the_readmes_own_overlay_is_sound_and_the_autoscaler_follows_it(tmp_path: Path) -> None:
    mine, scaled = of_the_readme("nodeSelector"), of_the_readme("../mine")
    documents = built(tmp_path, {"mine-keda": scaled, "mine": mine})
    assert problems(documents) == []
    (deployment,), (scaler,) = (of_kind(documents, kind) for kind in ("Deployment", "ScaledObject"))
    threshold = deployment["metadata"]["annotations"][THRESHOLD]
    assert scaler["spec"]["triggers"][0]["metadata"]["threshold"] == threshold != "60"
    assert deployment["spec"]["template"]["spec"]["nodeSelector"]
    assert deployment["spec"]["template"]["spec"]["containers"][0]["image"].startswith(
        "registry.example.org/stepweave:"
    )


def test_the_readmes_patch_has_prometheus_bear_a_key_of_the_same_secret(tmp_path: Path) -> None:
    documents = built(tmp_path, {"mine": of_the_readme("authorization")})
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


@pytest.mark.parametrize("name", ["cpu-demo", "gpu", "kserve"])
def test_the_readmes_numbers_are_those_of_the_manifests(name: str) -> None:
    table = re.findall(
        r"^\|(.*)\|$", (K8S / "README.md").read_text().split("## Queue")[1], re.MULTILINE
    )
    rows = [[cell.strip() for cell in line.split("|")] for line in table]
    column = rows[0].index(f"`{name}`")
    told = [row[column] for row in rows[2:]]
    (work,) = workloads(overlay(name))
    settings = settings_of(work)
    threshold = float(work.document["metadata"]["annotations"][THRESHOLD])
    numbers = [
        settings.max_rows,
        budget_of(settings).step,
        budget_of(settings).decode,
        settings.max_images,
        settings.max_steps,
        settings.max_queue,
        math.ceil(full_queue(settings)),
        settings.grace,
        work.pod["terminationGracePeriodSeconds"],
    ]
    if name != "cpu-demo":  # which no autoscaler is meant for
        numbers.append(bridged(work, threshold))
    assert told == [f"{number:g}" for number in numbers] + [""] * (name == "cpu-demo")


def test_the_readmes_worked_example_is_that_of_the_gpu_overlay() -> None:
    (work,) = workloads(overlay("gpu"))
    one, budget, text = (
        settings_of(work),
        budget_of(settings_of(work)),
        " ".join((K8S / "README.md").read_text().split()),
    )
    images = (one.max_queue + 1) * one.max_images
    batches = math.ceil(images * 2 / one.max_rows)
    assert (
        f"{one.max_queue + 1} x {one.max_images} = {images} images, {images} x 2 / {one.max_rows} "
        f"= {batches} batches, "
        f"{batches} x {one.max_steps} x {budget.step:g} s + {images} x {budget.decode:g} s = "
        f"{full_queue(one):g} s"
    ) in text
    threshold = float(work.document["metadata"]["annotations"][THRESHOLD])
    rate = one.max_rows / 2 / (USUAL_STEPS * budget.step)
    assert f"more than {threshold:g} s of predicted work" in text
    assert f"(50 steps of {budget.step:g} s)" in text
    assert one.max_steps == 50
    assert f"({STARTING} s) that a replica takes to start" in text
    assert (
        f"serves {one.max_rows // 2} requests in {USUAL_STEPS} s. When the autoscaler adds a "
        f"replica, {threshold:g} s of work are waiting: {rate * threshold:g} requests"
    ) in text
    assert (
        f"In the next {STARTING} s, {rate * (1 + EXCESS) * STARTING:g} requests arrive and "
        f"{rate * STARTING:g} are served, so {rate * EXCESS * STARTING:g} more are waiting. "
        f"Together these are {bridged(work, threshold):g} requests; the queue holds "
        f"{one.max_queue}"
    ) in text
    assert EXCESS == 0.5


def test_the_readmes_example_of_a_model_that_each_pod_fetches_is_that_of_kserve() -> None:
    (work,) = workloads(overlay("kserve"))
    one, text = settings_of(work), " ".join((K8S / "README.md").read_text().split())
    threshold = float(work.document["metadata"]["annotations"][THRESHOLD])
    rate = one.max_rows / 2 / (USUAL_STEPS * budget_of(one).step)
    assert (
        f"({FETCHING} s), as 21 GB take 170 s at 1 Gbit/s. One replica serves {one.max_rows // 2} "
        f"requests in {USUAL_STEPS} s, so {threshold:g} s of work are {rate * threshold:g} "
        f"requests. In the next {FETCHING} s, {rate * (1 + EXCESS) * FETCHING:g} requests arrive "
        f"and {rate * FETCHING:g} are served, so {rate * EXCESS * FETCHING:g} more are waiting. "
        f"Together these are {bridged(work, threshold):g} requests; the queue holds "
        f"{one.max_queue}"
    ) in text
    assert one.max_images == 1
    assert work.container["storageUri"].startswith("hf://")
    assert FETCHING >= STARTING + 170


# --- the models ---


def job_of(documents: list[Document]) -> tuple[Document, Document]:
    """The Job's pod and container."""
    (job,) = of_kind(documents, "Job")
    pod = job["spec"]["template"]["spec"]
    return pod, pod["containers"][0]


def test_the_job_brings_what_the_servers_read() -> None:
    pod, container = job_of(render("models"))
    (work,) = workloads(overlay("gpu"))
    theirs = {item["name"]: item.get("value") for item in container["env"]}
    for name in ("STEPWEAVE_MODEL", "STEPWEAVE_REVISION", "STEPWEAVE_VARIANT", "HF_HUB_CACHE"):
        assert theirs.get(name) == work.env.get(name), name
    claims = [
        [one for one in each["volumes"] if "persistentVolumeClaim" in one]
        for each in (pod, work.pod)
    ]
    assert claims[0] == claims[1] != []
    paths = [
        [
            mount["mountPath"]
            for mount in each["volumeMounts"]
            if mount["name"] == claims[0][0]["name"]
        ]
        for each in (container, work.container)
    ]
    assert paths[0] == paths[1]
    assert container["image"] == work.container["image"]
    assert "HF_HUB_OFFLINE" not in theirs


def test_the_job_is_as_restricted_as_the_servers_and_reaches_the_hub() -> None:
    documents = render("models")
    pod, container = job_of(documents)
    server = workloads(overlay("gpu"))[0]
    assert pod["securityContext"] == server.pod["securityContext"]
    assert container["securityContext"] == server.container["securityContext"]
    assert list(account_problems(pod, documents)) == list(scope_problems(documents)) == []
    (policy,), (job,) = (of_kind(documents, kind) for kind in ("NetworkPolicy", "Job"))
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert selects(policy["spec"]["podSelector"], labels)
    assert "ingress" not in policy["spec"]
    assert {port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]} == {
        53,
        443,
    }
    (service,) = of_kind(overlay("gpu"), "Service")
    # else it would be sent requests
    assert not selects({"matchLabels": service["spec"]["selector"]}, labels)
    assert {"ephemeral-storage", "cpu", "memory"} <= set(container["resources"]["requests"])
    assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"


def test_the_readmes_models_are_those_of_its_own_overlay(tmp_path: Path) -> None:
    documents = built(
        tmp_path,
        {
            "my-models": of_the_readme("registry.example.org/stepweave", "batch/v1"),
            "mine": of_the_readme("registry.example.org/stepweave", "apps/v1"),
        },
    )
    pod, container = job_of(documents)
    (work,) = workloads(list(yaml.safe_load_all(_rendered(tmp_path / "mine"))))
    theirs = {item["name"]: item.get("value") for item in container["env"]}
    assert container["image"] == work.container["image"]
    assert container["image"].startswith("registry.example.org/stepweave:")
    for name in ("STEPWEAVE_MODEL", "STEPWEAVE_REVISION", "HF_HUB_CACHE"):
        assert theirs[name] == work.env[name], name
    for document in documents:
        kubernetes_validate.validate(document, VERSIONS[-1], strict=True)
    text = " ".join((K8S / "README.md").read_text().split())
    labels = of_kind(documents, "Job")[0]["spec"]["template"]["metadata"]["labels"]
    for command in (
        "logs job/stepweave-models",
        f"describe pod -l app.kubernetes.io/name={labels['app.kubernetes.io/name']}",
        "delete job stepweave-models",
    ):
        assert f"kubectl -n stepweave {command}" in text


def run_job(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The Job's own command and variables, with another cache."""
    _, container = job_of(render("models"))
    given = {item["name"]: item["value"] for item in container["env"] if "value" in item}
    given |= {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT / "src"),
        "HOME": str(tmp_path),
        **environment,
    }
    command = [sys.executable, *container["command"][1:]]
    return subprocess.run(
        command, env=given, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS
    )


@pytest.mark.full
def test_the_job_finds_a_model_that_is_there_already_as_the_servers_do(tmp_path: Path) -> None:
    """No hub is in reach here: the cache holds it."""
    _, container = job_of(render("models"))
    named = {item["name"]: item.get("value", "") for item in container["env"]}
    folder = f"models--{named['STEPWEAVE_MODEL'].replace('/', '--')}"
    snapshot = tmp_path / "hub" / folder / "snapshots" / named["STEPWEAVE_REVISION"]
    shutil.copytree(EMBEDDED_MODEL, snapshot)
    ended = run_job(tmp_path, HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == f"{named['STEPWEAVE_MODEL']} is in {snapshot}"


def test_a_job_that_cannot_write_says_who_owns_the_volume(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ended = run_job(tmp_path, HF_HUB_CACHE=str(tmp_path / "file" / "hub"))
    assert ended.returncode == 1
    owner = (tmp_path / "file").stat()
    assert ended.stderr.splitlines()[-1] == (
        f"stepweave: user {os.getuid()} cannot write to the cache {tmp_path}/file/hub (Not a "
        f"directory): {tmp_path}/file belongs to {owner.st_uid}:{owner.st_gid} with mode "
        f"{owner.st_mode & 0o777:o}"
    )


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"STEPWEAVE_MODEL": "shapes", "STEPWEAVE_REVISION": ""},
            "STEPWEAVE_MODEL='shapes' is not a hub id",
        ),
        ({"STEPWEAVE_REVISION": "main"}, "STEPWEAVE_REVISION='main'"),
        pytest.param(
            {"HF_HUB_OFFLINE": "1"},
            "the hub cannot be reached, and its cache does not hold the model",
            marks=pytest.mark.full,
        ),
    ],
)
def test_a_job_that_cannot_bring_the_model_ends_with_the_cause(
    settings: dict[str, str], told: str, tmp_path: Path
) -> None:
    ended = run_job(tmp_path, HF_HUB_CACHE=str(tmp_path / "hub"), **settings)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("stepweave: ")
    assert told in ended.stderr.splitlines()[-1]


def test_a_volume_of_roots_is_given_to_the_user_of_the_image(tmp_path: Path) -> None:
    documents = built(tmp_path, {"mine": of_the_readme("components/chown")})
    for document in documents:
        for version in VERSIONS:
            kubernetes_validate.validate(document, version, strict=True)
    (claim,), (namespace,) = (
        of_kind(documents, kind) for kind in ("PersistentVolumeClaim", "Namespace")
    )
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    assert namespace["metadata"]["labels"] == {"pod-security.kubernetes.io/enforce": "baseline"}
    pod, container = job_of(documents)
    (chown,) = pod["initContainers"]
    (mount,) = chown["volumeMounts"]
    assert mount in container["volumeMounts"]
    assert chown["command"] == ["chown", f"{USER}:{USER}", mount["mountPath"]]
    assert chown["securityContext"]["runAsUser"] == 0
    assert chown["securityContext"]["capabilities"] == {
        "drop": ["ALL"],
        "add": ["CHOWN"],
    }  # of those that baseline allows


def test_one_secret_has_the_token_of_the_hub() -> None:
    _, container = job_of(render("models"))
    (storage,) = of_kind(overlay("kserve"), "ClusterStorageContainer")
    references = [
        [item["valueFrom"]["secretKeyRef"] for item in each["env"] if item["name"] == "HF_TOKEN"]
        for each in (container, storage["spec"]["container"])
    ]
    assert (
        references[0]
        == references[1]
        == [{"name": "huggingface", "key": "HF_TOKEN", "optional": True}]
    )
    assert (
        "create secret generic huggingface --from-literal HF_TOKEN="
        in (K8S / "README.md").read_text()
    )


# --- KServe ---


def own_services() -> dict[str, Document]:
    """The README's InferenceServices, in a namespace each."""
    found = {
        one["metadata"]["name"]: one for one in of_kind(blocks_of_the_readme(), "InferenceService")
    }
    for document in found.values():
        document["metadata"].setdefault("namespace", "default")
    return found


def test_a_minimal_inference_service_finds_the_runtime_and_ends_in_its_time() -> None:
    documents = overlay("kserve")
    runtimes, service = of_kind(documents, "ClusterServingRuntime"), own_services()["small"]
    validate_custom(service)
    assert set(service["spec"]["predictor"]["model"]) == {"modelFormat", "storageUri"}
    assert runtime_of(service, runtimes) == runtimes[0]
    assert not list(kserve_problems([service, *runtimes]))
    work = predictor_of(service, runtimes)
    assert "terminationGracePeriodSeconds" not in work.pod
    settings = settings_of(work)
    # what runs is told to end before the kubelet kills it, with the time that is left for a step
    # and its results
    assert pre_stop_seconds(work) + settings.grace + KEEPING_SECONDS <= POD_SECONDS
    for found in (
        probe_problems,
        drain_problems,
        failure_problems,
        state_problems,
        secret_problems,
        url_problems,
    ):
        assert not list(found(work)), found
    requests = work.container["resources"]["requests"]
    assert GPU not in requests
    assert settings.device == "auto"


def test_a_runtime_of_v2_alone_is_found_by_no_minimal_inference_service() -> None:
    (runtime,) = of_kind(overlay("kserve"), "ClusterServingRuntime")
    service = own_services()["small"]
    for protocols, model, found in (
        (["v2"], {}, False),
        (["v2"], {"protocolVersion": "v2"}, True),
        (["v2"], {"runtime": "stepweave"}, True),
        (["v1", "v2"], {"modelFormat": {"name": "diffusers", "version": "2"}}, False),
    ):
        changed, other = copy.deepcopy(service), copy.deepcopy(runtime)
        other["spec"]["protocolVersions"] = protocols
        changed["spec"]["predictor"]["model"] |= model
        assert (runtime_of(changed, [other]) is not None) == found, (protocols, model)


def test_the_readmes_inference_service_is_sound() -> None:
    documents = overlay("kserve")
    shipped = of_kind(documents, "ClusterServingRuntime", "ClusterStorageContainer")
    service = own_services()["painter"]
    validate_custom(service)
    assert not list(kserve_problems([service, *shipped]))
    (work,) = workloads([service, *shipped])
    for found in (
        probe_problems,
        grace_problems,
        failure_problems,
        security_problems,
        resource_problems,
        drain_problems,
    ):
        assert not list(found(work)), found
    assert not [*state_problems(work), *secret_problems(work), *url_problems(work)]
    (metric,) = service["spec"]["predictor"]["autoScaling"]["metrics"]
    query = metric["external"]["metric"]["query"]
    assert is_one_series(query)
    assert f'namespace="{work.namespace}"' in query
    assert pod_matches(re.findall(r'pod=~"([^"]*)"', query)[0], work.name)
    assert set(re.findall(r"stepweave_\w+", query)) <= exposed()
    assert not list(threshold_problems(work, float(metric["external"]["target"]["value"])))


def test_the_storage_initializer_is_kserves_own_but_for_what_is_said() -> None:
    """It is laid over KServe's own container, whose name it must have; an image would pin a version
    of KServe."""
    (storage,) = of_kind(overlay("kserve"), "ClusterStorageContainer")
    container = storage["spec"]["container"]
    assert container["name"] == "storage-initializer"
    assert "image" not in container
    assert storage["spec"]["workloadType"] == "initContainer"
    # others may get it, too
    assert container["resources"]["requests"] == INITIALIZER_REQUEST
    (said,) = re.findall(
        r"It may affect other InferenceServices.*?KServe's own\.",
        (K8S / "README.md").read_text(),
        re.DOTALL,
    )
    downloaded = {one["prefix"] for one in storage["spec"]["supportedUriFormats"]} - {
        "pvc://",
        "oci://",
    }
    assert set(re.findall(r"`(\w+://)`", said)) == downloaded


@pytest.mark.parametrize(
    "uri", ["hf://a/b", "s3://a/b", "gs://a/b", "pvc://models/a", "oci://registry.example.org/a:1"]
)
def test_the_storage_container_can_be_named_with_whatever_the_runtime_says_it_brings(
    uri: str,
) -> None:
    documents = overlay("kserve")
    at(documents, "InferenceService", *MODEL)["storageUri"] = uri
    assert not list(kserve_problems(documents))
    formats = at(documents, "ClusterStorageContainer", "spec", "supportedUriFormats")
    formats[:] = [one for one in formats if not uri.startswith(one["prefix"])]
    assert list(kserve_problems(documents)) == [f"the ClusterStorageContainer does not know {uri}"]
    text = (K8S / "kserve" / "clusterservingruntime.yaml").read_text()
    assert uri.partition(":")[0] in re.findall(r"storageUri \((.*?)\)", text)[0].split(", ")


def test_the_runtime_speaks_v2_first() -> None:
    """An InferenceGraph takes the first."""
    (runtime,) = of_kind(overlay("kserve"), "ClusterServingRuntime")
    assert runtime["spec"]["protocolVersions"] == ["v2", "v1"]


def test_the_readme_names_what_kserves_own_scaled_object_lacks() -> None:
    (scaler,) = of_kind(overlay("kserve-keda"), "ScaledObject")
    text = " ".join((K8S / "README.md").read_text().split("## With KServe")[1].split())
    assert scaler["spec"]["triggers"][0]["metadata"]["ignoreNullValues"] == "false"
    for lacking in (
        "a fallback for a Prometheus that is down",
        "one pod less per five minutes",
        "`ignoreNullValues`",
    ):
        assert lacking in text


# --- the autoscalers' metric ---


def test_the_adapters_rule_serves_the_metric_that_the_hpa_asks_for() -> None:
    values = yaml.safe_load((K8S / "components" / "hpa" / "prometheus-adapter.yaml").read_text())
    (rule,) = values["rules"]["custom"]
    (hpa,) = of_kind(overlay("gpu-hpa"), "HorizontalPodAutoscaler")
    (metric,) = hpa["spec"]["metrics"]
    assert rule["name"] == {"as": metric["pods"]["metric"]["name"]}
    assert set(rule["resources"]["overrides"]) == {"namespace", "pod"}
    found = promql_parser.parse(rule["seriesQuery"])
    assert found.name in exposed()
    # as the adapter fills it in, for the pods that the HPA asks for
    query = rule["metricsQuery"]
    for placeholder, text in (
        ("Series", found.name),
        ("LabelMatchers", 'namespace="stepweave",pod=~"a|b"'),
        ("GroupBy", "pod"),
    ):
        assert f"<<.{placeholder}>>" in query
        query = query.replace(f"<<.{placeholder}>>", text)
    parsed = promql_parser.parse(query)
    assert (str(parsed.op), parsed.modifier.labels, parsed.expr.name) == (
        "sum",
        ["pod"],
        found.name,
    )
    readme = " ".join((K8S / "README.md").read_text().split())
    assert "components/hpa/prometheus-adapter.yaml" in readme
    assert "Helm replaces lists" in readme  # so it would take one's own rules away


@pytest.mark.parametrize(
    "path", sorted(K8S.rglob("*.yaml")), ids=lambda path: str(path.relative_to(K8S))
)
def test_every_file_begins_with_its_reason(path: Path) -> None:
    assert path.read_text().startswith("# ")


def test_the_two_autoscalers_scale_alike() -> None:
    (hpa,) = of_kind(overlay("gpu-hpa"), "HorizontalPodAutoscaler")
    (keda,) = of_kind(overlay("gpu-keda"), "ScaledObject")
    hpa, keda = hpa["spec"], keda["spec"]
    assert keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == hpa["behavior"]
    assert (keda["minReplicaCount"], keda["maxReplicaCount"]) == (
        hpa["minReplicas"],
        hpa["maxReplicas"],
    )
    metric = hpa["metrics"][0]["pods"]
    assert metric["target"]["averageValue"] == keda["triggers"][0]["metadata"]["threshold"]
    assert f"sum({metric['metric']['name']}{{" in keda["triggers"][0]["metadata"]["query"]


@pytest.mark.parametrize(
    ("resource", "components"),
    [("gpu", ["hpa", "keda"]), ("gpu-hpa", ["keda"]), ("gpu-keda", ["hpa"])],
)
def test_two_autoscalers_cannot_be_built(
    tmp_path: Path, resource: str, components: list[str]
) -> None:
    render("overlays/gpu")  # skips where there is no kubectl
    shutil.copytree(K8S, tmp_path / "k8s")
    both = tmp_path / "k8s" / "overlays" / "both"
    both.mkdir()
    content = {
        "resources": [f"../{resource}"],
        "components": [f"../../components/{name}" for name in components],
    }
    (both / "kustomization.yaml").write_text(yaml.safe_dump(content))
    result = subprocess.run(
        ["kubectl", "kustomize", str(both)], capture_output=True, text=True, timeout=SECONDS
    )
    assert result.returncode != 0
    assert "/spec/replicas" in result.stderr


# --- what they name is there ---


def environment_of(work: Workload, folder: Path, model: Path) -> dict[str, str]:
    """What the container is given, with this machine's folders in place of its volumes'."""
    environment = dict(work.env)
    for name, value in work.env.items():
        if value == MODEL_MOUNT:
            environment[name] = str(model)
        elif value.startswith("/"):
            (folder / name).mkdir()
            environment[name] = str(
                folder / name / "clients" if name.endswith("_FILE") else folder / name
            )
    return environment


def metrics_named() -> set[str]:
    """By all overlays, the adapter's rule and the README."""
    texts = [_rendered(K8S / "overlays" / name) for name in OVERLAYS]
    texts += [
        (K8S / "components" / "hpa" / "prometheus-adapter.yaml").read_text(),
        (K8S / "README.md").read_text(),
    ]
    return {name for text in texts for name in re.findall(r"\bstepweave_\w+", text)}


def listens_on(work: Workload) -> str:
    """The address that the container's arguments say."""
    arguments = work.container["args"]
    return str(arguments[arguments.index("--host") + 1])


def check_probes_and_metrics(work: Workload, client: httpx.Client) -> None:
    """Of a server that is ready and has had no request yet."""
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert client.get(work.container[probe]["httpGet"]["path"]).status_code == 200, probe
    # before any request: an autoscaler's query must find a series at 0
    samples = set(re.findall(r"^(stepweave_\w+)", client.get("/metrics").text, re.MULTILINE))
    assert metrics_named() <= samples
    assert "stepweave_backlog_seconds" in metrics_named()


def check_limits(work: Workload, client: httpx.Client) -> dict[str, Any]:
    """That the limits of the pod's environment are told and kept; returns a request at all of
    them."""
    named = {
        name: int(value)
        for name, value in work.env.items()
        if re.fullmatch(r"STEPWEAVE_MAX_\w+", name)
    }
    told = client.get("/v1/models").json()["data"][0]["stepweave"]
    assert told["max_num_inference_steps"] == named["STEPWEAVE_MAX_STEPS"]
    assert told["max_images"] == named["STEPWEAVE_MAX_IMAGES"]
    assert told["max_pixels"] == named["STEPWEAVE_MAX_PIXELS"]
    assert told["max_input_pixels"] == named.get(
        "STEPWEAVE_MAX_INPUT_PIXELS", told["max_input_pixels"]
    )
    side = min(math.isqrt(told["max_pixels"]), told["max_side"])
    most = {
        "prompt": "a red circle",
        "num_inference_steps": told["max_num_inference_steps"],
        "n": told["max_images"],
        "size": f"{side}x{side}",
    }
    beyond: dict[str, Any] = {
        "num_inference_steps": told["max_num_inference_steps"] + 1,
        "n": told["max_images"] + 1,
        "size": f"{2 * side}x{side}",
    }
    for name, value in beyond.items():
        answer = client.post("/v1/images/generations", json=most | {name: value})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name), answer.text
    return most


def check_queue(work: Workload, client: httpx.Client, body: dict[str, Any]) -> list[str]:
    """That as many requests are taken as the pod's environment says, and no more; the jobs of those
    taken."""
    most, taken = int(work.env["STEPWEAVE_MAX_QUEUE"]) + 1, []
    for _ in range(10 * most):  # some may be done meanwhile
        answer = client.post(
            "/v1/images/generations", json=body, headers={"Prefer": "respond-async"}
        )
        if answer.status_code != 202:
            break
        taken.append(answer.headers["Location"])
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full"), answer.text
    assert f"the limit is {most}." in answer.json()["error"]["message"]
    assert int(answer.headers["retry-after"]) > 0
    assert len(taken) >= most
    return taken


def check_end(
    work: Workload, environment: dict[str, str], server: Served, client: httpx.Client, job: str
) -> None:
    """preStop with its own times, while a job runs: work is taken for as long as is announced, then
    refused; then SIGTERM."""
    notice = float(
        environment.get("STEPWEAVE_DRAIN_NOTICE", Settings.model_fields["drain_notice"].default)
    )
    body = {"prompt": "a red circle", "num_inference_steps": 1}
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(
            run_pre_stop, server.port, Path(environment["STEPWEAVE_STATE_DIR"]), sleeps=True
        )
        wait_until(lambda: client.get("/readyz").status_code == 503)
        assert client.get("/livez").status_code == 200
        while True:
            answer = client.post("/v1/images/generations", json=body)
            assert answer.headers["connection"] == "close"
            if answer.status_code != 200:
                break
        assert time.monotonic() - began >= notice, "refused before the notice was over"
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining"), (
            answer.text
        )
        assert int(answer.headers["retry-after"]) > 0
        wait_until(lambda: client.get(job).json()["state"] not in ("queued", "running"))
        assert client.get(job).json()["state"] == "succeeded"
        assert ending.result(SECONDS) == 0
    assert server.stop() == 0


@pytest.mark.full
def test_a_real_server_has_what_the_demo_names(tmp_path: Path) -> None:
    """Started with the Deployment's own environment, and asked by its names, to its limits and to
    its end."""
    (work,) = workloads(overlay("cpu-demo"))
    environment = environment_of(work, tmp_path, EMBEDDED_MODEL)
    with (
        serve(tmp_path / "log.txt", host=listens_on(work), **environment) as server,
        httpx.Client(base_url=server.url, timeout=SECONDS) as client,
    ):
        server.wait_until_ready()
        check_probes_and_metrics(work, client)
        body = {"prompt": "a red circle", "num_inference_steps": 1, "response_format": "url"}
        for host, status in (
            (f"{work.name}.{work.namespace}.svc:80", 200),
            (f"{work.name}.other", 400),
        ):
            answer = client.post("/v1/images/generations", json=body, headers={"Host": host})
            assert answer.status_code == status, answer.text
        assert answer.json()["error"]["code"] == "no_base_url"
        kept, *jobs = check_queue(work, client, check_limits(work, client) | {"n": 1})
        for job in jobs:
            assert client.delete(job).is_success
        check_end(work, environment, server, client, kept)


@pytest.mark.full
def test_a_real_server_reads_the_model_of_the_volume_which_it_cannot_write_to(
    tmp_path: Path,
) -> None:
    """The environment of the GPU's Deployment but for the device, with the embedded model under the
    other's name, offline."""
    wrapper: list[str] = []
    if os.geteuid() == 0:  # whom no mode keeps from writing, but for this
        wrapper = ["setpriv", "--bounding-set=-dac_override"]
        if shutil.which("setpriv") is None:
            pytest.skip(
                "NOT CHECKED: this is root, and there is no setpriv to have it respect modes"
            )
    (work,) = workloads(overlay("gpu"))
    environment = environment_of(work, tmp_path, EMBEDDED_MODEL)
    environment |= {"STEPWEAVE_DEVICE": "cpu", "STEPWEAVE_CPU_THREADS": "1"}
    cache = Path(environment["HF_HUB_CACHE"])
    folder = cache / f"models--{environment['STEPWEAVE_MODEL'].replace('/', '--')}"
    shutil.copytree(EMBEDDED_MODEL, folder / "snapshots" / environment["STEPWEAVE_REVISION"])
    places = [cache, *cache.rglob("*")]
    for place in places:
        place.chmod(0o555 if place.is_dir() else 0o444)
    try:
        touched = subprocess.run(
            [*wrapper, "touch", str(folder / "file")], capture_output=True, timeout=SECONDS
        )
        assert touched.returncode != 0
        with (
            serve(
                tmp_path / "log.txt", host=listens_on(work), wrapper=wrapper, **environment
            ) as server,
            httpx.Client(base_url=server.url, timeout=SECONDS) as client,
        ):
            server.wait_until_ready()
            check_probes_and_metrics(work, client)
            (model,) = client.get("/v1/models").json()["data"]
            assert model["id"] == environment["STEPWEAVE_MODEL"]
            for job in check_queue(
                work, client, {"prompt": "a red circle", "num_inference_steps": 50}
            ):
                assert client.delete(job).is_success
            assert server.stop() == 0
        assert [cache, *cache.rglob("*")] == places
    finally:
        for place in places:
            place.chmod(0o755)


@pytest.mark.full
def test_a_real_server_has_what_a_minimal_inference_service_names(tmp_path: Path) -> None:
    """Started with the pod's own environment, as KServe makes it, and asked by its names."""
    service = own_services()["small"]
    work = predictor_of(service, of_kind(overlay("kserve"), "ClusterServingRuntime"))
    environment = environment_of(work, tmp_path, EMBEDDED_MODEL)
    name = service["metadata"]["name"]
    with (
        serve(tmp_path / "log.txt", host=listens_on(work), **environment) as server,
        httpx.Client(base_url=server.url, timeout=SECONDS) as client,
    ):
        server.wait_until_ready()
        check_probes_and_metrics(work, client)

        inputs = {
            "inputs": [
                {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["a red circle"]}
            ]
        }
        assert client.get(f"/v2/models/{name}/ready").status_code == 200
        answer = client.post(f"/v2/models/{name}/infer", json=inputs)
        assert (answer.status_code, answer.json().get("model_name")) == (200, name), answer.text
        assert client.post("/v2/models/other/infer", json=inputs).status_code == 404

        body = {
            "prompt": "a red circle",
            "model": name,
            "num_inference_steps": 2,
            "response_format": "url",
        }
        short, space = f"{name}-predictor", work.namespace
        for host in (
            name,
            short,
            f"{short}.{space}",
            f"{short}.{space}.svc:80",
            f"{name}-{space}.example.com",
        ):
            answer = client.post("/v1/images/generations", json=body, headers={"Host": host})
            assert answer.status_code == 200, answer.text
            assert answer.json()["data"][0]["url"].startswith(f"http://{host}/")
        for host in (f"{name}-other.example.com", "other-predictor", f"{short}.other"):
            answer = client.post("/v1/images/generations", json=body, headers={"Host": host})
            assert answer.json()["error"]["code"] == "no_base_url"

        assert run_pre_stop(server.port, Path(environment["STEPWEAVE_STATE_DIR"])) == 0
        assert client.get("/readyz").status_code == 503
        assert client.get("/livez").status_code == 200
        assert server.stop() == 0


@pytest.mark.full
def test_a_failed_start_tells_kubectl_describe_its_cause(tmp_path: Path) -> None:
    """With FallbackToLogsOnError the kubelet shows the last 80 lines of the log, of these the last
    2048 bytes."""
    (work,) = workloads(overlay("kserve"))
    (tmp_path / "model").mkdir()
    environment = environment_of(work, tmp_path, tmp_path / "model") | {"STEPWEAVE_DEVICE": "cpu"}
    with serve(tmp_path / "log.txt", **environment) as server:
        assert server.process.wait(SECONDS) == 1
    shown = b"".join(server.log.read_bytes().splitlines(keepends=True)[-80:])[-2048:].decode()
    assert shown.splitlines()[-1].startswith(
        "stepweave: the server cannot start: the model 'model' cannot be loaded: "
    )
    assert "model_index.json is missing" in shown.splitlines()[-1]


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
EXTERNAL = {
    "metrics": [
        {"type": "External", "external": {"metric": {}, "target": {"type": "Value", "value": "2"}}}
    ]
}


@pytest.mark.parametrize(
    ("name", "kind", "path", "value", "problem"),
    [
        ("gpu", "Deployment", (*SERVER, "resources", "requests", GPU), "2", "is not limit 1"),
        (
            "gpu",
            "Deployment",
            (*SERVER, "resources", "requests", "memory"),
            "32Gi",
            "over its limit",
        ),
        (
            "gpu",
            "Deployment",
            (*SERVER, "resources", "limits", "memory"),
            "24 GB",
            "'24 GB' is no quantity",
        ),
        (
            "gpu",
            "Deployment",
            (*SERVER, "readinessProbe", "httpGet", "port"),
            "web",
            "no port named 'web'",
        ),
        (
            "gpu",
            "Deployment",
            (*SERVER, "readinessProbe", "httpGet", "path"),
            "/livez",
            "does not get /readyz",
        ),
        (
            "gpu",
            "Deployment",
            (*SERVER, "startupProbe"),
            ABSENT,
            "startupProbe does not get /livez",
        ),
        (
            "gpu",
            "Deployment",
            (*SERVER, "lifecycle", "preStop"),
            {"sleep": {"seconds": 10}},
            "does not drain",
        ),
        (
            "gpu",
            "Deployment",
            (*SERVER, "lifecycle", "preStop", "exec", "command", 0),
            "curl",
            "does not drain",
        ),
        (
            "gpu",
            "Deployment",
            (*SERVER, "ports", 0, "containerPort"),
            8000,
            "does not ask port 8000",
        ),
        ("gpu", "Deployment", (*SERVER, "args", 2), "127.0.0.1", "does not listen"),
        (
            "gpu",
            "Deployment",
            (*SERVER, "volumeMounts", 2, "mountPath"),
            "/scratch",
            "nothing can be written",
        ),
        (
            "gpu",
            "Deployment",
            (*SERVER, "volumeMounts", 0, "name"),
            "tmp",
            "/dev/shm is not memory",
        ),
        (
            "gpu",
            "Deployment",
            (*SERVER, "securityContext", "readOnlyRootFilesystem"),
            False,
            "readOnlyRootFilesystem",
        ),
        (
            "gpu",
            "Deployment",
            (*POD, "terminationGracePeriodSeconds"),
            540,
            "540 < preStop 15 + STEPWEAVE_GRACE 500 + 30",
        ),
        (
            "gpu",
            "Deployment",
            (*POD, "volumes", -1, "emptyDir", "sizeLimit"),
            "1Gi",
            "state's volume is smaller",
        ),
        (
            "gpu",
            "Deployment",
            (*POD, "volumes", -1, "emptyDir", "medium"),
            "Memory",
            "the container's memory",
        ),
        ("gpu", "Deployment", (*POD, "volumes", -1, "emptyDir"), ABSENT, "not one pod's alone"),
        ("gpu", "Deployment", (*SERVER, "volumeMounts", -1, "name"), "tmp", "not one pod's alone"),
        (
            "gpu",
            "Deployment",
            (*SERVER, "volumeMounts", -1, "mountPath"),
            "/srv",
            "is no volume of its own",
        ),
        (
            "gpu",
            "Deployment",
            (*SERVER, "volumeMounts", 1, "readOnly"),
            False,
            "may write to a volume that they share",
        ),
        ("gpu", "Deployment", (*SERVER, "terminationMessagePolicy"), "File", "in the log only"),
        ("gpu", "Deployment", (*POD, "serviceAccountName"), ABSENT, "no ServiceAccount of its own"),
        (
            "gpu",
            "ServiceAccount",
            ("automountServiceAccountToken",),
            True,
            "the ServiceAccount has a token",
        ),
        (
            "gpu",
            "ServiceAccount",
            ("secrets",),
            [{"name": "huggingface"}],
            "a Secret that must be there",
        ),
        (
            "gpu",
            "Deployment",
            (*SERVER, "resources", "requests", "ephemeral-storage"),
            "3Gi",
            "less than 4294967296",
        ),
        (
            "gpu",
            "Deployment",
            (*SERVER, "resources", "requests", "ephemeral-storage"),
            ABSENT,
            "ephemeral-storage",
        ),
        (
            "gpu",
            "Deployment",
            (*POD, "topologySpreadConstraints", 0, "matchLabelKeys"),
            ABSENT,
            "counts the old pods",
        ),
        ("gpu", "Deployment", (*POD, "enableServiceLinks"), True, "enableServiceLinks"),
        ("gpu", "Deployment", (*POD, "tolerations"), [], "no toleration"),
        ("gpu", "Deployment", (*POD, "topologySpreadConstraints"), [], "no topology spread"),
        (
            "gpu",
            "Deployment",
            ("spec", "selector", "matchLabels", "tier"),
            "gpu",
            "Deployment's selector",
        ),
        ("gpu", "Service", ("spec", "selector", "tier"), "gpu", "Service's selector"),
        ("gpu", "Service", ("spec", "ports", 0, "targetPort"), "web", "Service's targetPort"),
        (
            "gpu",
            "PodDisruptionBudget",
            ("spec", "minAvailable"),
            1,
            "one of minAvailable and maxUnavailable",
        ),
        (
            "gpu",
            "PodDisruptionBudget",
            ("spec", "maxUnavailable"),
            ABSENT,
            "one of minAvailable and maxUnavailable",
        ),
        (
            "gpu",
            "PodDisruptionBudget",
            ("spec", "selector", "matchLabels", "a"),
            "b",
            "no PodDisruptionBudget",
        ),
        ("gpu", "NetworkPolicy", ("spec", "egress"), [], "each diff shows it"),
        (
            "gpu",
            "NetworkPolicy",
            ("spec", "egress"),
            [{"ports": [{"port": 443}]}],
            "lets out to {443}",
        ),
        ("gpu", "NetworkPolicy", ("spec", "policyTypes"), ["Ingress"], "lets everything out"),
        (
            "gpu",
            "NetworkPolicy",
            ("spec", "ingress", 0, "ports", 0, "port"),
            "web",
            "NetworkPolicy opens",
        ),
        (
            "gpu",
            "Deployment",
            (*POD, "volumes", 1, "persistentVolumeClaim", "claimName"),
            "other",
            "there is no claim other",
        ),
        ("gpu", "Service", ("metadata", "namespace"), "other", "has the namespace other"),
        (
            "gpu-hpa",
            "Service",
            ("spec", "sessionAffinity"),
            "None",
            "not found again among several replicas",
        ),
        (
            "gpu-keda",
            "Service",
            ("spec", "sessionAffinityConfig", "clientIP", "timeoutSeconds"),
            60,
            "not found again",
        ),
        (
            "gpu-keda",
            "Deployment",
            ("metadata", "annotations", THRESHOLD),
            "30",
            "not those of the annotation",
        ),
        ("gpu-keda", "ScaledObject", ("spec", "pollingInterval"), 15, "pollingInterval"),
        ("gpu-hpa", "Deployment", ("spec", "replicas"), 1, "undo the autoscaler's"),
        ("gpu-hpa", "HorizontalPodAutoscaler", ("spec", "minReplicas"), 9, "9 to 4 replicas"),
        (
            "gpu-hpa",
            "HorizontalPodAutoscaler",
            ("spec", "scaleTargetRef", "name"),
            "other",
            "which is not there",
        ),
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
            "not those of the annotation",
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
        (
            "gpu-keda",
            "ScaledObject",
            (*TRIGGER, "metadata", "ignoreNullValues"),
            "true",
            "count as no load",
        ),
        (
            "gpu-keda",
            "ScaledObject",
            (*TRIGGER, "metadata", "threshold"),
            ABSENT,
            "no target value",
        ),
        (
            "gpu-keda",
            "ScaledObject",
            (*TRIGGER, "metadata", "query"),
            "sum(up)",
            "not of 'stepweave'",
        ),
        ("gpu-keda", "ScaledObject", ("spec", "fallback"), ABSENT, "no fallback"),
        ("gpu-keda", "ScaledObject", ("spec", "minReplicaCount"), 0, "0 to 4 replicas"),
        (
            "kserve",
            "InferenceService",
            ("metadata", "annotations", CLASS),
            "magic",
            "no autoscalerClass 'magic'",
        ),
        ("kserve", "InferenceService", ("metadata", "annotations"), {}, "no deploymentMode None"),
        (
            "kserve",
            "InferenceService",
            ("spec", "predictor", "containerConcurrency"),
            4,
            "is Knative's",
        ),
        (
            "kserve",
            "InferenceService",
            ("spec", "predictor", "autoScaling"),
            EXTERNAL,
            "has no query",
        ),
        (
            "kserve",
            "InferenceService",
            ("spec", "predictor", "autoScaling"),
            EXTERNAL,
            "with autoscalerClass none",
        ),
        (
            "kserve",
            "InferenceService",
            ("spec", "predictor", "maxReplicas"),
            0,
            "minReplicas > maxReplicas",
        ),
        (
            "kserve",
            "InferenceService",
            (*MODEL, "modelFormat", "name"),
            "onnx",
            "no runtime supports",
        ),
        (
            "kserve",
            "InferenceService",
            (*MODEL, "protocolVersion"),
            "grpc-v2",
            "no runtime supports",
        ),
        (
            "kserve",
            "ClusterServingRuntime",
            ("spec", "supportedModelFormats", 0, "name"),
            "onnx",
            "no runtime supports",
        ),
        (
            "kserve",
            "InferenceService",
            ("spec", "predictor", "storageContainerName"),
            ABSENT,
            "has 1 GiB of memory",
        ),
        (
            "kserve",
            "InferenceService",
            ("spec", "predictor", "storageContainerName"),
            "own",
            "StorageContainer own",
        ),
        (
            "kserve",
            "InferenceService",
            (*MODEL, "storageUri"),
            "abfs://a/b",
            "does not know abfs://a/b",
        ),
        (
            "kserve",
            "ClusterStorageContainer",
            ("spec", "container", "env", 1),
            {"name": "A"},
            "buffers 16 GB and more",
        ),
        (
            "kserve",
            "ClusterStorageContainer",
            ("spec", "container", "env", 2, "value"),
            "8gb",
            "half of its memory",
        ),
        (
            "kserve",
            "ClusterStorageContainer",
            ("spec", "container", "resources", "limits", "memory"),
            "1Gi",
            "less than 8Gi of memory",
        ),
        (
            "kserve",
            "InferenceService",
            (*MODEL, "storageUri"),
            ABSENT,
            "STEPWEAVE_MODEL=/mnt/models is not mounted",
        ),
        (
            "kserve",
            "InferenceService",
            (*MODEL, "readinessProbe"),
            {"tcpSocket": {}},
            "is not the runtime's",
        ),
        (
            "kserve",
            "InferenceService",
            ("spec", "predictor", "terminationGracePeriodSeconds"),
            30,
            "30 < preStop",
        ),
        (
            "kserve",
            "InferenceService",
            ("spec", "predictor", "timeout"),
            ABSENT,
            "ends a request after 60 s",
        ),
        ("kserve", "ClusterServingRuntime", ("metadata", "namespace"), "a", "has the namespace a"),
        (
            "kserve-keda",
            "InferenceService",
            ("metadata", "annotations", CLASS),
            "none",
            "ScaledObjects disagree",
        ),
        (
            "kserve-keda",
            "InferenceService",
            (*MODEL, "env", 3, "value"),
            "27",
            "28 requests come before a replica",
        ),
    ],
)
def test_a_mistake_is_reported(
    name: str, kind: str, path: tuple[str | int, ...], value: Any, problem: str
) -> None:
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
        (
            "STEPWEAVE_MAX_STEP",
            "50",
            "there is no such setting (did you mean STEPWEAVE_MAX_STEPS?)",
        ),
        ("STEPWEAVE_MAX_STEPS", "many", "STEPWEAVE_MAX_STEPS='many'"),
        ("STEPWEAVE_REVISION", "main", "STEPWEAVE_REVISION='main'"),
        ("STEPWEAVE_MAX_STEPS", "100", "STEPWEAVE_GRACE 500 < 936 s of accepted work"),
        ("STEPWEAVE_MAX_ROWS", "8", "STEPWEAVE_GRACE 500 < 936 s of accepted work"),
        ("STEPWEAVE_MAX_IMAGES", "4", "STEPWEAVE_GRACE 500 < 972 s of accepted work"),
        ("STEPWEAVE_BATCHING", "threads", "worked out for shared steps"),
        ("STEPWEAVE_MAX_QUEUE", "4", "5 requests of one image never fill a step of 16 rows"),
        ("STEPWEAVE_GRACE", "300", "STEPWEAVE_GRACE 300 < 486 s of accepted work"),
        ("STEPWEAVE_EXIT_ON_FAILURE", "false", "does not end the container"),
        ("HF_HUB_OFFLINE", "0", "there is no way out to the hub"),
        ("HF_HUB_CACHE", "/srv", "there is no way out to the hub"),
        (
            "STEPWEAVE_GRACE",
            "600",
            "terminationGracePeriodSeconds 600 < preStop 15 + STEPWEAVE_GRACE 600",
        ),
        (
            "STEPWEAVE_STATE_DIR",
            "/var/lib/other",
            "STEPWEAVE_STATE_DIR /var/lib/other is no volume of its own",
        ),
        ("STEPWEAVE_KEEP_BYTES", "2147483648", "smaller than 2147483648 bytes of images"),
        (
            "STEPWEAVE_KEEP_JOBS",
            "20000",
            "smaller than 1073741824 bytes of images and 1920000000 of jobs",
        ),
        ("STEPWEAVE_API_KEYS", "secret", "API keys are written into the manifest"),
        (
            "STEPWEAVE_TRUSTED_HOSTS",
            "localhost",
            "no URL of an image for who calls stepweave.stepweave.svc",
        ),
        ("STEPWEAVE_MAX_PIXELS", "4194304", "worked out for 1048576"),
        ("STEPWEAVE_DEVICE", "cpu", f"a {GPU} that STEPWEAVE_DEVICE does not use"),
        ("HOME", "/home/bentoml", "HOME is /home/bentoml"),
        ("PYTORCH_CUDA_ALLOC_CONF", "", "lets memory fragment"),
    ],
)
def test_a_wrong_variable_is_reported(setting: str, value: str, problem: str) -> None:
    documents = overlay("gpu")
    environment = at(documents, "Deployment", *SERVER, "env")
    environment[:] = [item for item in environment if item["name"] != setting] + [
        {"name": setting, "value": value}
    ]
    assert any(problem in found for found in problems(documents)), problems(documents)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("sleep(10)", "sleep(9)", "preStop sleeps 0 s and 9 s: too short"),
        ("/var/lib/stepweave/drain", "/tmp/drain", "does not bear the token"),
        ("Bearer {token}", "Basic {token}", "does not bear the token"),
        (
            "sleep(10)",
            "sleep(60)",
            "preStop sleeps 0 s and 60 s: too short for proxies to notice, or too long",
        ),
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
    assert "without its Secret for STEPWEAVE_API_KEYS the pod does not start" in problems(documents)
    environment = at(documents, "Deployment", *SERVER, "env")
    environment[:] = [item for item in environment if item["name"] != "STEPWEAVE_API_KEYS"]
    assert "API keys do not come from a Secret" in problems(documents)


@pytest.mark.parametrize(
    ("name", "kind", "pod"),
    [("gpu", "Deployment", POD), ("kserve", "ClusterServingRuntime", ("spec",))],
)
def test_a_file_of_keys_that_does_not_follow_an_optional_secret_is_reported(
    name: str, kind: str, pod: tuple[str, ...]
) -> None:
    def found(change: Callable[[Document, Document], object]) -> list[str]:
        documents = overlay(name)
        (mount,) = [
            one
            for one in at(documents, kind, *pod, "containers", 0, "volumeMounts")
            if one["name"] == "keys"
        ]
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


@pytest.mark.parametrize(
    "query", ["a", "sum(a) by (b)", "sum by (b) (a)", "max(a) + sum(b)", "sum(a) or vector(0)"]
)
def test_a_query_of_more_than_one_series_or_an_invented_zero_is_reported(query: str) -> None:
    assert not is_one_series(query)
    documents = overlay("gpu-keda")
    at(documents, "ScaledObject", *TRIGGER, "metadata")["query"] = query
    assert any("not one series" in found for found in problems(documents))


@pytest.mark.parametrize(
    ("setting", "value", "problem"),
    [
        ("STEPWEAVE_MAX_QUEUE", "4", "32 requests come before a replica has started"),
        (
            "STEPWEAVE_MAX_STEPS",
            "200",
            "a replica is added at 60 s, less than one full batch's 200 s",
        ),
    ],
)
def test_a_queue_or_threshold_that_does_not_go_with_batches_is_reported(
    setting: str, value: str, problem: str
) -> None:
    for name in ("gpu-hpa", "gpu-keda"):
        documents = overlay(name)
        environment = at(documents, "Deployment", *SERVER, "env")
        environment[:] = [item for item in environment if item["name"] != setting] + [
            {"name": setting, "value": value}
        ]
        assert any(problem in found for found in problems(documents)), problems(documents)


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
        (
            "kserve",
            "InferenceService",
            lambda document: document["spec"]["predictor"].update(replicas=1),
        ),
        ("kserve", "ClusterServingRuntime", lambda document: document["spec"].pop("containers")),
    ],
)
def test_a_mistake_in_a_custom_kind_is_invalid(
    name: str, kind: str, change: Callable[[Document], object]
) -> None:
    (document,) = of_kind(overlay(name), kind)
    change(document)
    with pytest.raises(jsonschema.ValidationError):
        validate_custom(document)
