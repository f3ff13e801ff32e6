"""The Actor protocol: what every kind of process implements, what the runtime gives it, and the loop that runs one."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol, TypeVar

import zmq

from vlmrt.runtime import memory_client
from vlmrt.runtime.answerer import Answerer
from vlmrt.runtime.codec import FrameDecoder, encode_header, encode_message
from vlmrt.runtime.config import Config
from vlmrt.runtime.control import ControlLink, SupervisorLost
from vlmrt.runtime.control_messages import (
    AdminAsk,
    Capabilities,
    Heartbeat,
    Hello,
    MemoryTurn,
    PeerDown,
    PeerUp,
    Progress,
    Ready,
    ServiceStatus,
    Shutdown,
    StartFailed,
)
from vlmrt.runtime.errors import StartupError, VlmrtError
from vlmrt.runtime.host_memory import resident_memory_bytes
from vlmrt.runtime.mailbox import Mailbox
from vlmrt.runtime.messages import PROTOCOL_VERSION, ActorName, Epoch, Message
from vlmrt.runtime.metrics import Metrics
from vlmrt.runtime.questions import Finding, Question
from vlmrt.runtime.spawner import START_FAILED, ProcessSpec
from vlmrt.runtime.topology import INBOXES
from vlmrt.runtime.transport import Sender, Socket, new_context

Inbound = TypeVar("Inbound", contravariant=True)


class Outbox(Protocol):
    """Typed, bounded sending to peers."""

    def send(self, peer: ActorName, message: Message) -> bool:
        """Queue a message for a peer's current incarnation without waiting.

        Returns False (and counts it) if the peer is not up.  Raises ChannelFull if its channel is at its bound.
        """
        ...


class ActorContext(Protocol):
    """What the runtime gives an actor."""

    name: ActorName
    epoch: Epoch
    index: int
    device: str  # "cpu" or "cuda:<ordinal>"
    config: Config
    run_dir: Path
    metrics: Metrics
    listen_socket: socket.socket | None  # only an edge has one: bound and listening, inherited from the supervisor

    @property
    def outbox(self) -> Outbox: ...

    def progress(self, stage: str, done: int, total: int) -> None:
        """Report a stage of the start; safe from any thread."""
        ...

    def create_task(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run beside the mailbox in the actor's TaskGroup: an exception in it ends the whole actor."""
        ...

    def create_memory(self, name: str, num_bytes: int) -> int:
        """A descriptor of new host memory, a memfd that the supervisor holds until this incarnation is gone.

        Names: "arena/<actor>/<epoch>" for pixels, "slab/<actor>/<epoch>" for embeddings.  The caller closes the
        descriptor.  Raises StartupError where the supervisor refuses or is gone.
        """
        ...

    def open_memory(self, name: str) -> int:
        """A descriptor of host memory that a peer created (the caller closes it).  Raises KeyError if there is none."""
        ...

    def memory_turn(self) -> int | None:
        """Block, in a rank's loading thread, until every ViT on its GPU holds its memory.

        Returns the KV blocks to take again at a restart; None: as many as fit.  Raises StartupError after
        start_timeout_s.
        """
        ...


class Actor(Protocol[Inbound]):
    """One kind of process.  One message at a time; an exception that leaves a method ends the process."""

    async def start(self) -> Capabilities:
        """Load everything; return what peers need to know.  StartupError: give up at once with its message."""
        ...

    async def peer_up(self, peer: PeerUp) -> None: ...

    async def peer_down(self, peer: PeerDown) -> None: ...

    async def status(self, status: ServiceStatus) -> None:
        """Only edges are told."""
        ...

    async def handle(self, message: Inbound, sender: ActorName) -> None: ...

    async def answer(self, question: Question) -> Finding | None:
        """What whoever operates the service wants to know or done; None: the runtime's to answer.

        Called beside everything else, in a task of its own; an exception is reported and ends nothing.
        """
        ...

    async def stop(self, grace_s: float) -> None:
        """End within grace_s.  An edge is handed messages meanwhile, so that open requests end; nobody else is."""
        ...


ActorFactory = Callable[[ActorContext], Actor[Any]]


# ---------------------------------------------------------------- the loop that runs one

_MESSAGES_PER_TURN = 32  # then heartbeats and the actor's own tasks get theirs
_EXIT_MARGIN_S = 3.0
SUPERVISOR_LOST = 75  # exit code of an actor whose supervisor is gone (EX_TEMPFAIL)
_MAX_SHARED_BYTES = 1 << 20  # a StepPlan for many ranks, not an image for one worker

logger = logging.getLogger(__name__)


class ActorStopped(VlmrtError):
    """The actor ended as the supervisor asked: unwinds its TaskGroup."""


