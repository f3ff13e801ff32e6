"""ZeroMQ ipc sockets: one bound PULL inbox per incarnation of an actor, PUSH senders to it, and a ROUTER/DEALER for
control.

Every socket is bounded both ways and never blocks: a full channel raises `ChannelFull` at once.  Addresses hold the
epoch, so a sender can never reach a later incarnation by accident.  Sockets belong to the thread of the event loop
that made them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from vlmrt.runtime.errors import ChannelFull, StartupError
from vlmrt.runtime.messages import ActorName, Epoch

SEND_BOUND = 1024  # messages; the second bound is the receiver's
RECEIVE_BOUND = 1024
MAX_FRAME_BYTES = 264 << 20  # a clip of 256 MiB, and what is said of it; a channel that is sent more breaks
MAX_SOCKET_PATH_BYTES = 79  # sun_path holds 108; containers and test folders prefix paths, so we stay well below
MIN_ZEROMQ = (4, 3, 5)
_FRAMES_PER_WAKE = 64  # then other callbacks of the loop get their turn

Socket = zmq.Socket[bytes]


def new_context() -> zmq.Context[Socket]:
    """A ZeroMQ context of this process.  Raises StartupError if libzmq is too old to be safe."""
    if zmq.zmq_version_info() < MIN_ZEROMQ:
        wanted = ".".join(map(str, MIN_ZEROMQ))
        raise StartupError(f"libzmq {zmq.zmq_version()} is too old: install pyzmq with libzmq {wanted} or newer")
    return zmq.Context()


def socket_path(run_dir: Path, stem: str) -> Path:
    """Path of a unix socket in the run directory.  Raises StartupError if it is too long to be safe."""
    path = run_dir / f"{stem}.sock"
    if len(bytes(path)) > MAX_SOCKET_PATH_BYTES:
        raise StartupError(
            f"socket path {path} is longer than {MAX_SOCKET_PATH_BYTES} bytes: set TMPDIR to a short path"
        )
    return path


def inbox_address(run_dir: Path, actor: ActorName, epoch: Epoch) -> str:
    return f"ipc://{socket_path(run_dir, f'{actor_stem(actor)}.{epoch}')}"


def actor_stem(actor: ActorName) -> str:
    """The actor's name as a file name."""
    return actor.replace(":", "-")


def control_address(run_dir: Path) -> str:
    return f"ipc://{socket_path(run_dir, 'control')}"


def admin_address(run_dir: Path) -> str:
    return f"ipc://{socket_path(run_dir, 'admin')}"


def open_socket(context: zmq.Context[Socket], kind: int, *, linger_ms: int = 0) -> Socket:
    """A bounded socket of this kind."""
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, linger_ms)
    socket.setsockopt(zmq.SNDHWM, SEND_BOUND)
    socket.setsockopt(zmq.RCVHWM, RECEIVE_BOUND)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    socket.setsockopt(zmq.RECONNECT_IVL, 20)
    return socket


class Sender:
    """A PUSH socket to one incarnation's inbox."""

    def __init__(self, context: zmq.Context[Socket], address: str, header: bytes, *, bound: int = SEND_BOUND) -> None:
        self._header = header
        self._socket = open_socket(context, zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, bound)
        self._socket.connect(address)
        self._address = address

    def send(self, body: bytes) -> None:
        """Queue without waiting.  Raises ChannelFull at the bound."""
        try:
            self._socket.send_multipart((self._header, body), zmq.NOBLOCK)
        except zmq.Again:
            raise ChannelFull(f"channel to {self._address} is full") from None

    def close(self) -> None:
        self._socket.close(linger=0)


class FramePump:
    """Hands what a socket receives to `deliver`, as long as `has_room`; then it leaves the rest to ZeroMQ's bounds.

    ZeroMQ's descriptor says only "something changed": after every send on the same socket call `poke`.
    """

    def __init__(
        self, socket: Socket, deliver: Callable[[list[bytes]], Any], has_room: Callable[[], bool] | None = None
    ) -> None:
        self._socket = socket
        self._deliver = deliver
        self._has_room = has_room
        self._loop = asyncio.get_running_loop()
        self._fd = int(socket.getsockopt(zmq.FD))
        self._paused = False
        self._closed = False
        self._loop.add_reader(self._fd, self.drain)
        self.poke()

    def drain(self) -> None:
        if self._closed or self._paused:
            return
        for _ in range(_FRAMES_PER_WAKE):
            if self._has_room is not None and not self._has_room():
                self._paused = True
                self._loop.remove_reader(self._fd)
                return
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._deliver(frames)
            if self._closed:
                return
        self.poke()

    def poke(self) -> None:
        """Look again soon."""
        if not self._closed:
            self._loop.call_soon(self.drain)

    def resume(self) -> None:
        """There is room again."""
        if self._paused and not self._closed:
            self._paused = False
            self._loop.add_reader(self._fd, self.drain)
            self.poke()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if not self._paused:
                self._loop.remove_reader(self._fd)
