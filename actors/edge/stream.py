"""The connection that a streamed answer is written to."""

from __future__ import annotations

import asyncio

from aiohttp import web

from vlmrt.actors.edge.responses import error_body
from vlmrt.runtime.errors import RequestError

DONE = b"data: [DONE]\n\n"
FREE_BYTES = 16 << 10  # of a transport's buffer; it stops taking more at 64 KiB
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


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

    async def close(self) -> web.StreamResponse:
        await self._response.write_eof()
        return self._response


def failed_stream(error: RequestError) -> bytes:
    """An error after the stream began: the last event before the end mark."""
    return b"data: " + error_body(error) + b"\n\n" + DONE