class PeerOutbox:
    """Senders to the living incarnations of peers.  Only for the event loop's thread."""

    def __init__(self, context: zmq.Context[Socket], name: ActorName, epoch: Epoch, metrics: Metrics) -> None:
        self._context = context
        self._header = encode_header(name, epoch)
        self._metrics = metrics
        self._thread = threading.get_ident()
        self._senders: dict[ActorName, tuple[Epoch, Sender]] = {}
        self._last: tuple[Message, bytes] | None = None  # one message to many ranks is encoded once

    def connect(self, peer: ActorName, epoch: Epoch, address: str) -> None:
        self.disconnect(peer, epoch)
        self._senders[peer] = (epoch, Sender(self._context, address, self._header))

    def disconnect(self, peer: ActorName, epoch: Epoch) -> None:
        """Close the channel to this incarnation or an earlier one."""
        entry = self._senders.get(peer)
        if entry is not None and entry[0] <= epoch:
            del self._senders[peer]
            entry[1].close()

    def send(self, peer: ActorName, message: Message) -> bool:
        """See Outbox.send."""
        assert threading.get_ident() == self._thread, "ZeroMQ sockets belong to the event loop's thread"
        entry = self._senders.get(peer)
        if entry is None:
            self._metrics.add("unsent_messages_total")
            return False
        if self._last is not None and self._last[0] is message:
            body = self._last[1]
        else:
            body = encode_message(message)
            self._last = (message, body) if len(body) <= _MAX_SHARED_BYTES else None
        entry[1].send(body)
        return True

    def close(self) -> None:
        for _, sender in self._senders.values():
            sender.close()
        self._senders.clear()


