"""Cross-site request forgery: which web pages may have a browser send what changes something."""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from stepweave.api.urls import forwarded, is_address, is_trusted
from stepweave.config import Settings
from stepweave.errors import InvalidRequestError, shown
from stepweave.serving.server import Server

SAFE = ("GET", "HEAD", "OPTIONS")
PORTS = {"http": 80, "https": 443}


def check_site(scope: Scope, server: Server) -> None:
    """Raise InvalidRequestError (code `cross_site`) for what a page of another origin sends, unless
    that is an allowed one.

    Browsers send forms and some other bodies without asking first (Fetch, 4.8), and keep only the
    answer from the page. No page can change these headers; other clients do not send them.
    """
    if scope["method"] in SAFE:
        return
    headers, settings = Headers(scope=scope), server.settings
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if site is None and origin is None:
        return
    if origin is not None and (origin in settings.cors_origins or "*" in settings.cors_origins):
        return
    own = origin is not None and site != "cross-site" and _is_own(origin, headers, settings)
    if own or site in ("same-origin", "none"):
        _check_host(headers, settings)
        return
    raise InvalidRequestError(
        f"The request was sent by a page of another origin, {shown(origin or site)}; allowed "
        "origins are listed in STEPWEAVE_CORS_ORIGINS.",
        code="cross_site",
        param="Origin",
    )


def _check_host(headers: Headers, settings: Settings) -> None:
    """Raise InvalidRequestError (code `untrusted_host`) for a host name that anybody may have
    registered.

    A page's owner may let the page's own name resolve to this server (DNS rebinding): to the
    browser it is the same origin then. That is not possible with an address; and with API keys,
    such a page has none.
    """
    host = headers.get("host", "")
    if settings.base_url is not None and host.lower() == urlsplit(settings.base_url).netloc.lower():
        return
    if settings.api_keys or settings.api_keys_file or settings.trust_forwarded:
        return
    if is_address(host) or is_trusted(host, settings):
        return
    raise InvalidRequestError(
        f"A page sent this to the host {shown(host)}, which is not trusted without API keys; "
        "trusted hosts are listed in STEPWEAVE_TRUSTED_HOSTS.",
        code="untrusted_host",
        param="Host",
    )


def _is_own(origin: str, headers: Headers, settings: Settings) -> bool:
    """Whether an origin is this server's, by the hosts that clients use."""
    hosts = [
        headers.get("host", ""),
        urlsplit(settings.base_url or "").netloc,
        forwarded(headers, settings, "host"),
    ]
    try:
        scheme = urlsplit(origin).scheme
        return bool(scheme) and _place(origin) in [
            _place(f"{scheme}://{host}") for host in hosts if host
        ]
    except ValueError:  # not a URL
        return False


def _place(url: str) -> tuple[str | None, int | None]:
    parts = urlsplit(url)
    return parts.hostname, parts.port or PORTS.get(parts.scheme)
