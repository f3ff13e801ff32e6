"""What the processes of a load tell each other, over their pipes: typed messages with their length before them."""

from __future__ import annotations

from typing import IO

import msgspec

from vlmrt.tools.bench.asks import Target
from vlmrt.tools.bench.replies import Load, Reply

LENGTH_BYTES = 8


class Prepare(msgspec.Struct, frozen=True, tag=True):
    """Parent -> client process: draw what this load shows. Answered by Ready, or Unfit."""

    target: Target
    load: Load


class Connect(msgspec.Struct, frozen=True, tag=True):
    """Parent -> client process: open the connections. Answered by Connected."""


class Start(msgspec.Struct, frozen=True, tag=True):
    """Parent -> client process: play the load. Answered by Moving while it plays, and Played."""

    start_s: float


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Parent -> client process: end the streams. Comes after every load, also of one without streams."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Client process -> parent: everything is drawn."""


class Connected(msgspec.Struct, frozen=True, tag=True):
    """Client process -> parent: connections are open, as far as they can be."""


class Moving(msgspec.Struct, frozen=True, tag=True):
    """Client process -> parent, a few times a second."""

    num_done: int
    num_failed: int
    num_tokens: int
    num_open: int


class Played(msgspec.Struct, frozen=True, tag=True):
    """Client process -> parent: the replies of each client."""

    replies: list[list[Reply]]
    cpu: float  # share of a core that this process took from the start to its last reply


class Unfit(msgspec.Struct, frozen=True, tag=True):
    """Client process -> parent: the load cannot be played."""

    error: str


ToClient = Prepare | Connect | Start | Stop
FromClient = Ready | Connected | Moving | Played | Unfit

_to_client = msgspec.msgpack.Decoder(ToClient)
_from_client = msgspec.msgpack.Decoder(FromClient)


def write(pipe: IO[bytes], message: ToClient | FromClient) -> None:
    """Raises: OSError if the other side is gone."""
    data = msgspec.msgpack.encode(message)
    pipe.write(len(data).to_bytes(LENGTH_BYTES, "little") + data)
    pipe.flush()


def read_to_client(pipe: IO[bytes]) -> ToClient | None:
    """None: the other side is gone."""
    data = _read(pipe)
    return None if data is None else _to_client.decode(data)


def read_from_client(pipe: IO[bytes]) -> FromClient | None:
    """None: the other side is gone."""
    data = _read(pipe)
    return None if data is None else _from_client.decode(data)


def _read(pipe: IO[bytes]) -> bytes | None:
    head = pipe.read(LENGTH_BYTES)
    if len(head) < LENGTH_BYTES:
        return None
    num_bytes = int.from_bytes(head, "little")
    data = pipe.read(num_bytes)
    return data if len(data) == num_bytes else None
