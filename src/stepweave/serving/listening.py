"""The addresses on which this process really listens, whatever its command was asked for."""

from __future__ import annotations

import ipaddress
import logging

import psutil

logger = logging.getLogger(__name__)

Address = tuple[str, int]


def listening() -> list[Address]:
    """Address and port of each TCP socket on which this process listens; empty if unknown."""
    try:
        connections = psutil.Process().net_connections(kind="tcp")
    except (psutil.Error, OSError, NotImplementedError):
        return []
    sockets = [socket for socket in connections if socket.status == psutil.CONN_LISTEN]
    return sorted({(socket.laddr.ip, socket.laddr.port) for socket in sockets})


def is_loopback(host: str) -> bool:
    """Whether an address can only be reached from this machine."""
    address = ipaddress.ip_address(host.partition("%")[0])  # without its zone
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def log_addresses(addresses: list[Address], *, keys: bool) -> None:
    """Log where the server listens, and warn if other machines can reach it without API `keys`."""
    for host, port in addresses:
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        logger.info("listening on %s", address)
        if not keys and not is_loopback(host):
            logger.warning(
                "%s is open to other machines without authentication: set STEPWEAVE_API_KEYS, or "
                "listen with --host 127.0.0.1",
                address,
            )
