"""The timelines of this edge's requests: of the open ones, and of the newest that have ended."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from aiohttp import web

from vlmrt.runtime.messages import ActorName, Usage
from vlmrt.runtime.metrics import Metrics
from vlmrt.runtime.timeline import Span, SpanName, Timeline

MAX_ENDED = 512
MAX_SPANS = 512  # of one request
ABORTED = "aborted"  # the outcome of a request whose client has gone

HISTOGRAMS: dict[SpanName, str] = {  # that a span is counted in, where no actor counts it already
    "fetch": "media_fetch_seconds",
    "identify": "media_hash_seconds",
    "grammar": "grammar_seconds",
    "prompt": "prompt_seconds",
    "queue": "request_queue_time_seconds",
    "media_wait": "media_wait_seconds",
    "decode_wait": "decode_wait_seconds",
    "encode_wait": "encode_wait_seconds",
    "restore": "restore_seconds",
    "hand_off": "hand_off_seconds",
    "prefill": "request_prefill_time_seconds",
    "decode": "request_decode_time_seconds",
}


class OpenTimeline:
    """One request on its way.  Its spans are counted in their histograms as they become known."""

    def __init__(self, actor: ActorName, metrics: Metrics, label: str, path: str, traceparent: str = "") -> None:
        self._actor = actor
        self._metrics = metrics
        self._label = label
        self._path = path
        self._traceparent = traceparent
        self._spans: list[Span] = []
        self._num_lost_spans = 0
        self._arrived_at_s = time.time()
        self.arrived_s = time.monotonic()
        self.answer_id = ""
        self.outcome = ""
        self.first_token_s: float | None = None
        self.max_gap_s = 0.0  # between two tokens of a choice
        self.num_media = 0
        self.usage = Usage(0, 0, 0)  # of all its choices
        self.count: Callable[[], None] | None = None  # brings usage and max_gap_s up to date, while they grow

    @property
    def label(self) -> str:
        return self._label

    @contextmanager
    def span(self, name: SpanName, what: str = "") -> Iterator[None]:
        """What the edge does itself.  A block that raises is told of as well."""
        begin_s = time.monotonic()
        try:
            yield
        finally:
            self.add_since(begin_s, name, what)

    def add_since(self, begin_s: float, name: SpanName, what: str = "") -> None:
        """What the edge has done from begin_s until now."""
        self.add(Span(name, self._actor, begin_s, time.monotonic(), what))

    def add(self, span: Span) -> None:
        histogram = HISTOGRAMS.get(span.name)
        if histogram is not None:
            self._metrics.observe(histogram, span.duration_s)
        if len(self._spans) < MAX_SPANS:
            self._spans.append(span)
        else:
            self._num_lost_spans += 1

    def extend(self, spans: Iterable[Span], choice: int = 0) -> None:
        """What the scheduler tells of the request that makes this choice."""
        for span in spans:
            what = span.what if not choice else f"choice {choice} {span.what}".rstrip()
            self.add(Span(span.name, span.actor, span.begin_s, span.end_s, what))

    def snapshot(self, end_s: float | None = None) -> Timeline:
        if self.count is not None:
            self.count()
        return Timeline(
            label=self._label,
            path=self._path,
            arrived_s=self.arrived_s,
            arrived_at_s=self._arrived_at_s,
            answer_id=self.answer_id,
            end_s=end_s,
            outcome=self.outcome if end_s is not None else "",
            first_token_s=self.first_token_s,
            num_prompt_tokens=self.usage.num_prompt_tokens,
            num_cached_tokens=self.usage.num_cached_tokens,
            num_output_tokens=self.usage.num_output_tokens,
            num_media=self.num_media,
            max_gap_s=self.max_gap_s,
            traceparent=self._traceparent,
            spans=tuple(sorted(self._spans, key=lambda span: (span.begin_s, span.end_s))),
            num_lost_spans=self._num_lost_spans,
        )


class Timelines:
    """`find` by x-request-id or answer id; `open` are those under way, oldest first.

    Args: on_ended is given every timeline that ends, and must not wait.
    """

    def __init__(self, actor: ActorName, metrics: Metrics, on_ended: Callable[[Timeline], None] | None = None) -> None:
        self._actor = actor
        self._metrics = metrics
        self._on_ended = on_ended
        self._open: dict[OpenTimeline, None] = {}  # in order of arrival
        self._ended: deque[Timeline] = deque(maxlen=MAX_ENDED)

    def find(self, id: str) -> Timeline | None:
        """The newest request of that x-request-id or answer id, if it is open or among those that are kept."""
        if not id:
            return None
        for open_one in reversed(self._open):
            if id in (open_one.label, open_one.answer_id):
                return open_one.snapshot()
        return next((ended for ended in reversed(self._ended) if id in (ended.label, ended.answer_id)), None)

    @property
    def num_preparing(self) -> int:
        """Open requests of which nothing has been submitted yet."""
        return sum(not timeline.answer_id for timeline in self._open)

    def open(self) -> tuple[Timeline, ...]:
        return tuple(timeline.snapshot() for timeline in self._open)

    @contextmanager
    def timeline(self, label: str, path: str, traceparent: str = "") -> Iterator[OpenTimeline]:
        """Open inside the block; who knows how the request ended sets its outcome there."""
        timeline = OpenTimeline(self._actor, self._metrics, label, path, traceparent)
        self._open[timeline] = None
        try:
            yield timeline
        finally:
            del self._open[timeline]
            self._end(timeline)

    def _end(self, timeline: OpenTimeline) -> None:
        ended = timeline.snapshot(end_s=time.monotonic())
        self._ended.append(ended)
        if ended.max_gap_s:
            self._metrics.observe("max_inter_token_gap_seconds", ended.max_gap_s)
        if self._on_ended is not None:
            self._on_ended(ended)


TIMELINE = web.RequestKey("timeline", OpenTimeline)


def span_of(timeline: OpenTimeline | None, name: SpanName, what: str = "") -> AbstractContextManager[None]:
    """Of routes that generate nothing there is no timeline."""
    return nullcontext() if timeline is None else timeline.span(name, what)
