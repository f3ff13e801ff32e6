"""The Actor protocol: what every kind of process implements, and what the runtime gives it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Protocol, TypeVar

from vlmrt.runtime.config import Config
from vlmrt.runtime.messages import ActorName, Capabilities, Epoch, Message, PeerDown, PeerUp, ServiceStatus
from vlmrt.runtime.metrics import Metrics

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
    config: Config
    run_dir: Path
    outbox: Outbox
    metrics: Metrics
    listen_socket: socket.socket | None  # only an edge has one: bound and listening, inherited from the supervisor

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

    async def stop(self, grace_s: float) -> None: ...


ActorFactory = Callable[[ActorContext], Actor[Any]]
