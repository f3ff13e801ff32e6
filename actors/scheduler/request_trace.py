"""Where one request's time went, told by the times of the events that moved it.

What is known goes to its edge twice: with the first token, when all its pictures have been read, and with its end.  So
an edge that ends a request itself, at a stop string, has had nearly all of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlmrt.runtime.messages import ActorName, MmHash
from vlmrt.runtime.timeline import Span, SpanName

SCHEDULER = ActorName("scheduler:0")
LLM = ActorName("llm:0")
MAX_SPANS = 256
_HASH_CHARS = 8  # of an mm_hash, to tell pictures apart


class RequestTrace:
    """Times of the monotonic clock, as events bring them.  Nothing is done for a token but the first."""

    __slots__ = ("_has_tokens", "_media_ready_s", "_planned_s", "_spans", "_submitted_s", "_unread")

    def __init__(self, submitted_s: float) -> None:
        self._submitted_s = submitted_s
        self._planned_s: float | None = None  # the first step that works for it
        self._media_ready_s: float | None = None
        self._has_tokens = False
        self._spans: dict[tuple[SpanName, str, str], Span] = {}  # since the last take; by name, actor and picture
        self._unread: dict[MmHash, tuple[float, str]] = {}  # rows that no step has read yet, since when

    def on_media(self, mm_hash: MmHash, file: MmHash, spans: Sequence[Span], now_s: float) -> None:
        """A picture, or a group of the clip `file`, has its rows: these spans lead to them, in order.

        Of what began before the request came, for another, the rest is its own.
        """
        what = file[:_HASH_CHARS]
        if spans[0].name == "decode_media":
            self._add("decode_wait", SCHEDULER, self._submitted_s, spans[0].begin_s, what)
        for span in spans:
            self._add(span.name, span.actor, span.begin_s, span.end_s, what)
        self._media_ready_s = now_s
        self._unread[mm_hash] = spans[-1].end_s, what

    @property
    def has_unread(self) -> bool:
        return bool(self._unread)

    def on_read(self, mm_hash: MmHash, now_s: float) -> None:
        """A step is sent that reads these rows, if nobody has heard of an earlier one."""
        known = self._unread.pop(mm_hash, None)
        if known is not None:
            self._add("hand_off", SCHEDULER, known[0], now_s, known[1])

    def on_planned(self, now_s: float) -> None:
        """A step is sent that works for it."""
        if self._planned_s is None:
            self._planned_s = now_s
            self._add("queue", SCHEDULER, self._submitted_s, now_s)

    def on_first_token(self, now_s: float) -> None:
        """Does nothing after the first call."""
        if self._has_tokens:
            return
        self._has_tokens = True
        if self._planned_s is not None:
            self._add("prefill", LLM, self._planned_s, now_s)
        if self._media_ready_s is not None:
            self._add("media_wait", SCHEDULER, self._submitted_s, self._media_ready_s)

    def on_failed(self, now_s: float) -> None:
        """It ends before its first token."""
        if self._planned_s is None:
            self.on_planned(now_s)
        else:
            self._add("prefill", LLM, self._planned_s, now_s)

    def take(self) -> tuple[Span, ...]:
        """What has become known since the last call."""
        spans = tuple(self._spans.values())
        self._spans.clear()
        return spans

    def _add(self, name: SpanName, actor: str, begin_s: float, end_s: float, what: str = "") -> None:
        begin_s = max(begin_s, self._submitted_s)
        if end_s < begin_s:
            return
        key = name, actor, what
        known = self._spans.get(key)
        if known is not None:
            begin_s, end_s = min(known.begin_s, begin_s), max(known.end_s, end_s)
        elif len(self._spans) >= MAX_SPANS:
            return
        self._spans[key] = Span(name, actor, begin_s, end_s, what)
