"""What is sent, as clients that run side by side, and what came back of it."""

from __future__ import annotations

import msgspec

from vlmrt.tools.bench.answers import CountedBy
from vlmrt.tools.bench.asks import Ask

Client = tuple[Ask, ...]  # sends one request after the other


class Load(msgspec.Struct, frozen=True):
    """Clients that run side by side. Streams are ended, which is no error, when all other clients are done."""

    clients: tuple[Client, ...]
    streams: tuple[Ask, ...] = ()
    limit_s: float = 120.0  # what takes longer is given up, and counted
    num_slots: int | None = None  # so many clients at once, the others when their turn comes; None: all


class Reply(msgspec.Struct, frozen=True):
    """What came back: the arrival time and the number of tokens so far, for every arrival that brought tokens."""

    sent_s: float  # as all times: of time.monotonic, which is one clock for all processes of a machine
    times_s: tuple[float, ...] = ()
    num_tokens: tuple[int, ...] = ()
    error: str | None = None
    error_kind: str = ""  # a few words that errors of one cause share
    turn: int = 1  # of the ask
    due_s: float | None = None  # when it was to be sent, if that was said
    end_s: float = 0.0  # when it was over, answered or not
    answer_tokens: int | None = None  # of the whole answer, by the server; None: as num_tokens says
    prompt_tokens: int | None = None  # by the server
    asked_tokens: int | None = None
    counted_by: CountedBy = "usage"
    num_images: int = 0
    num_videos: int = 0

    @property
    def output_tokens(self) -> int:
        return self.answer_tokens if self.answer_tokens is not None else self.num_tokens[-1] if self.num_tokens else 0


class Replies(msgspec.Struct, frozen=True):
    """Those of the clients, and those of the streams."""

    clients: list[Reply]
    streams: list[Reply]
    client_cpu: float = 0.0  # the busiest client process's share of a core

    @property
    def errors(self) -> list[str]:
        return [reply.error for reply in (*self.clients, *self.streams) if reply.error is not None]
