"""A server whose answers come at times that are known: it writes down when it really sent what.

    python -m tests.tools.bench.scripted_server --port 8100 --ttft-ms 200 --itl-ms 20

Times to the first token and gaps between tokens are drawn around these (--spread) from a seed and the number of the
request. `GET /truth?last=N` tells what they came out as at the socket, in the last N answers: from a request's last
byte to the write of each chunk.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from aiohttp import web

WORD = " word"
PERCENTS = (50, 90, 95, 99)


class Script(NamedTuple):
    """How it answers."""

    ttft_s: float = 0.0
    itl_s: float = 0.0
    spread: float = 0.0  # times are drawn from (1 - spread) to (1 + spread) times these
    counts: str = "as asked"  # with every chunk if asked for; or "at the end", or "none"
    tokens_per_chunk: int = 1
    refused: tuple[str, ...] = ()  # fields of a body that are answered with 400
    refusal: str | None = None  # said then, in place of JSON
    longest: int | None = None  # tokens of an answer, whatever was asked for
    seed: int = 0


class Sent(NamedTuple):
    """One answer: when its request was there, and when each chunk with text was written."""

    begun_s: float
    times_s: tuple[float, ...]


class ScriptedServer:
    """Its routes, and what it has sent so far."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.sent: list[Sent] = []
        self.url = ""

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 30)
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/v1/models", self._models),
                web.get("/truth", self._truth),
                web.post("/forget", self._forget),
                web.post("/v1/chat/completions", self._answer),
                web.post("/v1/completions", self._answer),
            ]
        )
        return app

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "scripted", "object": "model"}]})

    async def _truth(self, request: web.Request) -> web.Response:
        return web.json_response(truth(self.sent[-int(request.query["last"]) :]))

    async def _forget(self, _: web.Request) -> web.Response:
        self.sent.clear()
        self.bodies.clear()
        self.headers.clear()
        return web.Response()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        text = await request.text()
        begun_s = time.monotonic()
        body = json.loads(text)
        for name in self.script.refused:
            if name in body and self.script.refusal is not None:
                return web.Response(status=400, text=self.script.refusal)
            if name in body:
                return web.json_response({"error": {"message": f"no such field: {name}"}}, status=400)
        self.bodies.append(body)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        is_chat = request.path.endswith("/chat/completions")
        await self._stream(response, body, begun_s, number=len(self.bodies), is_chat=is_chat)
        return response

    async def _stream(
        self, response: web.StreamResponse, body: dict[str, Any], begun_s: float, *, number: int, is_chat: bool
    ) -> None:
        script = self.script
        num_tokens = body.get("max_completion_tokens") or body.get("max_tokens") or 16
        num_tokens = min(num_tokens, script.longest or num_tokens)
        asked = body.get("stream_options") or {}
        continuous = script.counts == "as asked" and asked.get("continuous_usage_stats")
        counts = [*range(script.tokens_per_chunk, num_tokens, script.tokens_per_chunk), num_tokens]
        due_s = begun_s + np.cumsum(self._times_s(number, len(counts)))
        times_s, before = [], 0
        for count, at_s in zip(counts, due_s.tolist(), strict=True):
            usage = _usage(count) if continuous else None
            data = event(WORD * (count - before), is_chat=is_chat, usage=usage, is_first=before == 0)
            before = count
            if (wait_s := at_s - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            times_s.append(time.monotonic())
            await response.write(data)
        if asked.get("include_usage") and script.counts != "none":
            await response.write(_data({"choices": [], "usage": _usage(num_tokens)}))
        await response.write(b"data: [DONE]\n\n")
        self.sent.append(Sent(begun_s, tuple(times_s)))

    def _times_s(self, number: int, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """To the first chunk, and between the others."""
        rng = np.random.default_rng((self.script.seed, number))
        middle = np.asarray([self.script.ttft_s] + [self.script.itl_s] * (count - 1))
        return middle * rng.uniform(1 - self.script.spread, 1 + self.script.spread, count)


def _usage(count: int) -> dict[str, int]:
    return {"prompt_tokens": 7, "completion_tokens": count, "total_tokens": count + 7}


def _data(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def event(text: str, *, is_chat: bool, usage: dict[str, int] | None, is_first: bool) -> bytes:
    """One chunk, as servers write them."""
    delta = {"role": "assistant", "content": text} if is_first else {"content": text}
    said = {"delta": delta} if is_chat else {"text": text}
    chunk = {"id": "1", "object": "chunk", "model": "scripted", "choices": [{"index": 0, **said}], "usage": usage}
    return _data(chunk)


def truth(sent: Sequence[Sent]) -> dict[str, float]:
    """Under the names of a result, in ms."""
    samples = {
        "ttft": [one.times_s[0] - one.begun_s for one in sent],
        "itl": [gap for one in sent for gap in np.diff(one.times_s)],
        "tpot": [(one.times_s[-1] - one.times_s[0]) / (len(one.times_s) - 1) for one in sent if len(one.times_s) > 1],
        "e2el": [one.times_s[-1] - one.begun_s for one in sent],
    }
    found: dict[str, float] = {"completed": len(sent)}
    for name, values in samples.items():
        if values:
            found[f"mean_{name}_ms"] = 1e3 * float(np.mean(values))
            found[f"median_{name}_ms"] = 1e3 * float(np.median(values))
            found |= {f"p{percent}_{name}_ms": 1e3 * float(np.percentile(values, percent)) for percent in PERCENTS}
    return found


async def start(server: ScriptedServer, port: int = 0) -> web.AppRunner:
    runner = web.AppRunner(server.app(), shutdown_timeout=0.1, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    return runner


@contextlib.contextmanager
def scripted(script: Script = Script()) -> Iterator[ScriptedServer]:  # noqa: B008 - it is frozen
    """The server in a thread of its own."""
    server, loop, ready = ScriptedServer(script), asyncio.new_event_loop(), threading.Event()

    def run() -> None:
        runner = loop.run_until_complete(start(server))
        ready.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=run, name="scripted-server")
    thread.start()
    try:
        assert ready.wait(10)
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.tools.bench.scripted_server")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--ttft-ms", type=float, default=200.0)
    parser.add_argument("--itl-ms", type=float, default=20.0)
    parser.add_argument("--spread", type=float, default=0.5)
    parser.add_argument("--counts", choices=("as asked", "at the end", "none"), default="as asked")
    parser.add_argument("--tokens-per-chunk", type=int, default=1)
    options = parser.parse_args()
    script = Script(
        options.ttft_ms / 1e3, options.itl_ms / 1e3, options.spread, options.counts, options.tokens_per_chunk
    )
    server = ScriptedServer(script)

    async def serve() -> None:
        runner = await start(server, options.port)
        print(server.url, flush=True)
        try:
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
