"""A server that only writes chunks prepared before, at a pace: so cheap that a client is busy long before it is.

    python -m benchmarks.paced_server --itl-ms 20 --tokens 400

Streams go in groups, one after the other within each period. `GET /truth` tells the periods that came out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from typing import cast

import numpy as np
import uvloop

NUM_GROUPS = 20
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    """One chunk of HTTP's transfer encoding."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(count: int) -> bytes:
    usage = {"prompt_tokens": 7, "total_tokens": count + 7, "completion_tokens": count}
    said = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "paced"}
    choice = {"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None}
    return b"data: " + json.dumps({**said, "choices": [choice], "usage": usage}).encode() + b"\n\n"


class Pace:
    """The streams that are open, and the clock that all of them follow."""

    def __init__(self, itl_s: float, num_tokens: int) -> None:
        self._itl_s = itl_s
        self._pieces = [chunk(event(count)) for count in range(1, num_tokens + 1)] + [chunk(b"data: [DONE]\n\n") + END]
        self._groups: list[dict[asyncio.Transport, int]] = [{} for _ in range(NUM_GROUPS)]
        self._next = 0
        self.periods_s: list[float] = []

    def begin(self, transport: asyncio.Transport) -> None:
        transport.write(HEAD)
        self._groups[self._next % NUM_GROUPS][transport] = 0
        self._next += 1

    def lose(self, transport: asyncio.Transport) -> None:
        for group in self._groups:
            group.pop(transport, None)

    async def run(self) -> None:
        tick_s, due_s, before_s = self._itl_s / NUM_GROUPS, time.monotonic(), [time.monotonic()] * NUM_GROUPS
        while True:
            for number, group in enumerate(self._groups):
                due_s += tick_s
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                if group:
                    self.periods_s.append(time.monotonic() - before_s[number])
                before_s[number] = time.monotonic()
                self._write(group)

    def _write(self, group: dict[asyncio.Transport, int]) -> None:
        for transport, count in list(group.items()):
            transport.write(self._pieces[count])
            if count + 1 == len(self._pieces):
                del group[transport]
            else:
                group[transport] = count + 1

    def truth(self) -> bytes:
        periods_ms = 1e3 * np.asarray(self.periods_s)
        found = {"median_itl_ms": float(np.median(periods_ms)), "p99_itl_ms": float(np.percentile(periods_ms, 99))}
        return json.dumps(found).encode()


class Connection(asyncio.Protocol):
    """Reads requests no further than it must to answer them."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._data = b""
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def connection_lost(self, exc: Exception | None) -> None:
        self._pace.lose(self._transport)

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, end, body = self._data.partition(b"\r\n\r\n")
        lengths = (line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        num_bytes = int(next(lengths, b":0").partition(b":")[2])
        if not end or len(body) < num_bytes:
            return
        self._data = body[num_bytes:]
        if head.startswith(b"POST"):
            self._pace.begin(self._transport)
        else:
            said = self._pace.truth() if b"/truth" in head and self._pace.periods_s else b""
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(said), said))


async def serve(itl_s: float, num_tokens: int) -> None:
    pace = Pace(itl_s, num_tokens)
    server = await asyncio.get_running_loop().create_server(lambda: Connection(pace), "127.0.0.1", 0, backlog=4096)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await pace.run()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paced_server")
    parser.add_argument("--itl-ms", type=float, default=20.0)
    parser.add_argument("--tokens", type=int, default=400)
    options = parser.parse_args()
    uvloop.run(serve(options.itl_ms / 1e3, options.tokens))
    return 0


if __name__ == "__main__":
    sys.exit(main())
