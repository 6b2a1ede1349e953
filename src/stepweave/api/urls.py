"""Where clients reach the server, for the URLs of pictures: configured, or as the request names it if that host is trusted."""

from __future__ import annotations

import re

from starlette.requests import Request

from stepweave.config import Settings
from stepweave.errors import InvalidRequest, shown

_HOST = re.compile(r"(?P<name>[a-z0-9_]([a-z0-9._-]{0,252})|\[[0-9a-f:.]{2,45}\])(:(?P<port>[0-9]{1,5}))?", re.ASCII)
_MAX_PORT = 65_535


def base_url(request: Request, settings: Settings) -> str:
    """The URL of the server's root, without a slash at its end.

    Raises InvalidRequest with code `no_base_url` if none is configured and the host that the request names is not trusted: a
    client could otherwise have URLs made that lead others astray.
    """
    if settings.base_url is not None:
        return settings.base_url.rstrip("/")
    host, scheme = request.headers.get("host", ""), request.url.scheme
    if settings.trust_forwarded:
        # proxies append: the first is the one that the client asked for
        host = request.headers.get("x-forwarded-host", host).partition(",")[0].strip()
        scheme = request.headers.get("x-forwarded-proto", scheme).partition(",")[0].strip().lower()
    found = _HOST.fullmatch(host.lower())
    port = found["port"] if found else None
    trusted = found is not None and int(port or 0) <= _MAX_PORT and _matches(found["name"], settings.trusted_hosts)
    if not trusted or scheme not in ("http", "https"):
        raise InvalidRequest(
            f"No URL can be made for a picture: the request names the host {shown(host)}"
            f"{'' if scheme in ('http', 'https') else f' and the scheme {shown(scheme)}'}, which is not trusted. Set "
            "STEPWEAVE_BASE_URL to where clients reach this server, or name the host in STEPWEAVE_TRUSTED_HOSTS.",
            code="no_base_url",
        )
    return f"{scheme}://{host.lower()}"


def _matches(name: str, patterns: str) -> bool:
    for pattern in filter(None, (one.strip().lower() for one in patterns.split(","))):
        if pattern in ("*", name) or (pattern.startswith("*.") and name.endswith(pattern[1:])):
            return True
    return False
