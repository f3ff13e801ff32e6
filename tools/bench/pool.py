"""Processes that send a load, so that the client is not what limits."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import IO, NamedTuple, assert_never

import msgspec

from vlmrt.tools.bench import frames
from vlmrt.tools.bench.asks import Target
from vlmrt.tools.bench.replies import Client, Load, Replies, Reply

START_S = 0.05  # for all client processes to hear when the clock starts
CONNECT_S = 60.0  # for all of them to open their connections
PREPARE_S = 600.0  # to draw what a load shows
GRACE_S = 30.0  # beyond a load's own limit
END_S = 10.0
MAX_UNREAD = 1024  # messages of client processes


class Progress(NamedTuple):
    """How far a load has come, over all processes."""

    num_done: int
    num_failed: int
    num_tokens: int
    num_open: int
    elapsed_s: float  # since the clock started


Watch = Callable[[Progress], None]
Inbox = queue.Queue[tuple[int, frames.FromClient | None]]  # None: the process has ended


class Unplayable(Exception):
    """A load that cannot be played, or a client process that died."""


class ClientProcess:
    """One process of the pool; what it says comes to an inbox that all of them share."""

    def __init__(self, number: int, inbox: Inbox) -> None:
        self.number = number
        self._inbox = inbox
        command = [sys.executable, "-P", "-m", "vlmrt.tools.bench.worker"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        self._reader = threading.Thread(target=self._read, args=(self._out,), name=f"client-{number}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: frames.ToClient) -> None:
        try:
            frames.write(self._in, message)
        except OSError:
            raise Unplayable(f"client process {self.number} is gone") from None

    def _read(self, out: IO[bytes]) -> None:
        while (message := frames.read_from_client(out)) is not None:
            self._inbox.put((self.number, message))
        self._inbox.put((self.number, None))

    def end(self, *, at_once: bool) -> None:
        if at_once:
            self._process.kill()
        with suppress(OSError):  # it died with something unread
            self._in.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._out.close()


class ClientPool:
    """The client processes, for one load after the other: `with ClientPool(target) as pool: pool.play(load)`.

    Streams get processes of their own, since sending a large body delays what else the process does.
    """

    def __init__(self, target: Target, num_processes: int = 4) -> None:
        if num_processes < 1:
            raise ValueError(f"num_processes {num_processes} is not at least 1")
        self.target = target
        self._inbox: Inbox = queue.Queue(MAX_UNREAD)
        self._processes = [ClientProcess(number, self._inbox) for number in range(num_processes)]

    def __enter__(self) -> ClientPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.end(at_once=error is not None)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def play(self, load: Load, watch: Watch | None = None) -> Replies:
        """Draw the media, start all clients at one time, wait for them.

        Raises: Unplayable if there is a file that cannot be read, too few processes, or one that died.
        """
        if load.streams and len(self._processes) < 2:
            raise Unplayable("streams and other clients need a client process each: --client-processes 2 or more")
        shares = self._shares(load)
        heard = Heard()
        for process, share in shares:
            process.send(frames.Prepare(self.target, share))
        everyone = {process.number for process, _ in shares}
        self._listen(heard, lambda: heard.ready >= everyone, PREPARE_S, None)
        for process, _ in shares:
            process.send(frames.Connect())
        self._listen(heard, lambda: heard.connected >= everyone, CONNECT_S, None)
        heard.start_s = time.monotonic() + START_S
        for process, _ in shares:
            process.send(frames.Start(heard.start_s))
        clients = {process.number for process, share in shares if share.clients}
        waiting_s = load.limit_s + GRACE_S
        self._listen(heard, lambda: heard.played.keys() >= clients, waiting_s, watch)
        for process, _ in shares:
            process.send(frames.Stop())
        self._listen(heard, lambda: heard.played.keys() >= everyone, waiting_s, None)
        return heard.replies(clients)

    def _listen(self, heard: Heard, is_over: Callable[[], bool], waiting_s: float, watch: Watch | None) -> None:
        deadline_s = time.monotonic() + waiting_s
        while not is_over():
            try:
                number, message = self._inbox.get(timeout=max(0.0, deadline_s - time.monotonic()))
            except queue.Empty:
                raise Unplayable(f"the client processes did not end within {waiting_s:g} s") from None
            heard.take(number, message)
            if watch is not None and isinstance(message, frames.Moving):
                watch(heard.progress())

    def _shares(self, load: Load) -> list[tuple[ClientProcess, Load]]:
        """Which process has which streams, and which clients; processes without any are left out."""
        half = len(self._processes) // 2 if load.streams else 0
        for_streams, for_clients = self._processes[:half], self._processes[half:]
        shares = [
            (process, msgspec.structs.replace(load, clients=(), streams=load.streams[index::half], num_slots=None))
            for index, process in enumerate(for_streams)
        ]
        for process, (clients, num_slots) in zip(for_clients, dealt_out(load, len(for_clients)), strict=True):
            shares.append((process, msgspec.structs.replace(load, clients=clients, streams=(), num_slots=num_slots)))
        return [(process, share) for process, share in shares if share.clients or share.streams]


class Heard:
    """What the client processes have said of one load."""

    def __init__(self) -> None:
        self.ready: set[int] = set()
        self.connected: set[int] = set()
        self.played: dict[int, frames.Played] = {}
        self.start_s = 0.0
        self._moving: dict[int, frames.Moving] = {}

    def take(self, number: int, message: frames.FromClient | None) -> None:
        """Raises: Unplayable."""
        match message:
            case None:
                raise Unplayable(f"client process {number} died")
            case frames.Unfit():
                raise Unplayable(message.error)
            case frames.Ready():
                self.ready.add(number)
            case frames.Connected():
                self.connected.add(number)
            case frames.Moving():
                self._moving[number] = message
            case frames.Played():
                self.played[number] = message
            case _:
                assert_never(message)

    def progress(self) -> Progress:
        moving = self._moving.values()
        return Progress(
            sum(each.num_done for each in moving),
            sum(each.num_failed for each in moving),
            sum(each.num_tokens for each in moving),
            sum(each.num_open for each in moving),
            time.monotonic() - self.start_s,
        )

    def replies(self, with_clients: set[int]) -> Replies:
        def of(numbers: Iterable[int]) -> list[Reply]:
            return [reply for number in sorted(numbers) for replies in self.played[number].replies for reply in replies]

        busiest = max((played.cpu for played in self.played.values()), default=0.0)
        return Replies(of(with_clients), of(self.played.keys() - with_clients), busiest)


def dealt_out(load: Load, num_processes: int) -> list[tuple[tuple[Client, ...], int | None]]:
    """Clients and slots of each process: as many clients for every slot, so that none is done long before others."""
    if load.num_slots is None:
        return [(load.clients[index::num_processes], None) for index in range(num_processes)]
    num_slots = min(load.num_slots, len(load.clients))
    numbers = [range(index, num_slots, num_processes) for index in range(num_processes)]
    return [
        (tuple(client for at, client in enumerate(load.clients) if at % num_slots in slots), len(slots) or None)
        for slots in numbers
    ]
