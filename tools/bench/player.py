"""The clients of one process: requests sent, and the time at which each token came back.

Media are prepared and bodies put together before the time of a request begins; answers are counted while they come, and
parsed only where a next turn repeats them, before it is sent.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import aiohttp

from vlmrt.tools.bench.answers import MAX_SHOWN_BYTES, Answer
from vlmrt.tools.bench.asks import Ask, Dialogue, Target
from vlmrt.tools.bench.media import Media, is_video
from vlmrt.tools.bench.recounted import Tokenizer, recount, texts_by_arrival
from vlmrt.tools.bench.replies import Client, Load, Reply

MAX_OPENED = 256  # connections that are open before the clock starts
MAX_ANSWER_BYTES = 64 << 20  # an answer is kept whole until its end; a token is a few hundred


class Failed(Exception):
    """Why a request does not count."""

    def __init__(self, kind: str, error: str) -> None:
        super().__init__(error)
        self.kind = kind


class Exchange(NamedTuple):
    """One request and what came of it."""

    ask: Ask
    answer: Answer
    texts: list[str]  # that each arrival brought, where a tokenizer counts them
    sent_s: float
    end_s: float
    failed: Failed | None


class Standing:
    """How far a process has come; what a progress bar shows."""

    def __init__(self) -> None:
        self.num_done = 0
        self.num_failed = 0
        self.num_tokens = 0
        self.num_open = 0


class Player:
    """The clients of one process, for one load."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        target: Target,
        parts: Mapping[Media, bytes],
        load: Load,
    ) -> None:
        self._session = session
        self._target = target
        self._parts = parts
        self._load = load
        self._start_s = 0.0
        self._tokenizer = Tokenizer(target.tokenizer) if target.tokenizer is not None else None
        self._headers = {"Content-Type": "application/json", **dict(target.headers)}
        self._exchanges: dict[int, list[Exchange]] = {}  # by client
        self.standing = Standing()

    async def connect(self) -> None:
        """Open connections that the requests will find; where that fails, the requests will say so."""

        async def one() -> None:
            with suppress(aiohttp.ClientError, OSError, TimeoutError):
                async with asyncio.timeout(10), self._session.get(f"{self._target.url}/health") as answer:
                    await answer.read()

        wanted = self._load.num_slots or len(self._load.clients or self._load.streams)
        await asyncio.gather(*(one() for _ in range(min(wanted, MAX_OPENED))))

    async def play(self, start_s: float, stop: asyncio.Event) -> None:
        """Send everything and take in what comes. Streams end when `stop` is set."""
        self._start_s = start_s
        if self._load.streams:
            await self._all([(ask,) for ask in self._load.streams], len(self._load.streams), stop)
        else:
            await self._all(self._load.clients, self._load.num_slots or len(self._load.clients), None)

    def replies(self) -> list[list[Reply]]:
        """Those of each client, in order. What takes time is done here, after the clock."""
        return [[self._reply(one) for one in self._exchanges[number]] for number in sorted(self._exchanges)]

    async def _all(self, clients: Sequence[Client], num_slots: int, stop: asyncio.Event | None) -> None:
        waiting = deque(range(len(clients)))

        async def slot() -> None:
            while waiting:
                number = waiting.popleft()
                self._exchanges[number] = await self._client(clients[number], stop)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(num_slots, len(clients))):
                group.create_task(slot())

    async def _client(self, asks: Client, stop: asyncio.Event | None) -> list[Exchange]:
        exchanges = []
        dialogue = Dialogue(self._target, self._parts)
        before = b""
        for ask in asks:
            await asyncio.sleep(self._start_s + ask.at_s - time.monotonic())
            answer, failed = Answer(), None
            try:
                body = dialogue.body(ask, before)
            except ValueError as wrong:
                failed = Failed("not sent", f"not sent after the turn before it: {wrong}")
            sent_s = time.monotonic()
            if failed is None:
                failed = await self._failure(ask, body, answer, sent_s, stop)
            end_s = time.monotonic()
            before = answer.end()
            exchanges.append(self._ended(ask, answer, before, failed, sent_s, end_s))
        return exchanges

    def _ended(
        self, ask: Ask, answer: Answer, whole: bytes, failed: Failed | None, sent_s: float, end_s: float
    ) -> Exchange:
        texts: list[str] = []
        try:
            if failed is None and not self._load.streams:
                check_end(ask, answer)
            if self._tokenizer is not None:
                texts = texts_by_arrival(answer, whole)
        except Failed as wrong:
            failed = wrong
        except ValueError as wrong:
            failed = failed or Failed("no stream of chunks", str(wrong))
        self.standing.num_done += 1
        self.standing.num_failed += failed is not None
        return Exchange(ask, answer, texts, sent_s, end_s, failed)

    async def _failure(
        self, ask: Ask, body: bytes, answer: Answer, sent_s: float, stop: asyncio.Event | None
    ) -> Failed | None:
        """Send it and take in the answer. Returns why it failed, if it did."""
        self.standing.num_open += 1
        try:
            async with asyncio.timeout(self._start_s + self._load.limit_s - sent_s):
                stopped = await self._send(body, answer, stop)
            if answer.error is not None:
                raise Failed("error in the stream", answer.error)
            if stop is not None and not stopped:
                early = f"a stream ended after {answer.count} tokens, before the other clients were done"
                raise Failed("ended early", early)
        except Failed as failed:
            return failed
        except TimeoutError:
            return Failed("timeout", f"not done {self._load.limit_s:g} s after the start")
        except (aiohttp.ClientError, OSError, ValueError) as lost:
            return Failed(type(lost).__name__, f"{type(lost).__name__}: {lost}")
        finally:
            self.standing.num_open -= 1
        return None

    async def _send(self, body: bytes, answer: Answer, stop: asyncio.Event | None) -> bool:
        """Returns whether the stream was ended because all other clients are done.  Raises: Failed."""
        url = self._target.url + self._target.endpoint
        async with self._session.post(url, data=body, headers=self._headers) as response:
            if response.status != 200:
                text = (await beginning(response.content)).decode(errors="replace")
                raise Failed(f"HTTP {response.status}", f"{response.status}: {text}")
            num_bytes = 0
            async for piece in response.content.iter_any():
                num_bytes += len(piece)
                if num_bytes > MAX_ANSWER_BYTES:
                    raise Failed("too long", f"the answer has more than {MAX_ANSWER_BYTES >> 20} MiB")
                before = answer.count
                answer.push(piece, time.monotonic())
                self.standing.num_tokens += answer.count - before
                if stop is not None and stop.is_set():
                    response.close()
                    return True
        return False

    def _reply(self, one: Exchange) -> Reply:
        ask, answer, failed = one.ask, one.answer, one.failed
        if self._tokenizer is not None:
            recount(answer, one.texts, self._tokenizer)
        return Reply(
            sent_s=one.sent_s,
            times_s=tuple(answer.times_s),
            num_tokens=tuple(answer.num_tokens),
            error=None if failed is None else str(failed),
            error_kind="" if failed is None else failed.kind,
            turn=ask.turn,
            due_s=self._start_s + ask.at_s if ask.at_s else None,
            end_s=one.end_s,
            answer_tokens=answer.usage_tokens,
            prompt_tokens=answer.prompt_tokens,
            asked_tokens=ask.num_tokens,
            counted_by=answer.counted_by or "usage",
            num_images=sum(not is_video(media) for media in ask.media),
            num_videos=sum(is_video(media) for media in ask.media),
        )


async def beginning(content: aiohttp.StreamReader) -> bytes:
    """As much of a refusal as is shown: it may have no end."""
    text = b""
    while len(text) < MAX_SHOWN_BYTES and (piece := await content.read(MAX_SHOWN_BYTES - len(text))):
        text += piece
    return text


def check_end(ask: Ask, answer: Answer) -> None:
    """Raises: Failed if an answer that ended by itself does not count."""
    num_tokens = answer.usage_tokens or answer.count
    wrong_length = num_tokens != ask.num_tokens if ask.exact else not num_tokens
    if wrong_length or not answer.done:
        asked = f" of {ask.num_tokens}" if ask.num_tokens is not None else ""
        no_end = "" if answer.done else " and no end"
        raise Failed("wrong length" if answer.done else "no end", f"the answer has {num_tokens}{asked} tokens{no_end}")