class ProcessContext:
    """The ActorContext of a real process."""

    def __init__(
        self, spec: ProcessSpec, outbox: Outbox, metrics: Metrics, listen_socket: socket.socket | None
    ) -> None:
        self.name = spec.actor.name
        self.epoch = spec.epoch
        self.index = spec.actor.index
        self.device = spec.actor.device
        self.config = spec.config
        self.run_dir = Path(spec.run_dir)
        self.outbox: Outbox = outbox
        self.metrics = metrics
        self.listen_socket = listen_socket
        self._memory_path = spec.memory_path
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._report: Callable[[Message], None] | None = None
        self._memory_turn: Future[MemoryTurn] = Future()
        self._told: tuple[str, int] | None = None  # the last progress reported
        self._tasks: asyncio.TaskGroup | None = None

    def bind(self, control: ControlLink, tasks: asyncio.TaskGroup) -> None:
        """Connect it to the process's control channel and TaskGroup."""
        self._report, self._tasks = control.send, tasks
        self._memory_turn = control.memory_turn

    def progress(self, stage: str, done: int, total: int) -> None:
        """Told on once per hundredth of a stage."""
        assert self._report is not None
        hundredth = (stage, 100 * done // max(1, total))
        if hundredth == self._told:
            return
        self._told = hundredth
        if threading.get_ident() == self._thread:
            self._report(Progress(stage, done, total))
        else:
            self._loop.call_soon_threadsafe(self._report, Progress(stage, done, total))

    def create_task(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        assert self._tasks is not None
        return self._tasks.create_task(coroutine, name=name)

    def create_memory(self, name: str, num_bytes: int) -> int:
        return memory_client.create_memory(self._memory_path, name, num_bytes)

    def open_memory(self, name: str) -> int:
        return memory_client.open_memory(self._memory_path, name)

    def memory_turn(self) -> int | None:
        limit_s = self.config.supervision.start_timeout_s
        try:
            return self._memory_turn.result(limit_s).num_kv_blocks
        except TimeoutError:
            raise StartupError(f"no ViT on {self.device} was ready after {limit_s:g} s (--start-timeout-s)") from None


class ActorProcess:
    """One incarnation of one actor in this process, from Hello to its end."""

    def __init__(self, spec: ProcessSpec, load_factory: Callable[[str], ActorFactory]) -> None:
        """`load_factory` imports "package.module:Class"; it runs in a thread, since it may import torch."""
        self._spec = spec
        self._load_factory = load_factory
        self._wake = asyncio.Event()
        self._metrics = Metrics(spec.actor.kind)
        self._loop_lag_ms = 0.0
        self._zmq = new_context()
        self._control = ControlLink(self._zmq, spec, self._metrics, self._wake)
        self._outbox = PeerOutbox(self._zmq, spec.actor.name, spec.epoch, self._metrics)
        self._mailbox = Mailbox(FrameDecoder[Any](INBOXES[spec.actor.kind]), self._metrics, self._wake)
        self._answerer = Answerer(self._control.send)

    async def run(self, listen_socket: socket.socket | None) -> int:
        """Exit code: 0 after a Shutdown, START_FAILED if the supervisor was told why, SUPERVISOR_LOST if it is gone.

        Raises whatever else the actor raised, in an ExceptionGroup.
        """
        spec = self._spec
        self._mailbox.bind(self._zmq, spec.inbox_address)
        self._control.send(Hello(spec.actor.name, spec.epoch, os.getpid(), PROTOCOL_VERSION, spec.inbox_address))
        context = ProcessContext(spec, self._outbox, self._metrics, listen_socket)
        try:
            async with asyncio.TaskGroup() as tasks:
                context.bind(self._control, tasks)
                tasks.create_task(self._watch_lifeline(), name="lifeline")
                tasks.create_task(self._beat(), name="heartbeat")
                factory = await asyncio.to_thread(self._load_factory, spec.actor.factory)
                actor = factory(context)
                capabilities = await actor.start()
                _freeze_heap()
                self._control.send(Ready(capabilities))
                await self._serve(actor)
                raise ActorStopped
        except* ActorStopped:
            return_code = 0
        except* SupervisorLost as errors:
            logger.error("ending: %s", _first(errors))
            return_code = SUPERVISOR_LOST
        except* StartupError as errors:
            message = " ".join(str(_first(errors)).split())
            logger.error("start failed: %s", message)
            self._control.send(StartFailed(message))
            return_code = START_FAILED
        finally:
            self._close()
        return return_code

    async def _serve(self, actor: Actor[Any]) -> None:
        """One message at a time, news of peers before messages of peers, until Shutdown and what stop() still needs."""
        stopping: asyncio.Task[None] | None = None
        num_handled = 0
        while stopping is None or not stopping.done():
            self._wake.clear()
            if (news := self._control.take()) is not None:
                if not isinstance(news, Shutdown):
                    await self._apply(actor, news)
                elif stopping is None:
                    stopping = asyncio.create_task(self._stop(actor, news.grace_s), name="stop")
                    stopping.add_done_callback(lambda _: self._wake.set())
                    if self._spec.actor.kind != "edge":  # only an edge has requests to bring to their end
                        await stopping
            elif (envelope := self._mailbox.take()) is not None:
                await actor.handle(envelope.message, envelope.sender)
                num_handled += 1
                if num_handled % _MESSAGES_PER_TURN == 0:
                    await asyncio.sleep(0)
            else:
                await self._wake.wait()
        stopping.result()
        self._control.send(self._heartbeat())

    async def _stop(self, actor: Actor[Any], grace_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s + _EXIT_MARGIN_S):
                await actor.stop(grace_s)

    async def _apply(self, actor: Actor[Any], news: PeerUp | PeerDown | ServiceStatus | AdminAsk) -> None:
        match news:
            case AdminAsk():
                self._answerer.begin(actor.answer, news)
            case PeerUp():
                self._outbox.connect(news.actor, news.epoch, news.address)
                self._mailbox.peer_up(news.actor, news.epoch)
                await actor.peer_up(news)
            case PeerDown():
                self._outbox.disconnect(news.actor, news.epoch)
                self._mailbox.peer_down(news.actor, news.epoch)
                await actor.peer_down(news)
            case ServiceStatus():
                await actor.status(news)

    async def _beat(self) -> None:
        """From the event loop, so that a stuck loop falls silent."""
        period_s = self._spec.config.supervision.heartbeat_s
        counted_cpu_s = 0.0
        while True:
            self._metrics.set("mailbox_depth", self._mailbox.depth)
            self._metrics.set("mailbox_age_seconds", self._mailbox.oldest_age_s())
            self._metrics.set("resident_memory_bytes", resident_memory_bytes())
            cpu_s = time.process_time()
            self._metrics.add("process_cpu_seconds_total", cpu_s - counted_cpu_s)
            counted_cpu_s = cpu_s
            self._control.send(self._heartbeat())
            due_s = time.monotonic() + period_s
            await asyncio.sleep(period_s)
            self._loop_lag_ms = max(0.0, time.monotonic() - due_s) * 1000

    def _heartbeat(self) -> Heartbeat:
        return Heartbeat(self._loop_lag_ms, self._metrics.snapshot())

    async def _watch_lifeline(self) -> None:
        """The pipe ends when the supervisor does, however it does."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(self._spec.lifeline_fd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._spec.lifeline_fd)
        raise SupervisorLost("the supervisor is gone")

    def _close(self) -> None:
        self._answerer.close()
        self._outbox.close()
        self._mailbox.close()
        self._control.close()
        self._zmq.term()


def _freeze_heap() -> None:
    """Leave out of garbage collections what the start has made: looking through the 110,000 objects of an edge, a full
    collection takes 50 to 200 ms, in which no stream goes on."""
    gc.collect()
    gc.freeze()


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
