"""What every case of the client suite works with.  Needs the openai package of any version, and nothing else."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import time
import urllib.request
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NamedTuple, TypeVar

import openai

TIMEOUT_S = 60.0
RED, BLUE = (214, 34, 34), (40, 80, 220)

Result = TypeVar("Result")


class Skip(Exception):
    """Why a case says nothing about this version of the client."""


class Version(NamedTuple):
    major: int
    minor: int


def version_of(text: str) -> Version:
    major, minor = text.split(".")[:2]
    return Version(int(major), int(minor))


CLIENT = version_of(openai.__version__)


def needs(major: int, minor: int, what: str) -> None:
    """Raises: Skip where the client is older."""
    if Version(major, minor) > CLIENT:
        raise Skip(f"{what} came with openai {major}.{minor}")


def stream_helper(client: Any) -> Any:
    """`stream` where this version has it."""
    return client.chat.completions.stream if CLIENT >= (1, 92) else client.beta.chat.completions.stream


def parse_helper(client: Any) -> Any:
    """`parse` where this version has it."""
    return client.chat.completions.parse if CLIENT >= (1, 92) else client.beta.chat.completions.parse


class Api:
    """A running server and the clients that talk to it.

    Clients are typed Any: the suite is checked against one version of the package and runs with several.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url
        self.api_key = api_key
        self.client: Any = openai.OpenAI(**self.options())

    def options(self, **changes: Any) -> dict[str, Any]:
        """Of a client."""
        key = self.api_key or "none"
        return {"base_url": f"{self.url}/v1", "api_key": key, "max_retries": 0, "timeout": TIMEOUT_S, **changes}

    @contextmanager
    def other_client(self, **changes: Any) -> Iterator[Any]:
        with openai.OpenAI(**self.options(**changes)) as client:
            yield client

    @asynccontextmanager
    async def async_client(self, **changes: Any) -> AsyncIterator[Any]:
        async with openai.AsyncOpenAI(**self.options(**changes)) as client:
            yield client

    def run(self, ask: Callable[[Any], Coroutine[Any, Any, Result]]) -> Result:
        """What the coroutine makes of an asynchronous client."""

        async def with_client() -> Result:
            async with self.async_client() as client:
                return await asyncio.wait_for(ask(client), TIMEOUT_S)

        return asyncio.run(with_client())

    def chat(self, content: Any = "Hello", **fields: Any) -> Any:
        """A chat completion about one user message; greedy unless said otherwise."""
        return self.client.chat.completions.create(**asking(content, **fields))

    def completion(self, prompt: Any, **fields: Any) -> Any:
        fields = {"model": "model", "max_tokens": 8, "temperature": 0, **fields}
        return self.client.completions.create(prompt=prompt, **fields)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """JSON of a route that the client has no method for."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.api_key or 'none'}"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            return json.load(response)

    def token_ids(self, text: str) -> list[int]:
        tokens: list[int] = self.post("/tokenize", {"model": "model", "prompt": text, "add_special_tokens": False})[
            "tokens"
        ]
        return tokens

    def metric(self, name: str) -> float:
        """The sum over labels of one of the server's figures."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=TIMEOUT_S) as response:
            lines = response.read().decode().splitlines()
        values = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
        return sum(float(value) for key, value in values if key.partition("{")[0] == name)

    def wait_until_idle(self, deadline_s: float = 20.0) -> None:
        """Until no request runs or waits: figures are a heartbeat old."""
        ends = time.monotonic() + deadline_s
        while self.metric("vlmrt_requests_running") + self.metric("vlmrt_requests_waiting"):
            assert time.monotonic() < ends, f"requests still run after {deadline_s} s"
            time.sleep(0.1)


def asking(content: Any = "Hello", **fields: Any) -> dict[str, Any]:
    """The arguments of a chat completion."""
    fields.setdefault("messages", [{"role": "user", "content": content}])
    return {"model": "model", "temperature": 0, "max_tokens": 24, **fields}


def picture(color: tuple[int, int, int] = RED, size: int = 112) -> dict[str, Any]:
    """A part with a disc of one colour on white."""
    return {"type": "image_url", "image_url": {"url": picture_url(color, size)}}


def picture_url(color: tuple[int, int, int] = RED, size: int = 112) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(color, size)).decode()}"


def png(color: tuple[int, int, int], size: int) -> bytes:
    """A PNG by hand: environments of clients have no imaging library."""
    half = size / 2
    rows = (
        b"".join(
            bytes(color if (x - half) ** 2 + (y - half) ** 2 < (0.6 * half) ** 2 else (255, 255, 255))
            for x in range(size)
        )
        for y in range(size)
    )
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def about_a_red_disc(question: str = "What color is this?") -> list[dict[str, Any]]:
    return [picture(), text_part(question)]


def joined(chunks: Iterable[Any], index: int = 0) -> str:
    """The text of one choice of a stream."""
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices if choice.index == index)


def raises(kind: type[Exception], ask: Callable[[], Any]) -> Any:
    """The exception of exactly this class that the call raises."""
    try:
        found = ask()
    except kind as error:
        if type(error) is kind:
            return error
        raise AssertionError(f"{type(error).__name__} in place of {kind.__name__}: {error}") from error
    raise AssertionError(f"no {kind.__name__} but {str(found)[:200]}")
