"""HTTP by hand: a connection that sends what a test says and shows every byte that comes back."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any


class RawConnection:
    """One request on one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def post(self, body: dict[str, Any], path: str = "/v1/chat/completions", **headers: str) -> None:
        encoded = json.dumps(body).encode()
        await self.send_head(len(encoded), path, **headers)
        self.writer.write(encoded)
        await self.writer.drain()

    async def send_head(self, length: int, path: str = "/v1/chat/completions", **headers: str) -> None:
        lines = [
            f"POST {path} HTTP/1.1",
            "Host: localhost",
            "Content-Type: application/json",
            f"Content-Length: {length}",
            "Connection: close",
            *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
        ]
        self.writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
        await self.writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers, names in lower case."""
        async with asyncio.timeout(20):
            text = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        status, *lines = text.strip().split("\r\n")
        return int(status.split()[1]), {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
        }

    async def body(self) -> bytes:
        """The whole body, chunked or not, to the end of the connection."""
        async with asyncio.timeout(20):
            return unchunked(await self.reader.read())

    async def events(self) -> AsyncIterator[bytes]:
        """The pieces of a chunked body as they come."""
        while True:
            async with asyncio.timeout(20):
                length = int(await self.reader.readline(), 16)
                piece = await self.reader.readexactly(length + 2)
            if not length:
                return
            yield piece[:-2]

    def close(self) -> None:
        self.writer.close()


def unchunked(data: bytes) -> bytes:
    body = b""
    while data:
        line, _, rest = data.partition(b"\r\n")
        length = int(line, 16)
        body += rest[:length]
        data = rest[length + 2 :]
        if not length:
            break
    return body


@asynccontextmanager
async def connection(port: int, receive_buffer: int | None = None) -> AsyncIterator[RawConnection]:
    sock = socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=1 << 16)
    try:
        yield RawConnection(reader, writer)
    finally:
        writer.close()


@asynccontextmanager
async def silent_host() -> AsyncIterator[tuple[int, asyncio.Event]]:
    """A host that takes requests and never answers one: its port, and whether it was asked."""
    asked = asyncio.Event()

    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await reader.read()
        writer.close()

    server = await asyncio.start_server(never, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], asked
