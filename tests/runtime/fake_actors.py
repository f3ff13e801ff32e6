"""Small actors for tests of the runtime: they write what they see as lines of run_dir/../<name>.log."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

from vlmrt.runtime.actor import ActorContext
from vlmrt.runtime.control_messages import (
    Capabilities,
    EdgeReady,
    LlmReady,
    MediaReady,
    PeerDown,
    PeerUp,
    SchedulerReady,
    ServiceStatus,
    VitReady,
)
from vlmrt.runtime.errors import StartupError
from vlmrt.runtime.messages import Abort, ActorName, HostSlabExport, Message, RequestId, TokenBatch, TokenOutput, Usage
from vlmrt.runtime.questions import AnswersOpen, Finding, ListRequests, Question, SetLogLevel


def events_path(context: ActorContext) -> Path:
    """Where this actor writes; tests point chat_template, which no fake needs, at their folder."""
    assert context.config.model.chat_template is not None
    return Path(context.config.model.chat_template) / f"{context.name.replace(':', '-')}.events"


class Recorder:
    """An actor that does nothing but note what it is told."""

    def __init__(self, context: ActorContext) -> None:
        self.context = context
        self._path = events_path(context)
        self.note(f"born {os.getpid()}")
        self.note(f"log level {context.config.log_level}")

    def note(self, text: str) -> None:
        with self._path.open("a") as file:
            file.write(f"{self.context.epoch} {text}\n")

    async def start(self) -> Capabilities:
        self.context.progress("loading", 1, 1)
        match self.context.name.partition(":")[0]:
            case "edge":
                return EdgeReady()
            case "media":
                return MediaReady(arena_bytes=0)
            case "scheduler":
                return SchedulerReady()
            case "vit":
                return VitReady(HostSlabExport("slab/vit:0/1", 1, 1, 1, "float32"))
            case _:
                return LlmReady(num_blocks=8)

    async def peer_up(self, peer: PeerUp) -> None:
        self.note(f"up {peer.actor} {peer.epoch}")

    async def peer_down(self, peer: PeerDown) -> None:
        self.note(f"down {peer.actor} {peer.epoch}")

    async def status(self, status: ServiceStatus) -> None:
        self.note(f"status ready={status.ready} stale={total(status, 'stale_messages_total'):g}")
        if status.draining:
            self.note("draining")

    async def handle(self, message: Message, sender: ActorName) -> None:
        self.note(f"message {type(message).__name__} from {sender}")

    async def answer(self, question: Question) -> Finding | None:
        self.note(f"asked {type(question).__name__}")
        return None

    async def stop(self, grace_s: float) -> None:
        self.note("stop")


def total(status: ServiceStatus, counter: str) -> float:
    return sum(snapshot.counters.get(counter, 0.0) for snapshot in status.metrics.values())


class Pinger(Recorder):
    """An edge that aborts request after request; every answer of the Ponger is noted."""

    async def peer_up(self, peer: PeerUp) -> None:
        await super().peer_up(peer)
        if peer.actor == "scheduler:0":
            self.context.outbox.send(peer.actor, Abort(RequestId(f"ping-{peer.epoch}")))

    async def handle(self, message: Any, sender: ActorName) -> None:
        assert isinstance(message, TokenBatch)
        self.note(f"pong {message.outputs[0].request_id} from {sender}")


class Ponger(Recorder):
    """A scheduler that answers every Abort."""

    async def handle(self, message: Any, sender: ActorName) -> None:
        self.note(f"ping {message.request_id} from {sender}")
        self.context.metrics.add("preemptions_total")
        output = TokenOutput(message.request_id, (), Usage(0, 0, 0), "stop")
        self.context.outbox.send(sender, TokenBatch((output,)))


class Stream(Recorder):
    """An edge that sends Aborts without end."""

    async def start(self) -> Capabilities:
        self.context.create_task(self._stream(), name="stream")
        return await super().start()

    async def _stream(self) -> None:
        while True:
            self.context.outbox.send(ActorName("scheduler:0"), Abort(RequestId(f"from-{self.context.epoch}")))
            await asyncio.sleep(0.002)


class Deaf(Recorder):
    """A scheduler that notes only the epochs that reach it."""

    async def handle(self, message: Any, sender: ActorName) -> None:
        self.note(f"got {message.request_id}")


class Unstartable(Recorder):
    async def start(self) -> Capabilities:
        raise StartupError("the checkpoint\nat --model has no weights")


class NeverReady(Recorder):
    async def start(self) -> Capabilities:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")


class SlowLoader(Recorder):
    """Loads in a thread, so heartbeats go on."""

    async def start(self) -> Capabilities:
        await asyncio.to_thread(time.sleep, 1.0)
        return await super().start()


class Crasher(Recorder):
    """Raises at the first message."""

    async def handle(self, message: Any, sender: ActorName) -> None:
        raise RuntimeError("planted")


class DiesOnceUp(Recorder):
    """Ends as soon as it knows a peer."""

    async def peer_up(self, peer: PeerUp) -> None:
        os._exit(9)


class MemoryUser(Recorder):
    """Notes what the descriptor server says to right and wrong names."""

    async def start(self) -> Capabilities:
        await asyncio.to_thread(self._ask)
        return await super().start()

    def _ask(self) -> None:
        own = f"arena/{self.context.name}/{self.context.epoch}"
        descriptor = self.context.create_memory(own, 8192)
        self.note(f"created {os.fstat(descriptor).st_size}")
        os.close(descriptor)
        os.close(self.context.open_memory(own))
        for name, size in ((own, 8192), ("arena/media:9/1", 64), (f"other/{own}", 64), (f"slab/{own[6:]}", 1 << 50)):
            try:
                self.context.create_memory(name, size)
            except StartupError as error:
                self.note(f"refused {name}: {error}")
        try:
            self.context.open_memory("arena/media:9/1")
        except KeyError as error:
            self.note(f"missing {error}")


class NeverStops(Recorder):
    async def stop(self, grace_s: float) -> None:
        await asyncio.sleep(3600)


class Forker(Recorder):
    """Has a child process that leaves its session and process group, and outlives its parent."""

    async def start(self) -> Capabilities:
        self._child = await asyncio.create_subprocess_exec("sleep", "300", start_new_session=True)
        return await super().start()


class Drainer(Recorder):
    """An edge that has one request open when it is told to stop."""

    def __init__(self, context: ActorContext) -> None:
        super().__init__(context)
        self._answered = asyncio.Event()

    async def handle(self, message: Message, sender: ActorName) -> None:
        await super().handle(message, sender)
        self._answered.set()

    async def stop(self, grace_s: float) -> None:
        await super().stop(grace_s)
        self.context.outbox.send(ActorName("scheduler:0"), Abort(RequestId("last")))
        await self._answered.wait()
        self.note("drained")


class GatedVit(Recorder):
    """Is ready once the file "vit-gate" is in the events' folder; dies instead while "vit-dies" is."""

    async def start(self) -> Capabilities:
        folder = self._path.parent
        while not (folder / "vit-gate").exists():
            if (folder / "vit-dies").exists():
                os._exit(9)
            await asyncio.sleep(0.005)
        return await super().start()


