"""One answer on its way out: server-sent events to the byte, and the connection they are written to."""

from __future__ import annotations

import asyncio
from typing import Literal

from aiohttp import web

from vlmrt.actors.edge.responses import ChatUsage, encode_json, error_body
from vlmrt.runtime.errors import RequestError
from vlmrt.runtime.messages import FinishReason

DONE = b"data: [DONE]\n\n"
FREE_BYTES = 16 << 10  # of a transport's buffer; it stops taking more at 64 KiB
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}

UsageStyle = Literal["none", "last", "every"]


class ChunkEncoder:
    """The chunks of one answer.  What is the same in all of them is encoded once.

    Args: usage "last" adds a chunk of its own before the end, and null to the others; with "every" the caller also
    gives the counts so far to every chunk.
    """

    def __init__(self, answer_id: str, created: int, model: str, usage: UsageStyle) -> None:
        constant = encode_json({"id": answer_id, "object": "chat.completion.chunk", "created": created, "model": model})
        self._start = b"data: " + constant[:-1] + b',"choices":['
        self._delta = self._start + b'{"index":0,"delta":'
        self.usage = usage
        self._end = b'],"usage":null}\n\n' if usage == "last" else b"]}\n\n"

    def role(self, usage: ChatUsage | None = None) -> bytes:
        """The first chunk; it goes out with the first token, never earlier."""
        return self._chunk(b'{"role":"assistant","content":""}', b"null", usage)

    def text(self, text: str, usage: ChatUsage | None = None) -> bytes:
        return self._chunk(b'{"content":' + encode_json(text) + b"}", b"null", usage)

    def finish(self, reason: FinishReason, usage: ChatUsage | None = None) -> bytes:
        return self._chunk(b"{}", b'"' + reason.encode() + b'"', usage)

    def end(self, usage: ChatUsage) -> bytes:
        if self.usage == "none":
            return DONE
        return self._start + b'],"usage":' + encode_json(usage) + b"}\n\n" + DONE

    def _chunk(self, delta: bytes, reason: bytes, usage: ChatUsage | None) -> bytes:
        end = b'],"usage":' + encode_json(usage) + b"}\n\n" if usage is not None else self._end
        return b"".join((self._delta, delta, b',"logprobs":null,"finish_reason":', reason, b"}", end))


class EventStream:
    """The response of a streamed answer.  Its status goes out with the first write."""

    def __init__(self, request: web.Request, headers: dict[str, str], write_timeout_s: float) -> None:
        self._request = request
        self._response = web.StreamResponse(headers={**HEADERS, **headers})
        self._write_timeout_s = write_timeout_s

    @property
    def begun(self) -> bool:
        return self._response.prepared

    async def write(self, data: bytes) -> None:
        """Raises: ConnectionResetError where the client is gone, or reads so slowly that it was cut."""
        transport = self._request.transport
        if self.begun and transport is not None and len(data) + transport.get_write_buffer_size() < FREE_BYTES:
            await self._response.write(data)  # cannot wait: the timer below would cost as much as the write
            return
        try:
            async with asyncio.timeout(self._write_timeout_s):
                if not self.begun:
                    await self._response.prepare(self._request)
                await self._response.write(data)
        except TimeoutError:
            if transport is not None:
                transport.abort()
            raise ConnectionResetError("the client reads too slowly") from None

    async def fail(self, error: RequestError) -> None:
        """An error after the stream began: the last event before the end mark."""
        await self.write(b"data: " + error_body(error) + b"\n\n" + DONE)

    async def close(self) -> web.StreamResponse:
        await self._response.write_eof()
        return self._response
