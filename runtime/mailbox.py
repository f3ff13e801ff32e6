"""One bounded inbox per actor: frames in, messages of living incarnations out, depth and age measured.

Whether a sender is alive is the supervisor's word (PeerUp, PeerDown), never the sender's: messages of an incarnation
that is gone are dropped and counted; those of one not announced yet are held, bounded, until its PeerUp arrives.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import zmq

from vlmrt.runtime.codec import BadFrame, FrameDecoder
from vlmrt.runtime.messages import ActorName, Epoch
from vlmrt.runtime.metrics import Metrics
from vlmrt.runtime.transport import FramePump, Socket, open_socket

Inbound = TypeVar("Inbound")

MAILBOX_BOUND = 1024
HELD_BOUND = 1024


class Envelope(NamedTuple, Generic[Inbound]):
    sender: ActorName
    epoch: Epoch
    message: Inbound
    received_s: float


class Mailbox(Generic[Inbound]):
    """Bounded; full means that the rest stays in ZeroMQ, whose own bounds then reach the sender as ChannelFull."""

    def __init__(
        self, decoder: FrameDecoder[Inbound], metrics: Metrics, wake: asyncio.Event, *, bound: int = MAILBOX_BOUND
    ) -> None:
        self._decoder = decoder
        self._metrics = metrics
        self._wake = wake
        self._bound = bound
        self._queue: deque[Envelope[Inbound]] = deque()
        self._held: deque[Envelope[Inbound]] = deque()
        self._alive: dict[ActorName, Epoch] = {}
        self._gone: dict[ActorName, Epoch] = {}  # every incarnation up to this one is gone
        self._socket: Socket | None = None
        self._pump: FramePump | None = None

    def bind(self, context: zmq.Context[Socket], address: str) -> None:
        """Listen at this address, feeding the mailbox from the running event loop."""
        self._socket = open_socket(context, zmq.PULL)
        self._socket.bind(address)
        self._pump = FramePump(self._socket, self.deliver, self.has_room)

    def has_room(self) -> bool:
        return len(self._queue) < self._bound

    def deliver(self, frames: Sequence[bytes]) -> None:
        """Take in what came off a socket.  Garbage is counted and dropped."""
        try:
            sender, epoch, message = self._decoder.decode(frames)
        except BadFrame:
            self._metrics.add("bad_frames_total")
            return
        self._queue.append(Envelope(sender, epoch, message, time.monotonic()))
        self._wake.set()

    def take(self) -> Envelope[Inbound] | None:
        """The next message of a living incarnation; None if there is none now."""
        while self._queue:
            envelope = self._queue.popleft()
            if self._pump is not None and len(self._queue) <= self._bound // 2:
                self._pump.resume()
            if self._alive.get(envelope.sender) == envelope.epoch:
                return envelope
            if envelope.epoch <= self._gone.get(envelope.sender, 0):
                self._metrics.add("stale_messages_total")
            elif len(self._held) < HELD_BOUND:
                self._held.append(envelope)
            else:
                self._metrics.add("bad_frames_total")  # a stranger: the supervisor announces real peers in no time
        return None

    def peer_up(self, actor: ActorName, epoch: Epoch) -> None:
        """From now on messages of this incarnation are delivered, those held first; of earlier ones, dropped."""
        if epoch <= self._gone.get(actor, 0):
            return
        self._alive[actor] = epoch
        self._gone[actor] = Epoch(epoch - 1)
        ours = [envelope for envelope in self._held if envelope.sender == actor]
        self._held = deque(envelope for envelope in self._held if envelope.sender != actor)
        self._queue.extendleft(reversed(ours))

    def peer_down(self, actor: ActorName, epoch: Epoch) -> None:
        """Messages of this incarnation and earlier ones are dropped, those already here included."""
        self._gone[actor] = max(epoch, self._gone.get(actor, Epoch(0)))
        if self._alive.get(actor, Epoch(0)) <= epoch:
            self._alive.pop(actor, None)

    @property
    def depth(self) -> int:
        return len(self._queue) + len(self._held)

    def oldest_age_s(self) -> float:
        """How long the next message has waited."""
        return time.monotonic() - self._queue[0].received_s if self._queue else 0.0

    def close(self) -> None:
        if self._pump is not None:
            self._pump.close()
        if self._socket is not None:
            self._socket.close(linger=0)
