"""Messages <-> bytes: msgpack of tagged Structs, decoded strictly into the one union that a receiver handles.

On the wire a message is two frames: a header (protocol version, sender, the sender's epoch) and a body.  Nothing that
comes in can name a type, a function or a path to import: an unknown tag, a wrong field, an ext type or a pickle is a
`BadFrame`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Generic, TypeVar

import msgspec

from vlmrt.runtime.errors import VlmrtError
from vlmrt.runtime.messages import PROTOCOL_VERSION, ActorName, Epoch, Message

Inbound = TypeVar("Inbound")


class BadFrame(VlmrtError):
    """Bytes that are not a message of this channel."""


class Header(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    protocol: int
    sender: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    epoch: Annotated[int, msgspec.Meta(ge=1)]


def _refuse_ext(code: int, _payload: memoryview) -> Any:
    raise BadFrame(f"ext type {code} is not part of the protocol")


_encoder = msgspec.msgpack.Encoder()
_header_decoder = msgspec.msgpack.Decoder(Header, ext_hook=_refuse_ext)


def encode_header(sender: ActorName, epoch: Epoch) -> bytes:
    return _encoder.encode(Header(PROTOCOL_VERSION, sender, epoch))


def encode_message(message: Message) -> bytes:
    return _encoder.encode(message)


class FrameDecoder(Generic[Inbound]):
    """Decodes what one inbox handles and nothing else."""

    def __init__(self, union: Any) -> None:
        """`union` is one of the inboxes of messages.py, e.g. `EdgeInbox`."""
        self._decoder: msgspec.msgpack.Decoder[Inbound] = msgspec.msgpack.Decoder(union, ext_hook=_refuse_ext)

    def decode(self, frames: Sequence[bytes]) -> tuple[ActorName, Epoch, Inbound]:
        """Sender, its epoch, and the message of [header, body].  Raises BadFrame for anything else."""
        if len(frames) != 2:
            raise BadFrame(f"{len(frames)} frames instead of 2")
        try:
            header = _header_decoder.decode(frames[0])
            if header.protocol != PROTOCOL_VERSION:
                raise BadFrame(f"protocol version {header.protocol} from {header.sender}, this is {PROTOCOL_VERSION}")
            message = self._decoder.decode(frames[1])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadFrame(f"undecodable frame: {error}") from error
        return ActorName(header.sender), Epoch(header.epoch), message
