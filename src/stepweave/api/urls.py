"""All URLs of the server: as configured, or with the request's host if that is trusted."""

from __future__ import annotations

import re
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request

from stepweave.config import Settings
from stepweave.errors import InvalidRequestError, shown

_HOST = re.compile(
    r"(?P<name>[a-z0-9_]([a-z0-9._-]{0,252})|\[[0-9a-f:.]{2,45}\])(:(?P<port>[0-9]{1,5}))?",
    re.ASCII,
)
# no "..", and no "//", which begins a host
_PREFIX = re.compile(r"(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*){1,16}/?")
_MAX_PORT = 65_535


def base_url(request: Request, settings: Settings) -> str:
    """The URL of the server's root, without a slash at its end.

    Raises InvalidRequestError with code `no_base_url` if none is configured and the host that the
    request names is not trusted: a client could have URLs made that lead others elsewhere.
    """
    if settings.base_url is not None:
        return settings.base_url.rstrip("/")
    host = forwarded(request.headers, settings, "host") or request.headers.get("host", "")
    scheme = (forwarded(request.headers, settings, "proto") or request.url.scheme).lower()
    if not is_trusted(host, settings) or scheme not in ("http", "https"):
        odd = "" if scheme in ("http", "https") else f" and the scheme {shown(scheme)}"
        raise InvalidRequestError(
            f"No URL can be made for an image: the request names the host {shown(host)}{odd}, "
            "which is not trusted. Set STEPWEAVE_BASE_URL to where clients reach this server, or "
            "name the host in STEPWEAVE_TRUSTED_HOSTS.",
            code="no_base_url",
        )
    return f"{scheme}://{host.lower()}{prefix(request, settings)}"


def is_trusted(host: str, settings: Settings) -> bool:
    """Whether a `Host` header is well-formed and names one of `STEPWEAVE_TRUSTED_HOSTS`."""
    parts = _HOST.fullmatch(host.lower())
    return (
        parts is not None
        and int(parts["port"] or 0) <= _MAX_PORT
        and _matches(parts["name"], settings.trusted_hosts)
    )


def is_address(host: str) -> bool:
    """Whether a `Host` header is an IP address, perhaps with a port."""
    try:
        ip_address(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False
    return True


def prefix(request: Request, settings: Settings) -> str:
    """The path that a proxy puts before the server's own, without a slash at its end; empty for
    none."""
    if settings.base_url is not None:
        return configured_prefix(settings)
    given = forwarded(request.headers, settings, "prefix")
    return given.rstrip("/") if _PREFIX.fullmatch(given) else ""


def configured_prefix(settings: Settings) -> str:
    """The path of STEPWEAVE_BASE_URL, without a slash at its end; empty for none."""
    return urlsplit(settings.base_url or "").path.rstrip("/")


def reference(request: Request, settings: Settings, path: str) -> str:
    """A reference to one of the server's paths, relative to the host that the client has just used
    (RFC 3986, 4.2)."""
    return f"{prefix(request, settings)}{path}"


def forwarded(headers: Headers, settings: Settings, name: str) -> str:
    """The value of `X-Forwarded-NAME` if proxies are trusted: the first, which is what the client
    used."""
    given = headers.get(f"x-forwarded-{name}", "") if settings.trust_forwarded else ""
    return given.partition(",")[0].strip()


def _matches(name: str, patterns: str) -> bool:
    for pattern in filter(None, (part.strip().lower() for part in patterns.split(","))):
        if pattern in ("*", name) or (pattern.startswith("*.") and name.endswith(pattern[1:])):
            return True
    return False
