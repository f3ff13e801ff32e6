"""A server with OpenAI's API in a thread of the test: what it answers is set, what it was asked is kept."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web

USAGE = {"prompt_tokens": 12, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}


class ChatServer:
    def __init__(self) -> None:
        self.url = ""
        self.asked: list[dict[str, Any]] = []  # bodies
        self.keys: list[str | None] = []  # of every request, also for the models
        self.pieces: list[str] = ["Hel", "lo."]
        self.finish_reason: str | None = "stop"
        self.error: tuple[int, str] | None = None  # in place of an answer
        self.models_error: tuple[int, str] | None = None
        self.ending = "data: [DONE]\n\n"
        self.never_ends = False
        self.began = threading.Event()  # the first piece of an endless answer is out
        self.left = threading.Event()  # its client went

    @property
    def last(self) -> dict[str, Any]:
        return self.asked[-1]

    async def models(self, request: web.Request) -> web.Response:
        self.keys.append(request.headers.get("Authorization"))
        if self.models_error is not None:
            status, text = self.models_error
            return web.Response(status=status, text=text, content_type="application/json")
        return web.json_response({"object": "list", "data": [{"id": "fake"}, {"id": "other"}]})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        self.keys.append(request.headers.get("Authorization"))
        self.asked.append(await request.json())
        if self.error is not None:
            status, text = self.error
            return web.Response(status=status, text=text, content_type="application/json")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await self._send(response, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for piece in self.pieces:
            await self._send(response, {"choices": [{"delta": {"content": piece}, "finish_reason": None}]})
        try:
            while self.never_ends:
                await self._send(response, {"choices": [{"delta": {"content": "."}}]})
                self.began.set()
                await asyncio.sleep(0.01)
        finally:
            if self.never_ends:
                self.left.set()
        await self._send(response, {"choices": [{"delta": {}, "finish_reason": self.finish_reason}]})
        await self._send(response, {"choices": [], "usage": USAGE})
        await response.write(self.ending.encode())
        return response

    async def _send(self, response: web.StreamResponse, event: dict[str, Any]) -> None:
        await response.write(f"data: {json.dumps(event)}\n\n".encode())


@contextmanager
def chat_server() -> Iterator[ChatServer]:
    server = ChatServer()
    started = threading.Event()
    ending: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        app = web.Application()
        app.add_routes([web.get("/v1/models", server.models), web.post("/v1/chat/completions", server.chat)])
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        server.url = f"http://{host}:{port}"
        ended = asyncio.Event()
        ending.append((asyncio.get_running_loop(), ended))
        started.set()
        await ended.wait()
        await runner.cleanup()

    thread = threading.Thread(target=asyncio.run, args=(serve(),), name="chat-server")
    thread.start()
    assert started.wait(20)
    try:
        yield server
    finally:
        loop, ended = ending[0]
        loop.call_soon_threadsafe(ended.set)
        thread.join(20)
        assert not thread.is_alive()
