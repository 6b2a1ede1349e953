"""The page `/docs`: the OpenAPI document in Swagger UI, which BentoML brings."""

from __future__ import annotations

import html
from pathlib import Path

import bentoml
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Route

from stepweave.api.responses import PAGE_HEADERS
from stepweave.api.urls import prefix
from stepweave.errors import NotFoundError, shown
from stepweave.serving.server import Server

PAGE = "/docs"
ASSETS = {"swagger-ui.css": "text/css", "swagger-ui-bundle.js": "text/javascript"}
START = "start.js"
FILES = (*ASSETS, START)
_FOLDER = Path(bentoml.__file__).parent / "_internal" / "server" / "static_content"
# scripts only from here; Swagger UI writes styles into its elements, and has images as data
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' "
    "'unsafe-inline'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action "
    "'none'; frame-ancestors 'none'",
    **PAGE_HEADERS,
}
_HTML = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
    'content="width=device-width"><title>Stepweave API</title>'
    '<link rel="stylesheet" href="{prefix}/docs/swagger-ui.css">'
    '<div id="swagger-ui" data-document="{prefix}/openapi.json"></div>'
    '<script src="{prefix}/docs/swagger-ui-bundle.js"></script>'
    '<script src="{prefix}/docs/start.js"></script></html>'
)
_SCRIPT = (
    'SwaggerUIBundle({url: document.getElementById("swagger-ui").dataset.document, '
    'dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null});\n'
)


class DocumentationRoutes:
    """The handlers, bound to one server."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def routes(self) -> list[Route]:
        return [
            Route(PAGE, self.page, methods=["GET"]),
            Route(f"{PAGE}/{{file}}", self.asset, methods=["GET"]),
        ]

    async def page(self, request: Request) -> Response:
        before = html.escape(prefix(request, self.server.settings))  # the path of a proxy
        return HTMLResponse(_HTML.replace("{prefix}", before), headers=HEADERS)

    async def asset(self, request: Request) -> Response:
        name = request.path_params["file"]
        if name == START:
            return Response(_SCRIPT, media_type="text/javascript", headers=HEADERS)
        if name not in ASSETS:
            raise NotFoundError(f"There is no route {shown(request.url.path)}.")
        return FileResponse(_FOLDER / name, media_type=ASSETS[name], headers=HEADERS)
