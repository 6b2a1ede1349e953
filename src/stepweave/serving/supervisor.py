"""Ends the command `bentoml serve` when the server cannot start.

The command binds the port and supervises the serving process. By itself it logs a traceback if the
port is in use, and has no exit status if the model cannot be loaded.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import signal
import socket
import tempfile
from pathlib import Path

import click
from bentoml._internal.configuration.containers import BentoMLContainer

# environment variable of the serving process: the command's process id, and a file for the reason
_COMMAND = "_STEPWEAVE_COMMAND"

_REASONS = {
    errno.EADDRINUSE: "is in use by another process; stop it, or choose another port",
    errno.EACCES: "may not be bound by this user; choose a port above 1023",
    errno.EADDRNOTAVAIL: (
        "cannot be bound: no interface of this machine has that address; choose another with --host"
    ),
}


def prepare_command(exit_on_failure: bool) -> None:
    """Check the port, in the command `bentoml serve` before it binds it; no effect in other
    commands.

    Raises SystemExit with a message (status 1) if the port cannot be bound, and at the command's
    end if the serving process has reported that it cannot start.
    """
    context = click.get_current_context(silent=True)
    if context is None or "port" not in context.params:
        return
    check_port(
        context.params.get("host") or BentoMLContainer.http.host.get(),
        context.params["port"] or BentoMLContainer.http.port.get(),
    )
    if exit_on_failure:
        handle, name = tempfile.mkstemp(prefix="stepweave-")
        os.close(handle)
        os.environ[_COMMAND] = f"{os.getpid()}:{name}"
        context.call_on_close(lambda: _end(Path(name)))


def check_port(host: str, port: int) -> None:
    """Raise SystemExit if a port cannot be bound."""
    with contextlib.suppress(ValueError):  # no IP address: BentoML says so
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the command does
            try:
                probe.bind((host, port))
            except OSError as error:
                reason = _REASONS.get(error.errno or 0, f"cannot be bound: {error.strerror}")
                raise SystemExit(
                    f"stepweave: port {port} of {host} {reason} (`stepweave serve --port N`, `make "
                    f"serve PORT=N`)"
                ) from None


def report_failure(reason: str) -> None:
    """In the serving process: end the command with status 1 and this reason as its last line;
    without a command (BentoML's worker run by itself), end this process with status 1."""
    process, _, file = os.environ.get(_COMMAND, "").partition(":")
    if not process or int(process) != os.getppid():
        os._exit(1)
    Path(file).write_text(reason)
    os.kill(int(process), signal.SIGTERM)


def _end(report: Path) -> None:
    reason = report.read_text()
    report.unlink()
    if reason:
        raise SystemExit(f"stepweave: the server cannot start: {reason}")
