"""For orchestrators: health probes, and the drain before a pod ends."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from stepweave.api.answer_schemas import Drained, Health, Unhealthy
from stepweave.api.middleware.base import Middleware
from stepweave.api.responses import answer, error_response
from stepweave.errors import MethodNotAllowedError, NotFoundError
from stepweave.serving.server import Server

READY = ("/readyz", "/health")
PROBES = ("/livez", "/healthz", *READY)
DRAIN = "/drain"
# beside the probes, the drain, and the page of the documentation with what it loads
KEYLESS = ("/v2/health/live", "/v2/health/ready", "/docs", "/openapi.json")
KEYLESS_BELOW = "/docs/"


class Probes(Middleware):
    """Answers the probes and the drain."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app: ASGIApp = self.app
        if scope["path"] in PROBES:
            app = probe(scope, self.server)
        elif scope["path"] == DRAIN:
            app = drain(scope, self.server)
        await app(scope, receive, send)


def probe(scope: Scope, server: Server) -> Response:
    """Answered from memory alone, never waiting for the device."""
    path = scope["path"]
    if scope["method"] not in ("GET", "HEAD"):
        return _not_allowed(scope, "GET", "GET, HEAD")
    status = server.health()
    jobs = server.jobs
    health = Health(**vars(status), store=None if jobs is None else jobs.problem)
    if not server.alive() or (path in READY and status.stage != "ready"):
        return error_response(server.unavailable(), path, Unhealthy, **dict(health))
    return answer(health)


def drain(scope: Scope, server: Server) -> Response:
    """Only with the token of the state directory, which a pod's preStop hook reads; otherwise there
    is no such route.

    The client's address proves nothing: a proxy or a tunnel on the same machine has that of the
    machine, too.
    """
    token = server.drain_token
    if token is None or not token.matches(Headers(scope=scope).get("authorization", "")):
        raise NotFoundError(f"There is no route {DRAIN!r}.")
    if scope["method"] == "POST":
        server.drain()
    elif scope["method"] == "DELETE":
        server.take_back_drain()
    else:
        return _not_allowed(scope, "POST or DELETE", "POST, DELETE")
    return answer(Drained(stage=server.health().stage, in_flight=len(server.active)))


def _not_allowed(scope: Scope, use: str, allow: str) -> Response:
    response = error_response(
        MethodNotAllowedError(f"{scope['method']} is not allowed on {scope['path']}; use {use}.")
    )
    response.headers["Allow"] = allow
    return response
