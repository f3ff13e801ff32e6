"""The socket on which a service listens for HTTP: bound by the supervisor, inherited by every edge."""

from __future__ import annotations

import socket
from pathlib import Path

from vlmrt.runtime.config import ServerOptions
from vlmrt.runtime.errors import StartupError
from vlmrt.runtime.transport import socket_path

_LISTEN_BACKLOG = 1024


def bind_http(server: ServerOptions) -> socket.socket:
    """The listening socket that every edge inherits.  Raises StartupError naming --host or --port."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            server.host or None, server.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise StartupError(f"--host {server.host}: {error.strerror}") from error
    listener = socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_LISTEN_BACKLOG)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise StartupError(f"cannot listen on {server.host}, --port {server.port}: {reason}") from error
    listener.setblocking(False)
    return listener


def bind_private(run_dir: Path) -> socket.socket:
    """As bind_http, where only this user can reach it: run_dir lets nobody else in, and takes the socket with it."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    listener.bind(str(socket_path(run_dir, "http")))
    listener.listen(_LISTEN_BACKLOG)
    listener.setblocking(False)
    return listener


def url_of(listener: socket.socket) -> str:
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if listener.family == socket.AF_INET6 else f"http://{host}:{port}"
