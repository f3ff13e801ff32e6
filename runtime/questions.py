"""What whoever operates the service asks of its actors, and what they find: carried by AdminAsk and AdminAnswer.

A question goes over the control channel, so it reaches an actor that is up and reads its channel, or nobody; an actor
answers each of them once, beside its work.  What an actor cannot answer is Unable.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from vlmrt.runtime.timeline import Timeline

LogLevel = Literal["debug", "info", "warning", "error"]
CacheKind = Literal["prefix", "embedding"]  # of keys and values; of images' rows and the names given to images
MAX_ROWS = 1024  # of requests in one finding


# ---------------------------------------------------------------- questions


class SetLogLevel(Struct, frozen=True, tag=True):
    level: LogLevel


class ListRequests(Struct, frozen=True, tag=True):
    """To an edge: its open answers.  To the scheduler: its requests."""


class CancelRequest(Struct, frozen=True, tag=True):
    """To an edge: end this answer with an error.  `id` is the client's x-request-id or the answer's own id."""

    id: str


class FindTimeline(Struct, frozen=True, tag=True):
    """To an edge: where the time of this request went, open or ended.  `id` as that of CancelRequest."""

    id: str


class ShowCaches(Struct, frozen=True, tag=True):
    """To the scheduler."""


class EmptyCaches(Struct, frozen=True, tag=True):
    """To the scheduler: forget what these hold and no request uses."""

    kinds: tuple[CacheKind, ...]


class StartProfile(Struct, frozen=True, tag=True):
    """Profile this actor into a file of the server, which is written at StopProfile or after so many seconds."""

    path: str  # without its suffix, which tells the format
    seconds: float


class StopProfile(Struct, frozen=True, tag=True):
    pass


Question = (
    SetLogLevel | ListRequests | CancelRequest | FindTimeline | ShowCaches | EmptyCaches | StartProfile | StopProfile
)


# ---------------------------------------------------------------- findings


class Done(Struct, frozen=True, tag=True):
    """It is so now."""


class Unable(Struct, frozen=True, tag=True):
    """Why not, in one line for a person."""

    message: str


class AnswerRow(Struct, frozen=True):
    """One open answer of an edge: of an HTTP request that generates."""

    label: str  # the client's x-request-id, or one made for it
    answer_id: str  # "" until the request is understood
    path: str
    age_s: float
    request_ids: tuple[str, ...]  # at the scheduler, one for each choice that has begun
    streams: bool


class AnswersOpen(Struct, frozen=True, tag=True):
    """The oldest first, at most MAX_ROWS of num_open."""

    rows: tuple[AnswerRow, ...]
    num_open: int


class RequestRow(Struct, frozen=True):
    """One request of the scheduler."""

    request_id: str
    status: Literal["waiting", "running"]
    num_prompt_tokens: int
    num_computed_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    max_tokens: int
    num_images: int  # and temporal groups of clips
    num_rows: int  # of the vision tower, that its prompt holds
    num_wanted: int  # images whose rows it still has to read
    priority: int


class RequestsOpen(Struct, frozen=True, tag=True):
    """In the order in which they run, at most MAX_ROWS of num_open."""

    rows: tuple[RequestRow, ...]
    num_open: int


class Cancelled(Struct, frozen=True, tag=True):
    """How many open answers have this id, and end now."""

    num_answers: int


class TimelineFound(Struct, frozen=True, tag=True):
    """None: the edge knows, or remembers, no request of that id."""

    timeline: Timeline | None


class Tier(Struct, frozen=True):
    """Blocks of the KV cache, or pages of a slab, on the device or in host memory."""

    name: str  # "kv", "kv host", "vit:0", "vit:0 host"
    num_units: int
    num_used: int  # by requests
    num_cached: int  # whose content can be found, in use or not
    unit_bytes: int  # of one block on all ranks, or of one page
    num_entries: int  # blocks, or images


class CachesShown(Struct, frozen=True, tag=True):
    prefix: tuple[Tier, ...]
    embedding: tuple[Tier, ...]
    num_aliases: int  # names under which clients may leave out an image's bytes


class Profiling(Struct, frozen=True, tag=True):
    """The profile goes to this file: it is written (seconds == 0), or will be in so many seconds at the latest."""

    path: str
    seconds: float


Finding = Done | Unable | AnswersOpen | RequestsOpen | Cancelled | TimelineFound | CachesShown | Profiling
