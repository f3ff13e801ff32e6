"""One answer of a server with OpenAI's API, as it streams: its text, then its figures."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import aiohttp
import msgspec

CONNECT_S = 10.0
SILENCE_S = 660.0  # between two bytes: a server may let a request wait for ten minutes
MAX_LINE_BYTES = 16 << 20
MAX_ERROR_BYTES = 64 << 10
MAX_MODELS_BYTES = 4 << 20  # of the list of models


class ChatError(Exception):
    """What a server refused, or that there is none, in one line."""


class Figures(NamedTuple):
    """Of one answer."""

    total_s: float = 0.0
    ttft_s: float | None = None  # None: no text came
    decode_s: float = 0.0  # from the first text to the last
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    finish_reason: str = ""


class Delta(msgspec.Struct):
    content: str | None = None


class Choice(msgspec.Struct):
    delta: Delta | None = None
    finish_reason: str | None = None


class PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: PromptDetails | None = None


class Event(msgspec.Struct):
    """What is read of one; null and what is left out are the same."""

    choices: list[Choice] | None = None
    usage: Usage | None = None
    error: Any = None


_EVENT = msgspec.json.Decoder(Event)


class Server(NamedTuple):
    """Where to ask: a URL without /v1, or unix:PATH."""

    url: str
    api_key: str = ""

    @property
    def base(self) -> str:
        return "http://localhost" if self.url.startswith("unix:") else self.url

    @asynccontextmanager
    async def session(self) -> AsyncIterator[aiohttp.ClientSession]:
        connector = (
            aiohttp.UnixConnector(self.url.removeprefix("unix:"))
            if self.url.startswith("unix:")
            else aiohttp.TCPConnector()
        )
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)
        async with aiohttp.ClientSession(
            connector=connector, headers=headers, timeout=timeout, read_bufsize=MAX_LINE_BYTES
        ) as session:
            try:
                yield session
            except aiohttp.InvalidURL:
                raise ChatError(f"{self.url} is no URL") from None
            except aiohttp.ClientConnectorError as error:
                known = error.errno is not None and error.errno > 0  # else it is of the name
                reason = os.strerror(error.errno or 0) if known else error.strerror
                raise ChatError(f"no server at {self.url} ({reason}); `vlmrt launch` starts one") from None
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise ChatError(f"the connection to {self.url} broke: {reason}") from None


async def first_model(server: Server) -> str:
    """The name of the first model that is served.  Raises: ChatError."""
    async with server.session() as session, session.get(f"{server.base}/v1/models") as response:
        await _check(response)
        try:
            return str(json.loads(await _whole(response))["data"][0]["id"])
        except (ValueError, RecursionError, KeyError, IndexError, TypeError):
            raise ChatError(f"{server.url} does not say which models it serves") from None


async def stream_answer(server: Server, body: dict[str, Any], show: Callable[[str], None]) -> Figures:
    """Ask, and show each piece of the answer's text as it comes.  Raises: ChatError, also in the middle."""
    began_s = time.monotonic()
    first_s = last_s = 0.0
    usage = Usage()
    finish_reason = ""
    async with server.session() as session, session.post(f"{server.base}/v1/chat/completions", json=body) as response:
        await _check(response)
        async for event in _events(response):
            if event.error is not None:
                raise ChatError(_message(event.error))
            for choice in event.choices or ():
                text = (choice.delta.content if choice.delta is not None else "") or ""
                if text:
                    last_s = time.monotonic()
                    first_s = first_s or last_s
                    show(text)
                finish_reason = choice.finish_reason or finish_reason
            usage = event.usage or usage
    return Figures(
        total_s=time.monotonic() - began_s,
        ttft_s=first_s - began_s if first_s else None,
        decode_s=last_s - first_s,
        prompt_tokens=usage.prompt_tokens or 0,
        cached_tokens=(usage.prompt_tokens_details or PromptDetails()).cached_tokens or 0,
        output_tokens=usage.completion_tokens or 0,
        finish_reason=finish_reason,
    )


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[Event]:
    """Raises: ChatError for a stream that ends before its end, or says what is no event."""
    try:
        async for line in response.content:
            field, _, value = line.decode(errors="replace").strip().partition(":")
            if field != "data":
                continue
            if value.strip() == "[DONE]":
                return
            yield _EVENT.decode(value)
    except (ValueError, msgspec.DecodeError, RecursionError):
        raise ChatError("the server's stream is not what the API has") from None
    raise ChatError("the server ended the answer in the middle")


async def _whole(response: aiohttp.ClientResponse) -> bytes:
    """Raises: ValueError if it does not end."""
    try:
        await response.content.readexactly(MAX_MODELS_BYTES + 1)
    except asyncio.IncompleteReadError as ended:
        return ended.partial
    raise ValueError


async def _check(response: aiohttp.ClientResponse) -> None:
    if response.status == 200:
        return
    text = (await response.content.read(MAX_ERROR_BYTES)).decode(errors="replace")
    try:
        message = _message(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        message = " ".join(text.split())[:200] or str(response.reason)
    hint = "; give the key in VLMRT_API_KEY or --api-key-file" if response.status == 401 else ""
    raise ChatError(f"{message} (status {response.status}){hint}")


def _message(error: Any) -> str:
    message = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(message).split())
