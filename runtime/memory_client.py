"""The client side of the descriptor server: blocking calls with a deadline, usable from any thread."""

from __future__ import annotations

import socket
from typing import Literal

import msgspec

from vlmrt.runtime.errors import StartupError

_CALL_TIMEOUT_S = 30.0


class MemoryRequest(msgspec.Struct, frozen=True, array_like=True):
    """To the descriptor server, one per connection.  num_bytes is 0 when opening."""

    action: Literal["create", "open"]
    name: str
    num_bytes: int = 0


class MemoryReply(msgspec.Struct, frozen=True, array_like=True):
    """Comes with one descriptor if error is empty."""

    error: str = ""


def create_memory(server_path: str, name: str, num_bytes: int, *, timeout_s: float = _CALL_TIMEOUT_S) -> int:
    """A descriptor of new memory (the caller closes it).  Raises StartupError if the supervisor refuses or is gone."""
    try:
        reply, descriptor = _call(server_path, MemoryRequest("create", name, num_bytes), timeout_s)
    except OSError as error:
        raise StartupError(
            f"no memory {name} of {num_bytes} bytes: the supervisor does not answer ({error})"
        ) from error
    if descriptor is None:
        raise StartupError(f"no memory {name} of {num_bytes} bytes: {reply.error}")
    return descriptor


def open_memory(server_path: str, name: str, *, timeout_s: float = _CALL_TIMEOUT_S) -> int:
    """A descriptor of a peer's memory (the caller closes it).  Raises KeyError if there is none."""
    try:
        reply, descriptor = _call(server_path, MemoryRequest("open", name), timeout_s)
    except OSError as error:
        raise KeyError(f"memory {name}: the supervisor does not answer ({error})") from error
    if descriptor is None:
        raise KeyError(f"memory {name}: {reply.error}")
    return descriptor


def _call(server_path: str, request: MemoryRequest, timeout_s: float) -> tuple[MemoryReply, int | None]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as connection:
        connection.settimeout(timeout_s)
        connection.connect(server_path)
        connection.send(msgspec.msgpack.encode(request))
        payload, descriptors, _flags, _address = socket.recv_fds(connection, 4096, 1, socket.MSG_CMSG_CLOEXEC)
    if not payload:
        raise ConnectionError("connection closed")
    return msgspec.msgpack.decode(payload, type=MemoryReply), descriptors[0] if descriptors else None
