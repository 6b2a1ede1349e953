"""Which pages may have a browser send what changes something."""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from stepweave.api.urls import forwarded
from stepweave.config import Settings
from stepweave.errors import InvalidRequest, shown

SAFE = ("GET", "HEAD", "OPTIONS")
PORTS = {"http": 80, "https": 443}


def check_site(scope: Scope, settings: Settings) -> None:
    """Raise InvalidRequest (code `cross_site`) for what a page of another origin sends, unless that is an allowed one.

    Browsers send forms and some other bodies without asking first (Fetch, 4.8), and keep only the answer from the page. What
    they say of a request, no page can change; clients that are no browsers say nothing of it.
    """
    if scope["method"] in SAFE:
        return
    headers = Headers(scope=scope)
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if site in ("same-origin", "none") or (site is None and origin is None):
        return
    if origin is not None:
        allowed = origin in settings.cors_origins or "*" in settings.cors_origins
        if allowed or (site != "cross-site" and _is_own(origin, headers, settings)):
            return
    raise InvalidRequest(
        f"The request was sent by a page of another origin, {shown(origin or site)}; those that may are named in "
        "STEPWEAVE_CORS_ORIGINS.",
        code="cross_site",
        param="Origin",
    )


def _is_own(origin: str, headers: Headers, settings: Settings) -> bool:
    """Whether an origin is this server's, by the names that it is reached by."""
    hosts = [headers.get("host", ""), urlsplit(settings.base_url or "").netloc, forwarded(headers, settings, "host")]
    try:
        scheme = urlsplit(origin).scheme
        return bool(scheme) and _place(origin) in [_place(f"{scheme}://{host}") for host in hosts if host]
    except ValueError:  # of what is no URL
        return False


def _place(url: str) -> tuple[str | None, int | None]:
    parts = urlsplit(url)
    return parts.hostname, parts.port or PORTS.get(parts.scheme)
