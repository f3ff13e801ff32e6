"""The load: requests sent by processes of their own, and the time at which each token came back.

Pictures are drawn and encoded before the clock starts; answers are counted while they come, and parsed only where a
next turn repeats them, before it is sent. time.monotonic is one clock for all processes of a machine.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import NamedTuple

import aiohttp
import msgspec
import uvloop

from benchmarks.asks import Ask, Dialogue, Medium, drawn

CONNECT_S = 0.5  # for all clients to open their connections before the clock starts
JSON = {"Content-Type": "application/json"}
COUNT = re.compile(rb'"completion_tokens":\s*(\d+)')
ERROR = re.compile(rb'^data: (\{"error".*)', re.MULTILINE)
MAX_SHOWN_BYTES = 300

Client = tuple[Ask, ...]  # sends one request after the other


class Load(NamedTuple):
    """Clients that run side by side. Streams are ended, which is no error, when all other clients are done."""

    clients: tuple[Client, ...]
    streams: tuple[Ask, ...] = ()
    limit_s: float = 120.0  # what takes longer is given up, and counted


class Reply(NamedTuple):
    """What came back: the arrival time and the number of tokens so far, for every arrival that brought tokens."""

    sent_s: float
    times_s: tuple[float, ...] = ()
    num_tokens: tuple[int, ...] = ()
    error: str | None = None
    turn: int = 1  # of the ask


class Replies(NamedTuple):
    """Those of the clients, and those of the streams."""

    clients: list[Reply]
    streams: list[Reply]

    @property
    def errors(self) -> list[str]:
        return [reply.error for reply in (*self.clients, *self.streams) if reply.error is not None]


class AnswerCount:
    """Tokens in an answer's bytes so far, however they are cut into pieces, and the pieces."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.num_tokens = 0
        self.error: str | None = None
        self.done = False
        self._rest = b""

    def push(self, piece: bytes) -> bool:
        """Whether the piece completed an event that brought tokens."""
        self.pieces.append(piece)
        data = self._rest + piece
        end = data.rfind(b"\n\n") + 2 if b"\n\n" in data else 0
        self._rest = data[end:]
        events = data[:end]
        self.done = self.done or events.endswith(b"data: [DONE]\n\n")
        if (failed := ERROR.search(events)) is not None:
            self.error = failed[1][:MAX_SHOWN_BYTES].decode(errors="replace")
        at = events.rfind(b'"completion_tokens":')
        found = COUNT.match(events, at) if at >= 0 else None
        if found is None or int(found[1]) <= self.num_tokens:
            return False
        self.num_tokens = int(found[1])
        return True


class Player:
    """The clients of one process, for one load."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        parts: Mapping[Medium, msgspec.Raw],
        start_s: float,
        limit_s: float,
    ) -> None:
        self._session = session
        self._url = url
        self._parts = parts
        self._start_s = start_s
        self._limit_s = limit_s

    async def connect(self, num_connections: int) -> None:
        """Open connections that the requests will find; where that fails, the requests will say so."""

        async def one() -> None:
            with suppress(aiohttp.ClientError, OSError):
                async with self._session.get(f"{self._url}/health") as answer:
                    await answer.read()

        await asyncio.gather(*(one() for _ in range(num_connections)))

    async def client(self, asks: Client, stop: asyncio.Event | None) -> list[Reply]:
        replies = []
        dialogue = Dialogue(self._parts)
        answer = b""
        for ask in asks:
            await asyncio.sleep(self._start_s + ask.at_s - time.monotonic())
            count = AnswerCount()
            try:
                body = dialogue.body(ask, answer)
            except ValueError as wrong:
                error = f"not sent after the turn before it: {wrong}"
                replies.append(Reply(time.monotonic(), error=error, turn=ask.turn))
            else:
                replies.append(await self._send(ask, body, count, stop))
            answer = b"".join(count.pieces)
        return replies

    async def _send(self, ask: Ask, body: bytes, count: AnswerCount, stop: asyncio.Event | None) -> Reply:
        times: list[float] = []
        nums: list[int] = []
        error: str | None = None
        sent_s = time.monotonic()
        try:
            async with asyncio.timeout(self._start_s + self._limit_s - sent_s):
                async with self._session.post(f"{self._url}/v1/chat/completions", data=body, headers=JSON) as answer:
                    if answer.status != 200:
                        text = (await answer.read())[:MAX_SHOWN_BYTES].decode(errors="replace")
                        return Reply(sent_s, error=f"{answer.status}: {text}", turn=ask.turn)
                    async for piece in answer.content.iter_any():
                        now_s = time.monotonic()
                        if count.push(piece):
                            times.append(now_s)
                            nums.append(count.num_tokens)
                        if stop is not None and stop.is_set():
                            answer.close()
                            return Reply(sent_s, tuple(times), tuple(nums), count.error, ask.turn)
            error = count.error or wrong_end(ask, count, stopped_by_parent=stop is not None)
        except TimeoutError:
            error = f"not done {self._limit_s:g} s after the start"
        except (aiohttp.ClientError, OSError) as lost:
            error = f"{type(lost).__name__}: {lost}"
        return Reply(sent_s, tuple(times), tuple(nums), error, ask.turn)


def wrong_end(ask: Ask, count: AnswerCount, *, stopped_by_parent: bool) -> str | None:
    """Why an answer that ended by itself does not count, if it does not."""
    if stopped_by_parent:
        return f"a stream ended after {count.num_tokens} tokens, before the other clients were done"
    if not count.done or count.num_tokens != ask.num_tokens:
        return f"the answer has {count.num_tokens} of {ask.num_tokens} tokens" + ("" if count.done else " and no end")
    return None


async def play(
    connection: Connection, url: str, clients: Sequence[Client], parts: Mapping[Medium, msgspec.Raw], load: Load
) -> list[list[Reply]]:
    """Open the connections, wait for the start time that the parent sends, play.

    While it plays, one more message from the parent means stop, if the clients are streams.
    """
    start_s: float = connection.recv()
    stop = asyncio.Event() if load.streams else None
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
    ) as session:
        player = Player(session, url, parts, start_s, load.limit_s)
        await player.connect(len(clients))
        async with asyncio.TaskGroup() as group:
            if stop is not None:
                group.create_task(hear(connection, stop))
            tasks = [group.create_task(player.client(asks, stop)) for asks in clients]
    return [task.result() for task in tasks]


async def hear(connection: Connection, stop: asyncio.Event) -> None:
    """Wait for the parent's stop, in a thread, since the loop would leave the pipe unfit for blocking reads."""
    await asyncio.to_thread(connection.recv)
    stop.set()


