"""The control channel: the supervisor's ROUTER and the DEALER of each actor, bounded and never waiting."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeAlias

import zmq

from vlmrt.runtime.codec import BadFrame, FrameDecoder, encode_header, encode_message
from vlmrt.runtime.control_messages import (
    AdminAnswer,
    AdminAsk,
    ControlInbox,
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
    SupervisorInbox,
)
from vlmrt.runtime.errors import VlmrtError
from vlmrt.runtime.messages import ActorName, Epoch, Message
from vlmrt.runtime.metrics import Metrics
from vlmrt.runtime.spawner import ProcessSpec
from vlmrt.runtime.transport import FramePump, Socket, open_socket

ControlNews: TypeAlias = PeerUp | PeerDown | Shutdown | ServiceStatus | AdminAsk
ActorReport: TypeAlias = Hello | Progress | Ready | StartFailed | Heartbeat | AdminAnswer

SUPERVISOR = ActorName("supervisor")
_LINGER_MS = 1000  # the last words, StartFailed or a heartbeat, still leave


class SupervisorLost(VlmrtError):
    """Nobody supervises this process any more, so it ends."""


def routing_id(actor: ActorName, epoch: Epoch) -> bytes:
    """How the supervisor's ROUTER knows one incarnation."""
    return f"{actor}/{epoch}".encode()


class ControlServer:
    """The supervisor's end: reports of actors in, news out."""

    def __init__(
        self,
        context: zmq.Context[Socket],
        address: str,
        on_report: Callable[[ActorName, Epoch, ActorReport], None],
        metrics: Metrics,
    ) -> None:
        self._decoder = FrameDecoder[ActorReport](SupervisorInbox)
        self._on_report = on_report
        self._metrics = metrics
        self._header = encode_header(SUPERVISOR, Epoch(1))
        self._socket = open_socket(context, zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.bind(address)
        self._pump = FramePump(self._socket, self._deliver)

    def send(self, actor: ActorName, epoch: Epoch, message: Message) -> bool:
        """Queue without waiting.  False if that incarnation has gone away or does not read."""
        try:
            self._socket.send_multipart((routing_id(actor, epoch), self._header, encode_message(message)), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return False
        finally:
            self._pump.poke()
        return True

    def _deliver(self, frames: Sequence[bytes]) -> None:
        try:
            sender, epoch, report = self._decoder.decode(frames[1:])
        except BadFrame:
            self._metrics.add("bad_frames_total")
            return
        if frames[0] != routing_id(sender, epoch):
            self._metrics.add("bad_frames_total")
            return
        self._on_report(sender, epoch, report)

    def close(self) -> None:
        self._pump.close()
        self._socket.close()


class ControlLink:
    """The DEALER to the supervisor: this actor's life, heartbeats, and news of its peers."""

    def __init__(self, context: zmq.Context[Socket], spec: ProcessSpec, metrics: Metrics, wake: asyncio.Event) -> None:
        self._header = encode_header(spec.actor.name, spec.epoch)
        self._decoder = FrameDecoder[ControlNews | MemoryTurn](ControlInbox)
        self._metrics = metrics
        self._wake = wake
        self.memory_turn: Future[MemoryTurn] = Future()  # a loading thread waits for it, before anything is taken
        self._received: deque[ControlNews] = deque()
        self._socket = open_socket(context, zmq.DEALER, linger_ms=_LINGER_MS)
        self._socket.setsockopt(zmq.ROUTING_ID, routing_id(spec.actor.name, spec.epoch))
        self._socket.connect(spec.control_address)
        self._pump = FramePump(self._socket, self._deliver)

    def send(self, message: Message) -> None:
        """Raises SupervisorLost if the supervisor has not read for so long that the channel is full."""
        try:
            self._socket.send_multipart((self._header, encode_message(message)), zmq.NOBLOCK)
        except zmq.Again:
            raise SupervisorLost("the control channel is full: the supervisor does not read") from None
        self._pump.poke()

    def take(self) -> ControlNews | None:
        """The next message that has arrived, or None."""
        self._pump.drain()
        return self._received.popleft() if self._received else None

    def _deliver(self, frames: Sequence[bytes]) -> None:
        try:
            _, _, message = self._decoder.decode(frames)
        except BadFrame:
            self._metrics.add("bad_frames_total")
            return
        if not isinstance(message, MemoryTurn):
            self._received.append(message)
            self._wake.set()
        elif not self.memory_turn.done():
            self.memory_turn.set_result(message)

    def close(self) -> None:
        self._pump.close()
        self._socket.close()
