"""The OpenAPI document is true: of every route, every answer that a fuzzer gets, and this server's
own limits."""

from __future__ import annotations

import base64
import contextlib
import copy
import io
import json
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import httpx
import hypothesis
import hypothesis.strategies as st
import jsonschema
import pytest
import requests
import schemathesis
from PIL import Image
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.core.failures import FailureGroup
from starlette.routing import Route

from stepweave.api.app import Api
from stepweave.api.middleware.probes import DRAIN, KEYLESS, KEYLESS_BELOW, PROBES
from stepweave.api.operations import INFERENCE
from stepweave.api.routes.bentoml import PATHS
from stepweave.errors import NotFoundError, OutOfMemoryError
from tests.support.fake_pipeline import FakePipeline
from tests.support.in_process import InProcess
from tests.support.served import Served
from tests.support.waiting import SECONDS

Make = Callable[..., InProcess]
Document = dict[str, Any]
KEY = {"Authorization": "Bearer secret"}
SMALL: dict[str, Any] = {
    "max_images": 2,
    "max_steps": 28,
    "max_pixels": 64 * 64,
    "max_prompt_characters": 200,
    "trusted_hosts": "testserver",
}
# the key here is no administrator's; tests/api/test_loras.py has one
OF_ADMINISTRATORS = ("POST /v1/loras", "DELETE /v1/loras/{name}")
NOT_HERE = (*PATHS, "/schema.json")  # BentoML's own
PNG = io.BytesIO()
Image.new("RGB", (64, 64), "teal").save(PNG, "PNG")
MASK = io.BytesIO()
Image.new("L", (64, 64), "white").save(MASK, "PNG")


