"""The page at the root, and the metrics."""

from __future__ import annotations

import html

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from stepweave import __version__
from stepweave.api.answer_schemas import Discovery, MountedRoute
from stepweave.api.examples import UNKNOWN, curl
from stepweave.api.operations import operations
from stepweave.api.responses import PAGE_HEADERS, answer
from stepweave.api.urls import base_url, prefix, reference
from stepweave.errors import InvalidRequestError
from stepweave.serving.server import Server
from stepweave.threads import on_thread

LINKS = {
    "playground": "/ui",
    "documentation": "/docs",
    "openapi": "/openapi.json",
    "models": "/v1/models",
    "status": "/api/status",
    "metrics": "/metrics",
}  # of the root's answer; those that are mounted
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    **PAGE_HEADERS,
    "Vary": "Accept",
}
_STYLE = (
    "body{font:1rem/1.5 system-ui,sans-serif;max-width:48rem;margin:2rem auto;padding:0 "
    "1rem;color-scheme:light dark}pre{white-space:pre-wrap;overflow-wrap:anywhere}"
)


class RootRoutes:
    """The handlers, bound to one server."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def routes(self) -> list[Route]:
        return [
            Route("/", self.root, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
        ]

    async def root(self, request: Request) -> Response:
        model = None if self.server.model is None else self.server.model.id
        stage = self.server.health().stage
        routes = self._routes(request)
        mounted = {route.path for route in routes}
        links = {
            name: reference(request, self.server.settings, path)
            for name, path in LINKS.items()
            if path in mounted
        }
        accepted = [
            part.partition(";")[0].strip() for part in request.headers.get("accept", "").split(",")
        ]
        if "text/html" in accepted:
            return HTMLResponse(_page(model, stage, routes, links), headers=_PAGE_HEADERS)
        found = Discovery(version=__version__, model=model, stage=stage, routes=routes, links=links)
        return answer(found, {"Vary": "Accept"})

    def _routes(self, request: Request) -> list[MountedRoute]:
        """All routes, those of BentoML and the middleware too, in the order of the document."""
        mounted = {route.path_format for route in request.app.routes if isinstance(route, Route)}
        names = None if self.server.model is None else self.server.model.names
        try:
            root = base_url(request, self.server.settings)
        except InvalidRequestError:
            root = UNKNOWN + prefix(request, self.server.settings)
        listed: dict[str, MountedRoute] = {}
        for operation in operations(names):
            if not (operation.elsewhere or operation.path in mounted):
                continue
            path = operation.path
            if path not in listed:
                listed[path] = MountedRoute(
                    path=path, methods=[], summary=operation.summary, curl=[]
                )
            listed[path].methods.append(operation.method.upper())
            listed[path].curl.append(curl(operation, root, key=self.server.keys.required))
        return list(listed.values())

    async def metrics(self, request: Request) -> Response:
        # off the loop: CUDA's memory query may wait for the driver
        content = await on_thread(None, self.server.metrics.render)
        return Response(content, headers={"Content-Type": CONTENT_TYPE_LATEST})


def _page(model: str | None, stage: str, routes: list[MountedRoute], links: dict[str, str]) -> str:
    shown_links = "".join(
        f'<li><a href="{html.escape(path)}">{html.escape(name)}</a></li>'
        for name, path in links.items()
    )
    shown_routes = "".join(
        f"<li><code>{html.escape(' '.join(route.methods))} {html.escape(route.path)}</code> "
        f"{html.escape(route.summary)}<pre>{html.escape(chr(10).join(route.curl))}</pre></li>"
        for route in routes
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width">'
        f"<title>Stepweave</title><style>{_STYLE}</style><h1>Stepweave "
        f"{html.escape(__version__)}</h1>"
        f"<p>Model: <strong>{html.escape(model or 'none yet')}</strong>, {html.escape(stage)}</p>"
        f"<ul>{shown_links}</ul><h2>Routes</h2><ul>{shown_routes}</ul></html>"
    )
