"""Every message between the supervisor and its actors: their starts and ends, their health, and what operators ask.

The others are in messages.py.  A start is Hello -> Progress* -> (MemoryTurn, to a rank) -> Ready or StartFailed.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from vlmrt.runtime.messages import ActorName, Epoch, Message, SlabExport
from vlmrt.runtime.questions import Finding, Question

# ---------------------------------------------------------------- actor -> supervisor


class Hello(Message, frozen=True):
    """First words of a new process: it lives and listens at this address."""

    actor: ActorName
    epoch: Epoch
    pid: int
    protocol: int
    address: str


class Progress(Message, frozen=True):
    """How far a stage of the start is, e.g. ("loading weights", 3, 12)."""

    stage: str
    done: int
    total: int


class EdgeReady(msgspec.Struct, frozen=True, tag="edge"):
    pass


class MediaReady(msgspec.Struct, frozen=True, tag="media"):
    arena_bytes: int


class SchedulerReady(msgspec.Struct, frozen=True, tag="scheduler"):
    pass


class VitReady(msgspec.Struct, frozen=True, tag="vit"):
    slab: SlabExport
    num_host_pages: int = 0  # of as many rows each as those of the slab; 0: no host tier


class LlmReady(msgspec.Struct, frozen=True, tag="llm"):
    num_blocks: int  # equal on every rank: the smallest rank's
    num_host_blocks: int = 0  # of the host tier, equal on every rank; 0: there is none
    block_bytes: int = 0  # of one block on one rank


Capabilities = EdgeReady | MediaReady | SchedulerReady | VitReady | LlmReady


class Ready(Message, frozen=True):
    capabilities: Capabilities


class StartFailed(Message, frozen=True):
    """The actor cannot start, and trying again cannot help: one line for a person."""

    message: str


class Histogram(msgspec.Struct, frozen=True, array_like=True):
    """Cumulative since the start of this incarnation; the last count, one more than bounds, is above the last bound."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


class MetricsSnapshot(msgspec.Struct, frozen=True, array_like=True):
    """An actor's metrics so far.  A key is a metric name, or name{label="value"}."""

    counters: dict[str, float]
    gauges: dict[str, float]
    histograms: dict[str, Histogram]


class Heartbeat(Message, frozen=True):
    """Sent from the actor's event loop every heartbeat_s; its absence means the loop is stuck."""

    loop_lag_ms: float
    metrics: MetricsSnapshot


class AdminAnswer(Message, frozen=True):
    """To the AdminAsk of that ask_id."""

    ask_id: int
    finding: Finding


# ---------------------------------------------------------------- supervisor -> actor


class PeerUp(Message, frozen=True):
    """That incarnation of a peer is ready; send to it from now on."""

    actor: ActorName
    epoch: Epoch
    address: str
    capabilities: Capabilities


class PeerDown(Message, frozen=True):
    """That incarnation of a peer is gone: drop what it owned; nothing from it will be applied any more."""

    actor: ActorName
    epoch: Epoch


class MemoryTurn(Message, frozen=True):
    """To a starting rank: every ViT on its GPU holds its memory now, so what is free is the rank's."""

    num_kv_blocks: int | None  # what the first start found room for: a restart takes the same again


class Shutdown(Message, frozen=True):
    """End within grace_s: the edge first lets open requests finish for that long."""

    grace_s: float


class AdminAsk(Message, frozen=True):
    """To an actor that is up.  Answered once: AdminAnswer, same ask_id."""

    ask_id: int
    question: Question


class ActorStatus(msgspec.Struct, frozen=True, array_like=True):
    actor: ActorName
    epoch: Epoch
    pid: int
    state: Literal["starting", "ready", "restarting", "failed"]
    num_restarts: int
    heartbeat_age_s: float
    loop_lag_ms: float
    device: str = "cpu"  # or "cuda:<ordinal>"


class ServiceStatus(Message, frozen=True):
    """To every edge, at least every heartbeat_s: who is up, and by actor the metric totals of all incarnations."""

    ready: bool
    actors: tuple[ActorStatus, ...]
    metrics: dict[str, MetricsSnapshot]
    at_s: float = 0.0  # of the monotonic clock, which all processes of a machine share
    uptime_s: float = 0.0  # since the supervisor began
    draining: bool = False  # new requests are refused, by order of whoever operates the service


# ---------------------------------------------------------------- inboxes

SupervisorInbox = Hello | Progress | Ready | StartFailed | Heartbeat | AdminAnswer
ControlInbox = PeerUp | PeerDown | MemoryTurn | Shutdown | ServiceStatus | AdminAsk