class PatientRank(Recorder):
    """Waits for its turn in a thread, as the loading of a rank does."""

    async def start(self) -> Capabilities:
        self.note("loaded")
        self.note(f"turn {await asyncio.to_thread(self.context.memory_turn)}")
        return await super().start()


class EnvironmentNoter(Recorder):
    """Notes what MPS would read."""

    async def start(self) -> Capabilities:
        pipes = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "none")).name
        self.note(f"pipes {pipes} percent {os.environ.get('CUDA_MPS_ACTIVE_THREAD_PERCENTAGE', 'none')}")
        return await super().start()


class AcceleratorError(RuntimeError):
    """Named like torch's."""


class Faulter(EnvironmentNoter):
    """Raises a CUDA fault once the file "fault" is in the events' folder; takes it away first."""

    async def start(self) -> Capabilities:
        self.context.create_task(self._fault(), name="fault")
        return await super().start()

    async def _fault(self) -> None:
        file = self._path.parent / "fault"
        while not file.exists():  # noqa: ASYNC110 - the test makes it
            await asyncio.sleep(0.005)
        file.unlink()
        raise AcceleratorError("CUDA error: an illegal memory access was encountered")


class EmptyEdge(Recorder):
    """An edge that has no request open."""

    async def answer(self, question: Question) -> Finding | None:
        await super().answer(question)
        return AnswersOpen((), 0) if isinstance(question, ListRequests) else None


class Forgetful(Recorder):
    """Raises at every question but one about its log."""

    async def answer(self, question: Question) -> Finding | None:
        if isinstance(question, SetLogLevel):
            return None
        raise RuntimeError("planted")


class DiesWhenAsked(Recorder):
    """Ends in place of an answer, in its first life."""

    async def answer(self, question: Question) -> Finding | None:
        if self.context.epoch == 1:
            os._exit(9)
        return await super().answer(question)