def document(app: InProcess, path: str = "/openapi.json", **headers: str) -> Document:
    answer = app.client.get(path, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    found: Document = answer.json()
    return found


def request_schema(found: Document, name: str, field: str) -> dict[str, Any]:
    schema: dict[str, Any] = found["components"]["schemas"][name]["properties"][field]
    return next((one for one in schema.get("anyOf", ()) if one.get("type") != "null"), schema)


def closed(found: Document) -> Document:
    """The document, but answers may have nothing that it does not name."""
    found = copy.deepcopy(found)
    for schema in found["components"]["schemas"].values():
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
    return found


def validate(found: Document, schema: Any, instance: Any) -> None:
    """Hold an answer against a schema of the document, or the one of that name."""
    if isinstance(schema, str):
        schema = {"$ref": f"#/components/schemas/{schema}"}
    jsonschema.Draft202012Validator({**schema, "components": closed(found)["components"]}).validate(
        instance
    )


def test_the_document_is_valid(in_process: Make) -> None:
    loading = in_process(ready=False)
    ready = in_process(api_keys="secret")
    for found in (document(loading), document(ready, **KEY)):
        schema = schemathesis.openapi.from_dict(found)
        schema.validate()  # against the specification's own schema
        for one in found["components"]["schemas"].values():
            jsonschema.Draft202012Validator.check_schema(one)
        operations = [operation for path in found["paths"].values() for operation in path.values()]
        ids = [operation["operationId"] for operation in operations]
        assert len(ids) == len(set(ids)) >= 30
        references = set(_references(found))
        for reference in references:
            place: Any = found
            for name in reference.removeprefix("#/").split("/"):
                place = place[name]
        named = {
            reference for reference in references if reference.startswith("#/components/schemas/")
        }
        assert {name for name in found["components"]["schemas"]} == {
            reference.split("/")[3] for reference in named
        }


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _references(one)


def test_it_has_every_route_and_no_other(in_process: Make) -> None:
    app = in_process(ready=False)
    mounted = {
        (route.path_format, method)
        for route in Api(app.server).app().routes
        if isinstance(route, Route)
        for method in route.methods or ()
        if method != "HEAD"
    }
    elsewhere = {
        (DRAIN, "DELETE"),
        *((path, "POST") for path in (*PATHS, DRAIN)),
        *((path, "GET") for path in (*PROBES, "/schema.json")),
    }
    found = document(app)
    described = {(path, method.upper()) for path, item in found["paths"].items() for method in item}
    assert described == mounted | elsewhere
    assert document(app, "/docs.json") == found


def test_bentoml_serves_ours_and_keeps_what_its_clients_need(served: Served) -> None:
    ours = httpx.get(f"{served.url}/openapi.json", timeout=SECONDS).json()
    assert ours["info"]["title"] == "Stepweave"
    assert httpx.get(f"{served.url}/docs.json", timeout=SECONDS).json() == ours
    native = httpx.get(f"{served.url}/schema.json", timeout=SECONDS).json()
    assert {route["route"] for route in native["routes"]} == set(PATHS) <= set(ours["paths"])
    discovery = httpx.get(served.url, timeout=SECONDS).json()
    assert discovery["links"]["openapi"] == "/openapi.json"
    validate(ours, "Discovery", discovery)


def test_limits_are_the_servers(in_process: Make) -> None:
    found = document(in_process(ready=False, **SMALL))
    for name in (
        "GenerationRequest",
        "EditRequest",
        "ImageRequest",
        "StreamRequest",
        "BentoMLEditRequest",
        "DiffusersExampleRequest",
    ):
        assert request_schema(found, name, "num_inference_steps")["maximum"] == 28, name
        assert request_schema(found, name, "prompt")["maxLength"] == 200, name
        assert request_schema(found, name, "negative_prompt")["maxLength"] == 200, name
    assert request_schema(found, "GenerationRequest", "n")["maximum"] == 2
    assert (
        "4096 pixels"
        in found["components"]["schemas"]["GenerationRequest"]["properties"]["size"]["description"]
    )
    assert "enum" not in request_schema(found, "GenerationRequest", "model")


def test_what_the_model_takes_is_there_once_it_is_loaded(in_process: Make) -> None:
    app = in_process()
    assert app.server.model is not None
    app.server.model.schedulers = {"Second": None, "First": None}
    found = document(app)
    for name in ("GenerationRequest", "EditRequest", "ImageRequest"):
        assert request_schema(found, name, "scheduler")["enum"] == ["First", "Second"]
    assert request_schema(found, "GenerationRequest", "model")["enum"] == [app.server.model.id]
    size = found["components"]["schemas"]["GenerationRequest"]["properties"]["size"]
    assert "multiples of 8" in size["description"]
    assert found["paths"]["/v2/models/{model}"]["get"]["parameters"][0]["schema"]["enum"] == [
        app.server.model.id
    ]
    app.server.model.schedulers = {}
    found = document(app)
    assert request_schema(found, "GenerationRequest", "scheduler")["type"] == "null"
    assert "scheduler" not in found["components"]["schemas"]["EditRequest"]["properties"]


def test_keys_are_asked_for_only_where_they_are_needed(in_process: Make) -> None:
    open_to_all = document(in_process(ready=False))
    assert "security" not in open_to_all and "securitySchemes" not in open_to_all["components"]
    assert not [
        path
        for path, item in open_to_all["paths"].items()
        for one in item.values()
        if "401" in one["responses"]
    ]
    app = in_process(ready=False, api_keys="secret")
    found = document(app, **KEY)
    assert found["security"] == [{"key": []}]
    assert found["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}
    keyless = {
        path
        for path, item in found["paths"].items()
        for one in item.values()
        if one.get("security") == []
    }
    assert keyless == {*PROBES, *KEYLESS, f"{KEYLESS_BELOW}{{file}}", DRAIN}
    for path, item in found["paths"].items():
        for method, one in item.items():
            assert ("401" in one["responses"]) == (path not in keyless)
            if path in keyless:
                continue
            answer = app.client.request(method, path.replace("{", "").replace("}", ""))
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            body = "ProtocolError" if path.startswith("/v2") else "Error"
            validate(
                found,
                "ExamplesError" if path.startswith(("/api/", "/images/")) else body,
                answer.json(),
            )


def test_events_are_as_described(in_process: Make) -> None:
    app = in_process(FakePipeline(), trusted_hosts="testserver", max_steps=28)
    found = document(app)
    described = _described_events(found, "/v1/images/generations", "post")
    fields = {"prompt": "a star", "stream": True, "events": "all", "num_inference_steps": 3}
    seen = set()
    for extra, error in (
        ({}, None),
        ({"response_format": "url"}, None),
        ({}, RuntimeError("broken")),
    ):
        app.pipeline.record.error = error
        for name, data in _events(
            app.client.post("/v1/images/generations", json={**fields, **extra}).text
        ):
            validate(found, described[name], data)
            seen.add(name)
    app.pipeline.record.error = None
    job = app.client.post(
        "/v1/images/generations", json={"prompt": "a"}, headers={"Prefer": "respond-async"}
    )
    assert job.status_code == 202
    validate(found, "JobView", job.json())
    following = _described_events(found, "/v1/jobs/{id}/events", "get")
    for name, data in _events(app.client.get(f"{job.headers['location']}/events").text):
        validate(found, following[name], data)
        seen.add(name)
    assert seen >= {"image_generation.completed", "stepweave.progress", "error"}


def _described_events(found: Document, path: str, method: str) -> dict[str, Any]:
    content = found["paths"][path][method]["responses"]["200"]["content"]
    events = (event["properties"] for event in content["text/event-stream"]["schema"]["anyOf"])
    return {event["event"]["const"]: event["data"]["contentSchema"] for event in events}


def _events(text: str) -> Iterator[tuple[str, Any]]:
    for block in filter(None, text.split("\n\n")):
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        if "event" in fields:
            yield fields["event"], json.loads(fields["data"])


def test_native_answers_are_as_described(served: Served) -> None:
    found = httpx.get(f"{served.url}/openapi.json", timeout=SECONDS).json()
    image = httpx.post(
        f"{served.url}/generate", json={"prompt": "a star", "seed": 7}, timeout=SECONDS
    )
    _image(found, "/generate", image)
    refused = httpx.post(f"{served.url}/generate", json={"prompt": ""}, timeout=SECONDS)
    assert refused.status_code == 400
    validate(found, "Error", refused.json())
    described = _described_events(found, "/generate_stream", "post")
    body = {"prompt": "a star", "partial_images": 2, "events": "all"}
    seen = set()
    for name, data in _events(
        httpx.post(f"{served.url}/generate_stream", json=body, timeout=SECONDS).text
    ):
        validate(found, described[name], data)
        seen.add(name)
    assert seen >= {"image_generation.completed", "stepweave.progress"}
    edited = httpx.post(
        f"{served.url}/edit",
        data={"prompt": "a star"},
        files={"image": ("a.png", PNG.getvalue(), "image/png")},
        timeout=SECONDS,
    )
    _image(found, "/edit", edited)
    for name, path in (
        ("Health", "/readyz"),
        ("ModelList", "/v1/models"),
        ("DiffusersExampleStatus", "/api/status"),
    ):
        validate(found, name, httpx.get(f"{served.url}{path}", timeout=SECONDS).json())


@pytest.mark.parametrize(
    "declared", ["image/jpg", "image/webp", "image/svg+xml", "application/octet-stream", ""]
)
def test_a_native_edit_goes_by_what_a_file_holds(served: Served, declared: str) -> None:
    files = {
        "image": ("a.png", PNG.getvalue(), declared),
        "mask": ("b.png", MASK.getvalue(), declared),
    }
    fields = {"prompt": "a star", "seed": "7", "num_inference_steps": "2"}
    answer = httpx.post(f"{served.url}/edit", data=fields, files=files, timeout=SECONDS)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-stepweave-seed"] == "7"


def _image(found: Document, path: str, answer: httpx.Response) -> None:
    assert answer.status_code == 200, answer.text
    described = found["paths"][path]["post"]["responses"]["200"]
    assert answer.headers["content-type"] in described["content"]
    own = {name for name in answer.headers if name.startswith("x-stepweave")}
    assert own <= {name.lower() for name in described["headers"]}
    assert {"x-stepweave-seed", "x-stepweave-size"} <= own


def test_the_drain_is_as_described(in_process: Make) -> None:
    app = in_process(drain_notice=0)
    found = document(app)
    elsewhere = app.client.post(DRAIN)
    assert elsewhere.status_code == NotFoundError.status
    validate(found, "Error", elsewhere.json())
    token = app.server.drain_token
    assert token is not None
    bearer = {"Authorization": f"Bearer {token.path.read_text()}"}
    wrong = app.client.get(DRAIN, headers=bearer)
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST, DELETE")
    validate(found, "Error", wrong.json())
    for method in ("DELETE", "POST"):
        drained = app.client.request(method, DRAIN, headers=bearer)
        assert drained.status_code == 200
    validate(found, "Drained", drained.json())
    for refused, schema in ((app.post(), "Error"), (app.client.get("/readyz"), "Unhealthy")):
        assert refused.status_code == 503
        validate(found, schema, refused.json())
        assert int(refused.headers["retry-after"]) >= 1
    assert document(app)["paths"] == found["paths"]


# The fuzzer: requests that the document allows, and others, none of which may be answered otherwise
# than it says

TURNS = 4 * 5 * 7 * 11
ACCEPTS = (
    "application/json",
    "image/png",
    "image/webp;q=0.9, image/jpeg",
    "text/event-stream",
    "*/*",
)
SIMPLE = ("prompt", "size", "strength", "num_inference_steps", "seed", "lora", "output_format")
CHECKED = (
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)


@st.composite
def made(draw: st.DrawFn, strategy: st.SearchStrategy[Any]) -> Any:
    """What schemathesis makes. Some bodies with a file it breaks in a way that its own validator
    cannot look at: another one."""
    try:
        return draw(strategy)
    except ValueError as error:
        hypothesis.assume("Unsupported type: 'Binary'" not in str(error))
        raise


class Fuzzer:
    """Sends what schemathesis makes of some paths of a document, and counts what comes back."""

    def __init__(
        self, client: Any, found: Document, paths: Iterable[str], failing: int = 504
    ) -> None:
        """Of all failures only the status `failing` may come: a deadline that has passed is the
        client's own wish."""
        load_all_checks()
        self.failing = failing
        self.client = client
        self.base = str(client.base_url)
        self.document = closed(found)
        self.document["paths"] = {path: self.document["paths"][path] for path in paths}
        self.schema = schemathesis.openapi.from_dict(self.document)
        self.operations = [operation.ok() for operation in self.schema.get_all_operations()]
        self.checks = [CHECKS.get_one(name) for name in CHECKED]
        self.sent = 0
        self.statuses: dict[str, Counter[int]] = defaultdict(Counter)
        self.failures: list[str] = []

    def run(self, examples: int, coverage: int) -> None:
        """At most `coverage` requests at the limits of each operation's values, and `examples` of
        each kind at random.

        Operations with a body get four times as many.
        """
        kinds = schemathesis.GenerationMode
        for operation in self.operations:
            times = 4 if operation.body else 1
            cases = self.schema.iter_coverage_cases(
                operation,
                generation_modes=[kinds.POSITIVE, kinds.NEGATIVE],
                generation_config=self.schema.config.generation,
            )
            for turn, case in enumerate(every(cases, times * coverage)):
                self._attempt(self.send, case, turn)
            for strategy in self.schema.get_strategies_from_examples(operation):
                self._attempt(self._explore, strategy, len(ACCEPTS))
            for kind in (kinds.POSITIVE, kinds.NEGATIVE):
                with contextlib.suppress(
                    hypothesis.errors.Unsatisfiable
                ):  # what takes nothing can be given nothing wrong
                    self._attempt(
                        self._explore, operation.as_strategy(generation_mode=kind), times * examples
                    )

    def _attempt(self, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except (AssertionError, hypothesis.errors.Flaky) as error:
            self.failures.append("".join(traceback.format_exception_only(error)))

    def _explore(self, strategy: Any, examples: int) -> None:
        settings = hypothesis.settings(
            max_examples=examples,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate],
        )
        settings(hypothesis.given(made(strategy), st.sampled_from(range(TURNS)))(self.send))()

    def send(self, case: Any, turn: int) -> None:
        """Send one request. The turn decides what headers say, and whether an id is one that
        exists."""
        positive = case.meta is None or case.meta.generation.mode.is_positive
        if positive:
            self._aim(case, turn)
        arguments = case.as_transport_kwargs(self.base, {"Accept": ACCEPTS[turn % len(ACCEPTS)]})
        prepared = requests.Request(**arguments).prepare()
        headers = {
            name: value
            for name, value in prepared.headers.items()
            if name.lower() != "authorization"
        }
        headers |= {} if turn % 11 == 5 else KEY
        headers |= {"Prefer": "respond-async"} if turn % 7 == 6 else {}
        self.sent += 1
        answer = self.client.request(
            prepared.method,
            prepared.url,
            headers=[(name.encode(), value.encode("latin-1")) for name, value in headers.items()],
            content=prepared.body,
        )
        self.statuses[case.operation.label][answer.status_code] += 1
        try:
            assert answer.status_code < 500 or answer.status_code == self.failing, answer.text[:500]
            case.validate_response(answer, checks=self.checks)
            if answer.status_code < 300:
                self._was_allowed(case, prepared.body)
        except (AssertionError, FailureGroup) as error:
            body = repr(prepared.body)[:500]
            raise AssertionError(
                f"{prepared.method} {prepared.url} {headers} {body}\n-> {answer.status_code}: "
                f"{error}"
            ) from None

    def _was_allowed(self, case: Any, body: Any) -> None:
        """What was accepted is what the document allows."""
        if case.media_type == "application/json":
            described = self.document["paths"][case.operation.path][case.operation.method][
                "requestBody"
            ]
            if body or described["required"]:
                validate(
                    self.document, described["content"][case.media_type]["schema"], json.loads(body)
                )

    def _aim(self, case: Any, turn: int) -> None:
        """Let the request name a job or an image that is there, a size that is one, files that are
        images, few steps."""
        path, body = case.operation.path, case.body
        known = turn % 4 != 3
        if (
            known
            and path.startswith("/v1/jobs/{id}")
            and (made := self._made({"Prefer": "respond-async"}))
        ):
            case.path_parameters = {**case.path_parameters, "id": made["id"]}
        if (
            known
            and path.startswith("/images/")
            and (made := self._made({}, response_format="url"))
        ):
            case.path_parameters = {
                **case.path_parameters,
                "filename": made["data"][0]["url"].rpartition("/")[2],
            }
        if turn % 2:
            case.headers = {
                name: value for name, value in case.headers.items() if name != "Idempotency-Key"
            }
        if not isinstance(body, dict):
            return
        changes: dict[str, Any] = {
            "size": "32x64",
            "strength": 1,
            "num_inference_steps": 2,
            "deadline_ms": 60_000,
            "output_compression": None,
        }
        if case.media_type == "multipart/form-data":
            changes |= {"image": PNG.getvalue(), "mask": MASK.getvalue()}
            body = {name: value for name, value in body.items() if name != "output_compression"}
        if "inputs" in body:
            changes |= {"inputs": INFERENCE["inputs"], "parameters": {}, "outputs": None}
        if path in PATHS:  # a real model's
            body = {"num_inference_steps": 2, **body}
            changes |= {"lora": "pastel"}
            # what must come together, and tensors that fit, do not come by chance
            if path == "/edit" and turn % 3 == 0:
                body = {name: value for name, value in body.items() if name in SIMPLE}
                image = "data:image/png;base64," + base64.b64encode(PNG.getvalue()).decode()
                body = {"prompt": "a red circle", **body, "image": image}
        case.body = {name: changes.get(name, value) for name, value in body.items()}

    def _made(self, headers: dict[str, str], **fields: Any) -> dict[str, Any] | None:
        """A job or a generation; None while there can be none."""
        body = {"prompt": "a", "num_inference_steps": 1, **fields}
        answer = self.client.post("/v1/images/generations", json=body, headers={**KEY, **headers})
        return None if answer.status_code == 503 else answer.json()

    def report(self) -> str:
        """What each operation answered with and how often, and what was wrong with it."""
        rows = [
            f"{label:60} "
            + ", ".join(f"{status}: {count}" for status, count in sorted(counts.items()))
            for label, counts in sorted(self.statuses.items())
        ]
        return "\n".join([f"{self.sent} requests", *rows, *self.failures])

    def judge(self) -> None:
        """Raise unless all went as described, and each operation both refused and, unless it only
        ever does, succeeded."""
        assert not self.failures, self.report()
        for operation in self.operations:
            label = operation.label
            described = self.document["paths"][operation.path][operation.method]["responses"]
            succeeds = any(status.startswith("2") for status in described)
            succeeds = succeeds and label not in OF_ADMINISTRATORS
            succeeded = any(status < 300 for status in self.statuses[label])
            assert succeeded is succeeds, (
                f"{'no' if succeeds else 'a'} success: {label}\n{self.report()}"
            )
            assert any(status >= 400 for status in self.statuses[label]), (
                f"no refusal: {label}\n{self.report()}"
            )


def every(cases: Iterable[Any], most: int) -> list[Any]:
    """At most that many, spread over all."""
    found = list(cases)
    step = max(1, -(-len(found) // most))
    return found[::step]


@pytest.mark.parametrize(
    ("examples", "coverage", "least"),
    [(2, 3, 200), pytest.param(24, 16, 1500, marks=[pytest.mark.full, pytest.mark.timeout(3600)])],
)
def test_a_fuzzer_finds_no_answer_that_is_not_described(
    in_process: Make, examples: int, coverage: int, least: int
) -> None:
    app = in_process(FakePipeline(edits=True), api_keys="secret", **SMALL)
    found = document(app, **KEY)
    fuzzer = Fuzzer(app.client, found, found["paths"].keys() - {DRAIN, *NOT_HERE})
    fuzzer.run(examples, coverage)
    fuzzer.judge()
    assert fuzzer.sent >= least, fuzzer.report()


def test_rare_refusals_are_as_described(in_process: Make) -> None:
    app = in_process(FakePipeline(), max_body_bytes=1024)
    route = "/v1/images/generations"
    fuzzer = Fuzzer(app.client, document(app), [route])
    operation = fuzzer.schema[route]["POST"]

    def answered(status: int, **fields: Any) -> None:
        body = {"prompt": "a", **fields}
        answer = app.client.post(route, json=body)
        assert answer.status_code == status, answer.text
        operation.Case(body=body, media_type="application/json").validate_response(
            answer, checks=fuzzer.checks
        )

    answered(413, prompt="a" * 2000)
    answered(400, deadline_ms=1)
    admission = app.server._admission
    assert admission is not None
    admission._taken += admission.limit
    answered(429)
    admission._taken -= admission.limit
    app.pipeline.record.pause = 0.2
    answered(504, deadline_ms=2500)
    app.pipeline.record.error = RuntimeError("broken")
    answered(500)
    app.pipeline.record.error = OutOfMemoryError("Too large.")
    answered(500)


def test_nor_while_the_model_is_loaded(in_process: Make) -> None:
    app = in_process(ready=False, api_keys="secret", **SMALL)
    found = document(app, **KEY)
    fuzzer = Fuzzer(app.client, found, found["paths"].keys() - {DRAIN, *NOT_HERE}, failing=503)
    fuzzer.run(1, 1)
    assert not fuzzer.failures, fuzzer.report()
    refusing = {label for label, counts in fuzzer.statuses.items() if 503 in counts}
    assert {
        "POST /v1/images/generations",
        "GET /readyz",
        "GET /v2/health/ready",
        "GET /v1/models",
    } <= refusing
    assert not refusing & {"GET /openapi.json", "GET /livez", "GET /metrics", "GET /"}


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("paths", "/v1/models/{id}", "get", "responses", "404"), None),
        (
            ("paths", "/v1/models/{id}", "get", "responses", "200", "content", "application/json"),
            None,
        ),
        (("components", "schemas", "Model", "properties", "created", "type"), "string"),
        (("components", "schemas", "ErrorDetail", "properties", "code", "type"), "integer"),
        (("components", "schemas", "ErrorDetail", "properties", "type", "enum"), ["server_error"]),
        (("components", "headers", "RequestId", "schema", "pattern"), "^never$"),
    ],
)
def test_the_fuzzer_sees_what_is_not_true(
    in_process: Make, place: tuple[str, ...], value: Any
) -> None:
    app = in_process()
    found = document(app)
    item = found
    for name in place[:-1]:
        item = item[name]
    if value is None:
        del item[place[-1]]
        if place[-1] == "application/json":
            item["text/html"] = {}
    else:
        item[place[-1]] = value
    fuzzer = Fuzzer(app.client, found, ["/v1/models/{id}"])
    fuzzer.run(2, 3)
    with pytest.raises(AssertionError):
        fuzzer.judge()
    assert fuzzer.failures


@pytest.mark.full
def test_nor_does_it_of_native_answers(served: Served) -> None:
    with httpx.Client(base_url=served.url, timeout=SECONDS) as client:
        fuzzer = Fuzzer(client, client.get("/openapi.json").json(), PATHS)
        fuzzer.run(1, 1)
    fuzzer.judge()
    assert fuzzer.sent >= 30, fuzzer.report()
