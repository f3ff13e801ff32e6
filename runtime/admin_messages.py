"""What `vlmrt admin` and the supervisor say to each other.

A request and its reply are two frames each, a header and a body, as between actors; the header's number says which
request a reply belongs to.  Every request is answered once, Refused with the reason in one line where it cannot be
met, or not at all: a client waits by its own clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec
from msgspec import Struct

from vlmrt.runtime.codec import BadFrame
from vlmrt.runtime.questions import CacheKind, CachesShown, LogLevel, Profiling
from vlmrt.runtime.service_stats import ServiceStats
from vlmrt.runtime.timeline import Timeline

ADMIN_PROTOCOL = 1
MAX_REQUEST_BYTES = 16 << 10
MAX_ID_LENGTH = 256
MAX_ACTOR_LENGTH = 64

Id = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_ID_LENGTH)]
ActorChoice = Annotated[str, msgspec.Meta(max_length=MAX_ACTOR_LENGTH)]
Body = TypeVar("Body")


class AdminHeader(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    protocol: int
    ask_id: Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class Request(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of the requests."""


class Reply(Struct, frozen=True, tag=True):
    """Base of the replies."""


# ---------------------------------------------------------------- requests


class GetStats(Request, frozen=True):
    """Answered by StatsReply, from what the supervisor knows: no actor is asked."""


class GetRequests(Request, frozen=True):
    """Answered by RequestsReply, at most once a heartbeat from the actors."""


class CancelOne(Request, frozen=True):
    """End the answers with this x-request-id, answer id or request id.  Answered by CancelReply."""

    id: Id


class GetCaches(Request, frozen=True):
    """Answered by CachesReply."""


class ResetCaches(Request, frozen=True):
    """Forget what these caches hold and no request uses.  Answered by CachesReply: what is left."""

    kinds: tuple[CacheKind, ...]


class BeginDrain(Request, frozen=True):
    """Refuse new requests and let the open ones end.  Answered by DrainReply."""

    stop: bool = False  # end the service when none is open any more


class EndDrain(Request, frozen=True):
    """Take new requests again.  Answered by DrainReply."""


class GetDrain(Request, frozen=True):
    """Whether new requests are refused, and how many are open still.  Answered by DrainReply."""


class GetTrace(Request, frozen=True):
    """Where the time of a request went, by x-request-id or answer id.  Answered by TraceReply."""

    id: Id


class GetConfig(Request, frozen=True):
    """Answered by ConfigReply."""


class SetLevel(Request, frozen=True):
    """Log from this level on.  Answered by LevelReply."""

    level: LogLevel
    actor: ActorChoice = ""  # or "supervisor"; "": all of them and the supervisor


class BeginProfile(Request, frozen=True):
    """Record what an actor computes, for so many seconds at most.  Answered by ProfileReply."""

    actor: ActorChoice
    seconds: float


class EndProfile(Request, frozen=True):
    """End the recording and write it.  Answered by ProfileReply."""

    actor: ActorChoice


AdminRequest = (
    GetStats
    | GetRequests
    | CancelOne
    | GetCaches
    | ResetCaches
    | BeginDrain
    | EndDrain
    | GetDrain
    | GetTrace
    | GetConfig
    | SetLevel
    | BeginProfile
    | EndProfile
)


# ---------------------------------------------------------------- replies


class StatsReply(Reply, frozen=True):
    stats: ServiceStats
    model: str  # its first served name
    url: str
    pid: int  # of the supervisor
    version: str


RequestState = Literal["preparing", "waiting", "media", "prefill", "decode", "ending"]


class OpenRequestRow(Struct, frozen=True):
    """One open HTTP request; counts are of all its choices."""

    edge: str
    label: str  # x-request-id
    answer_id: str  # "" until it is understood
    path: str
    age_s: float
    streams: bool
    state: RequestState
    num_choices: int = 0  # that have begun
    num_prompt_tokens: int = 0
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    max_tokens: int = 0
    num_images: int = 0
    num_rows: int = 0  # of the vision tower
    num_wanted: int = 0  # images whose rows it waits for


class RequestsReply(Reply, frozen=True):
    """The oldest first; rows may be fewer than num_open."""

    rows: tuple[OpenRequestRow, ...]
    num_open: int


class CancelReply(Reply, frozen=True):
    num_answers: int


class CachesReply(Reply, frozen=True):
    caches: CachesShown


class DrainReply(Reply, frozen=True):
    draining: bool
    stops: bool  # when none is open any more
    num_open: int | None  # None: an edge did not say


class TraceReply(Reply, frozen=True):
    timeline: Timeline
    edge: str
    now_s: float  # of the monotonic clock


class ConfigReply(Reply, frozen=True):
    """Values by dotted name, secrets left out; origins by the option's name, "max-num-seqs"."""

    values: dict[str, Any]
    origins: dict[str, str]


class LevelReply(Reply, frozen=True):
    actors: tuple[str, ...]  # that log from that level on


class ProfileReply(Reply, frozen=True):
    actor: str
    profile: Profiling


class Refused(Reply, frozen=True):
    message: str


AdminReply = (
    StatsReply
    | RequestsReply
    | CancelReply
    | CachesReply
    | DrainReply
    | TraceReply
    | ConfigReply
    | LevelReply
    | ProfileReply
    | Refused
)


# ---------------------------------------------------------------- frames


def _refuse_ext(code: int, _payload: memoryview) -> Any:
    raise BadFrame(f"ext type {code} is not part of the protocol")


_encoder = msgspec.msgpack.Encoder()
_header_decoder = msgspec.msgpack.Decoder(AdminHeader, ext_hook=_refuse_ext)


def encode_admin_header(ask_id: int) -> bytes:
    return _encoder.encode(AdminHeader(ADMIN_PROTOCOL, ask_id))


def encode_admin_body(body: Request | Reply) -> bytes:
    return _encoder.encode(body)


class AdminDecoder(Generic[Body]):
    """Decodes AdminRequest or AdminReply and nothing else."""

    def __init__(self, union: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[Body] = msgspec.msgpack.Decoder(union, ext_hook=_refuse_ext)

    def decode(self, frames: Sequence[bytes]) -> tuple[int, Body]:
        """The number and the body of [header, body].  Raises BadFrame for anything else."""
        if len(frames) != 2:
            raise BadFrame(f"{len(frames)} frames instead of 2")
        try:
            header = _header_decoder.decode(frames[0])
            if header.protocol != ADMIN_PROTOCOL:
                raise BadFrame(f"admin protocol {header.protocol}, this is {ADMIN_PROTOCOL}")
            return header.ask_id, self._decoder.decode(frames[1])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadFrame(f"undecodable frame: {error}") from error
