"""Fakes that the tests of actors share: a context without processes, and a Config that needs no checkpoint."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from vlmrt.runtime.config import Config, MemoryOptions, ModelOptions
from vlmrt.runtime.control_messages import Capabilities, PeerDown, PeerUp
from vlmrt.runtime.errors import ChannelFull, StartupError
from vlmrt.runtime.messages import ActorName, Epoch, Message
from vlmrt.runtime.metrics import Metrics


def make_config(directory: str | Path = "", **options: Any) -> Config:
    """A Config for tests: small memory, a model in `directory`; `options` replace whole sections or `model`."""
    options.setdefault("model", ModelOptions(directory=str(directory), served_names=("test-model",)))
    options.setdefault("memory", MemoryOptions(embedding_cache_gib=1 / 64, pixel_arena_mib=16))
    return Config(**options)


class Sent(NamedTuple):
    peer: ActorName
    message: Message


class FakeOutbox:
    """Records what is sent.  Every peer is up unless named in `down`; channels to peers in `full` are full."""

    def __init__(self) -> None:
        self.sent: list[Sent] = []
        self.down: set[ActorName] = set()
        self.full: set[ActorName] = set()
        self._news = asyncio.Event()

    def send(self, peer: ActorName, message: Message) -> bool:
        if peer in self.full:
            raise ChannelFull(f"channel to {peer} is full")
        if peer in self.down:
            return False
        self.sent.append(Sent(peer, message))
        self._news.set()
        return True

    def take(self) -> list[Sent]:
        """Everything sent since the last take."""
        taken, self.sent = self.sent, []
        return taken

    async def next(self, timeout_s: float = 10.0) -> Sent:
        """The next message sent, waiting for it."""
        async with asyncio.timeout(timeout_s):
            while not self.sent:
                self._news.clear()
                await self._news.wait()
        return self.sent.pop(0)


class FakeMemory:
    """Host memory that several FakeContexts share, as the supervisor would hold it."""

    def __init__(self) -> None:
        self._descriptors: dict[str, int] = {}

    def create(self, name: str, num_bytes: int) -> int:
        if name in self._descriptors:
            raise StartupError(f"no memory {name} of {num_bytes} bytes: it exists already")
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
        os.ftruncate(descriptor, num_bytes)
        self._descriptors[name] = descriptor
        return os.dup(descriptor)

    def open(self, name: str) -> int:
        return os.dup(self._descriptors[name])

    def drop(self, name: str) -> None:
        os.close(self._descriptors.pop(name))

    def close(self) -> None:
        for name in list(self._descriptors):
            self.drop(name)


class FakeContext:
    """An ActorContext without a process: `async with FakeContext("vit:0", tmp_path) as context: ...`.

    Leaving the block cancels the actor's tasks; an exception of one of them is raised there.
    """

    def __init__(
        self,
        name: str,
        run_dir: Path,
        config: Config | None = None,
        *,
        epoch: int = 1,
        device: str = "cpu",
        memory: FakeMemory | None = None,
        listen_socket: socket.socket | None = None,
    ) -> None:
        self.name = ActorName(name)
        self.epoch = Epoch(epoch)
        self.index = int(name.rpartition(":")[2])
        self.device = device
        self.config = config or make_config()
        self.run_dir = run_dir
        self.outbox = FakeOutbox()
        self.metrics = Metrics(name.partition(":")[0])
        self.listen_socket = listen_socket
        self.memory = memory or FakeMemory()
        self._owns_memory = memory is None
        self.num_kv_blocks: int | None = None  # what memory_turn returns
        self.stages: list[tuple[str, int, int]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def progress(self, stage: str, done: int, total: int) -> None:
        self.stages.append((stage, done, total))

    def create_task(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks.add(task)
        return task

    def create_memory(self, name: str, num_bytes: int) -> int:
        return self.memory.create(name, num_bytes)

    def open_memory(self, name: str) -> int:
        return self.memory.open(name)

    def memory_turn(self) -> int | None:
        return self.num_kv_blocks

    async def __aenter__(self) -> FakeContext:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._owns_memory:
            self.memory.close()
        if error is None:
            for result in results:
                if isinstance(result, Exception):
                    raise result


def peer_up(name: str, capabilities: Capabilities, *, epoch: int = 1) -> PeerUp:
    return PeerUp(ActorName(name), Epoch(epoch), "ipc:///nowhere", capabilities)


def peer_down(name: str, *, epoch: int = 1) -> PeerDown:
    return PeerDown(ActorName(name), Epoch(epoch))
