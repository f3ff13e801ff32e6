"""The supervisor's descriptor server: makes the memfds of each incarnation, holds them while it lives, passes them on.

Who asks is the kernel's word (SO_PEERCRED), not the asker's: only a live actor's process gets anything, and it creates
memory under its own name and epoch only.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import msgspec

from vlmrt.runtime.config import MemoryOptions
from vlmrt.runtime.memory_client import MemoryReply, MemoryRequest
from vlmrt.runtime.messages import ActorName, Epoch

_REQUEST_TIMEOUT_S = 5.0
_MAX_REQUEST_BYTES = 4096
_PAGE_SLACK_BYTES = 64 << 20  # a slab is rounded up to whole pages
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL  # a peer cannot shrink it under a reader (SIGBUS)

logger = logging.getLogger(__name__)

Owner = tuple[ActorName, Epoch]


def memory_limits(memory: MemoryOptions) -> dict[str, int]:
    """Use -> the most bytes that one incarnation may ask for."""
    return {
        "arena": memory.pixel_arena_mib << 20,
        "slab": int(memory.embedding_cache_gib * (1 << 30)) + _PAGE_SLACK_BYTES,
    }


class MemoryServer:
    """Listens on a unix socket in the run directory; one request per connection."""

    def __init__(self, path: Path, limits: dict[str, int], owner_of_pid: Callable[[int], Owner | None]) -> None:
        self._path = path
        self._limits = limits
        self._owner_of_pid = owner_of_pid
        self._held: dict[str, tuple[Owner, int]] = {}
        self._making: set[str] = set()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._listener.setblocking(False)

    async def serve(self) -> None:
        """Answer until cancelled."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tasks:
            while True:
                connection, _ = await loop.sock_accept(self._listener)
                tasks.create_task(self._serve_one(connection))

    async def _serve_one(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, TimeoutError):
            connection.setblocking(False)
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(_REQUEST_TIMEOUT_S):
                payload = await loop.sock_recv(connection, _MAX_REQUEST_BYTES)
            pid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
            reply, descriptor = await self.answer(pid, payload)
            descriptors = [] if descriptor is None else [descriptor]
            socket.send_fds(connection, [msgspec.msgpack.encode(reply)], descriptors)

    async def answer(self, pid: int, payload: bytes) -> tuple[MemoryReply, int | None]:
        """Reply and descriptor (still ours) for what the process with this pid asked."""
        try:
            request = msgspec.msgpack.decode(payload, type=MemoryRequest)
        except msgspec.DecodeError as error:
            return MemoryReply(f"bad request: {error}"), None
        owner = self._owner_of_pid(pid)
        if owner is None:
            return MemoryReply(f"process {pid} is no actor of this service"), None
        if request.action == "open":
            held = self._held.get(request.name)
            return (MemoryReply(), held[1]) if held else (MemoryReply("no such memory"), None)
        return await self._create(pid, owner, request)

    async def _create(self, pid: int, owner: Owner, request: MemoryRequest) -> tuple[MemoryReply, int | None]:
        use, _, rest = request.name.partition("/")
        limit = self._limits.get(use)
        if limit is None or rest != f"{owner[0]}/{owner[1]}":
            return MemoryReply(f"the name does not belong to {owner[0]} epoch {owner[1]}"), None
        if not 0 < request.num_bytes <= limit:
            return MemoryReply(f"{request.num_bytes} bytes are outside of 1..{limit}"), None
        if request.name in self._held or request.name in self._making:
            return MemoryReply("it exists already"), None
        self._making.add(request.name)
        try:
            descriptor = await asyncio.to_thread(_make_memory, request.name, request.num_bytes)
        except OSError as error:
            return MemoryReply(f"the system refused: {error}"), None
        finally:
            self._making.discard(request.name)
        if self._owner_of_pid(pid) != owner:
            os.close(descriptor)
            return MemoryReply(f"{owner[0]} epoch {owner[1]} is gone"), None
        self._held[request.name] = (owner, descriptor)
        return MemoryReply(), descriptor

    def drop(self, actor: ActorName, epoch: Epoch) -> None:
        """That incarnation is gone: let go of its memory (mappings of peers keep theirs alive until they close)."""
        for name in [name for name, (owner, _) in self._held.items() if owner == (actor, epoch)]:
            os.close(self._held.pop(name)[1])

    def close(self) -> None:
        self._listener.close()
        for _, descriptor in self._held.values():
            os.close(descriptor)
        self._held.clear()


def _make_memory(name: str, num_bytes: int) -> int:
    """A sealed memfd whose pages are reserved: too little memory is an error here, not a SIGBUS at first touch."""
    descriptor = os.memfd_create(f"vlmrt/{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