def run_worker(connection: Connection, url: str) -> None:
    """A process of the pool: loads in, replies out, until None comes."""
    gc.disable()  # a pause here would look like one of the server
    while (load := connection.recv()) is not None:
        clients: Sequence[Client] = load.clients or [(ask,) for ask in load.streams]
        parts = drawn(ask for asks in clients for ask in asks)
        connection.send("ready")
        connection.send(uvloop.run(play(connection, url, clients, parts, load)))
        gc.collect()


class ClientPool:
    """Processes that send the load, so that the client is not what limits.

    Streams get processes of their own, since sending a large body delays what else the process does.
    """

    def __init__(self, url: str, num_processes: int = 4) -> None:
        if num_processes < 2:
            raise ValueError(f"num_processes {num_processes}: streams and other clients need one each")
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes: list[BaseProcess] = []
        for index in range(num_processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=run_worker, args=(theirs, url), name=f"client-{index}", daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def __enter__(self) -> ClientPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection, process in zip(self._connections, self._processes, strict=True):
            if process.is_alive():
                if error is None:
                    connection.send(None)
                else:
                    process.terminate()
            process.join(10)
            connection.close()

    def play(self, load: Load) -> Replies:
        """Draw the pictures, start all clients at one time, wait for them."""
        for_streams, for_clients = self._shares(load)
        parts = [(connection, Load(clients, (), load.limit_s)) for connection, clients in for_clients]
        stream_parts = [(connection, Load((), asks, load.limit_s)) for connection, asks in for_streams]
        for connection, part in (*parts, *stream_parts):
            connection.send(part)
        for connection, _ in (*parts, *stream_parts):
            connection.recv()
        start_s = time.monotonic() + CONNECT_S
        for connection, _ in (*parts, *stream_parts):
            connection.send(start_s)
        replies = _received(connection for connection, _ in parts)
        for connection, _ in stream_parts:
            connection.send("stop")
        return Replies(replies, _received(connection for connection, _ in stream_parts))

    def _shares(
        self, load: Load
    ) -> tuple[list[tuple[Connection, tuple[Ask, ...]]], list[tuple[Connection, tuple[Client, ...]]]]:
        """Which process has which streams, and which clients; processes without any are left out."""
        half = len(self._connections) // 2 if load.streams else 0
        first, rest = self._connections[:half], self._connections[half:]
        streams = [(connection, load.streams[index::half]) for index, connection in enumerate(first)]
        clients = [(connection, load.clients[index :: len(rest)]) for index, connection in enumerate(rest)]
        return [share for share in streams if share[1]], [share for share in clients if share[1]]


def _received(connections: Iterable[Connection]) -> list[Reply]:
    lists: list[list[list[Reply]]] = [connection.recv() for connection in connections]
    return [reply for clients in lists for replies in clients for reply in replies]
