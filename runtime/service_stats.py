"""A ServiceStatus and an earlier one -> what a person wants to know of a running service.  Pure.

    history = StatsHistory()
    history.add(status)        # every ServiceStatus, as it comes: at least every heartbeat
    history.stats()            # ServiceStats of the last one, or None before the first

`vlmrt admin stats --json`, `vlmrt admin top` and GET /stats all show one ServiceStats:

    {"ready": true, "draining": false, "uptime_s": 93.2,
     "requests": {"running": 3, "waiting": 0, "succeeded": 120, "failed": 1, "aborted": 0},
     "rates": {"period_s": 10.0, "requests_per_s": 1.2, "prompt_tokens_per_s": 2310.0,
               "generation_tokens_per_s": 410.5, "images_per_s": 2.4},
     "recent": {"period_s": 60.0, "time_to_first_token": {"count": 70, "mean_s": ..., "p50_s": ..., "p90_s": ...,
                "p99_s": ...}, "inter_token": {...}, "end_to_end": {...}},
     "total": {...as recent, since the service started...},
     "prefix_cache": {"usage": 0.4, "num_bytes": 1048576, "host_bytes": 0, "queries": 9000, "hits": 4000,
                      "host_hits": 0, "evictions": 12},
     "embedding_cache": {...the same; queries and hits count images, those of the prefix cache prompt tokens...},
     "actors": [{"actor": "edge:0", "state": "ready", "epoch": 1, "pid": 4711, "device": "cpu", "restarts": 0,
                 "heartbeat_age_s": 0.1, "loop_lag_ms": 0.4, "resident_bytes": 160000000, "device_bytes": 0,
                 "mailbox_depth": 0}, ...]}

What is not known yet is null: every figure of a Latency whose count is 0.  Counts are since the service started, over
all incarnations of its actors; rates and `recent` are of the last seconds.
"""

from __future__ import annotations

from collections import deque
from itertools import accumulate, pairwise
from typing import Literal

from msgspec import Struct

from vlmrt.runtime.control_messages import ActorStatus, Histogram, MetricsSnapshot, ServiceStatus

RATES_PERIOD_S = 10.0
RECENT_PERIOD_S = 60.0
_SPACING_S = 1.0  # between statuses that are kept
_EMPTY = Histogram((), (), 0.0)
ANSWERED = "e2e_request_latency_seconds"  # counts a request once, however many choices it has


class Latency(Struct, frozen=True):
    """In seconds; percentiles are read from a histogram, evenly within a bucket, and end at its last bound."""

    count: int
    mean_s: float | None = None
    p50_s: float | None = None
    p90_s: float | None = None
    p99_s: float | None = None


class Latencies(Struct, frozen=True):
    period_s: float
    time_to_first_token: Latency
    inter_token: Latency
    end_to_end: Latency


class RequestCounts(Struct, frozen=True):
    running: int
    waiting: int
    succeeded: int  # all of whose choices ended well
    failed: int
    aborted: int  # given up by their client


class Rates(Struct, frozen=True):
    period_s: float  # 0: nothing to compare with yet, and every rate is 0
    requests_per_s: float  # that ended well
    prompt_tokens_per_s: float
    generation_tokens_per_s: float
    images_per_s: float  # through the vision tower


class CacheStats(Struct, frozen=True):
    """Of the prefix cache `usage` is the share of KV blocks that running requests hold, cached content apart."""

    usage: float  # 0 to 1
    num_bytes: int
    host_bytes: int
    queries: int
    hits: int  # on the device
    host_hits: int
    evictions: int

    @property
    def hit_rate(self) -> float | None:
        """Of both tiers."""
        return (self.hits + self.host_hits) / self.queries if self.queries else None


class ActorStats(Struct, frozen=True):
    actor: str
    state: Literal["starting", "ready", "restarting", "failed"]
    epoch: int
    pid: int  # 0: no process now
    device: str  # "cpu" or "cuda:<ordinal>"
    restarts: int
    heartbeat_age_s: float
    loop_lag_ms: float
    resident_bytes: int
    device_bytes: int
    mailbox_depth: int


class ServiceStats(Struct, frozen=True):
    ready: bool
    draining: bool
    uptime_s: float
    requests: RequestCounts
    rates: Rates
    recent: Latencies
    total: Latencies
    prefix_cache: CacheStats
    embedding_cache: CacheStats
    actors: tuple[ActorStats, ...]


class StatsHistory:
    """The last statuses, as many as the periods need: about one a second for a minute."""

    def __init__(self) -> None:
        self._kept: deque[ServiceStatus] = deque()
        self._last: ServiceStatus | None = None

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, status: ServiceStatus) -> None:
        """Statuses come in the order of their at_s."""
        self._last = status
        if self._kept and status.at_s - self._kept[-1].at_s < _SPACING_S:
            return
        self._kept.append(status)
        while len(self._kept) > 1 and status.at_s - self._kept[1].at_s >= RECENT_PERIOD_S:
            self._kept.popleft()

    def stats(self) -> ServiceStats | None:
        """Of the last status, compared with earlier ones; None before the first."""
        if self._last is None:
            return None
        return service_stats(self._last, self._before(RATES_PERIOD_S), self._before(RECENT_PERIOD_S))

    def _before(self, period_s: float) -> ServiceStatus:
        """The latest kept status that is at least so old; else the oldest."""
        assert self._last is not None
        found = self._kept[0]
        for status in self._kept:
            if self._last.at_s - status.at_s < period_s:
                break
            found = status
        return found


def service_stats(
    status: ServiceStatus, before: ServiceStatus | None = None, recent_since: ServiceStatus | None = None
) -> ServiceStats:
    """Rates are those since `before`, the recent latencies those since `recent_since`; without them none are known."""
    totals, start = _Totals(status), _Totals(None)
    return ServiceStats(
        ready=status.ready,
        draining=status.draining,
        uptime_s=status.uptime_s,
        requests=RequestCounts(
            running=int(totals.gauge("requests_running")),
            waiting=int(totals.gauge("requests_waiting")),
            succeeded=totals.count(ANSWERED),
            failed=int(totals.counter("request_errors_total")),
            aborted=int(totals.counter("requests_aborted_total")),
        ),
        rates=_rates(totals, _Totals(before), 0.0 if before is None else status.at_s - before.at_s),
        recent=_latencies(
            totals,
            totals if recent_since is None else _Totals(recent_since),
            0.0 if recent_since is None else status.at_s - recent_since.at_s,
        ),
        total=_latencies(totals, start, status.uptime_s),
        prefix_cache=_cache(totals, "prefix_cache", "kv_cache_usage_ratio", hits_are_of_both=True),
        embedding_cache=_cache(totals, "embedding_cache", "embedding_cache_usage_ratio"),
        actors=tuple(_actor(actor, status.metrics.get(actor.actor)) for actor in status.actors),
    )


def percentile(histogram: Histogram, share: float) -> float | None:
    """The value below which that share (0 to 1) of the observations lies; None of no observations.

    Within a bucket values count as evenly spread; what lies above the last bound counts as that bound.
    """
    wanted = share * sum(histogram.counts)
    if wanted <= 0:
        return None
    edges = pairwise((0.0, *histogram.bounds))
    for (low, high), count, running in zip(edges, histogram.counts, accumulate(histogram.counts), strict=False):
        if running >= wanted:
            return low + (high - low) * (1 - (running - wanted) / count)
    return histogram.bounds[-1]


class _Totals:
    """Sums over actors and labels."""

    def __init__(self, status: ServiceStatus | None) -> None:
        self._snapshots = () if status is None else tuple(status.metrics.values())

    def counter(self, name: str) -> float:
        return sum(_sum_of(snapshot.counters, name) for snapshot in self._snapshots)

    def count(self, name: str) -> int:
        """Of the observations of a histogram."""
        return sum(self.histogram(name).counts)

    def gauge(self, name: str) -> float:
        return sum(_sum_of(snapshot.gauges, name) for snapshot in self._snapshots)

    def histogram(self, name: str) -> Histogram:
        """All of that name added up; those with other bounds than the first are left out."""
        total = _EMPTY
        for snapshot in self._snapshots:
            for key, histogram in snapshot.histograms.items():
                if _is_series_of(name, key) and total.bounds in ((), histogram.bounds):
                    total = _combined(histogram, total, 1)
        return total


def _sum_of(values: dict[str, float], name: str) -> float:
    return sum(value for key, value in values.items() if _is_series_of(name, key))


def _is_series_of(name: str, key: str) -> bool:
    return key.startswith(name) and key[len(name) : len(name) + 1] in ("", "{")


def _combined(histogram: Histogram, other: Histogram, sign: int) -> Histogram:
    if not other.bounds:
        return histogram
    counts = tuple(max(0, a + sign * b) for a, b in zip(histogram.counts, other.counts, strict=True))
    return Histogram(histogram.bounds, counts, max(0.0, histogram.total + sign * other.total))


def _rates(totals: _Totals, before: _Totals, period_s: float) -> Rates:
    def rate(name: str) -> float:
        return per_second(totals.counter(name), before.counter(name))

    def per_second(now: float, then: float) -> float:
        return max(0.0, now - then) / period_s if period_s > 0 else 0.0  # a lost actor takes its last counts

    return Rates(
        period_s=max(0.0, period_s),
        requests_per_s=per_second(totals.count(ANSWERED), before.count(ANSWERED)),
        prompt_tokens_per_s=rate("prompt_tokens_total"),
        generation_tokens_per_s=rate("generation_tokens_total"),
        images_per_s=rate("images_encoded_total"),
    )


def _latencies(totals: _Totals, before: _Totals, period_s: float) -> Latencies:
    def latency(name: str) -> Latency:
        now, then = totals.histogram(name), before.histogram(name)
        return _latency(_combined(now, then, -1) if now.bounds == then.bounds else now)

    return Latencies(
        period_s=period_s,
        time_to_first_token=latency("time_to_first_token_seconds"),
        inter_token=latency("inter_token_latency_seconds"),
        end_to_end=latency(ANSWERED),
    )


def _latency(histogram: Histogram) -> Latency:
    count = sum(histogram.counts)
    if not count:
        return Latency(0)
    p50, p90, p99 = (percentile(histogram, share) for share in (0.5, 0.9, 0.99))
    return Latency(count, histogram.total / count, p50, p90, p99)


def _cache(totals: _Totals, name: str, usage: str, *, hits_are_of_both: bool = False) -> CacheStats:
    """Args: hits_are_of_both: the counter of hits counts those in host memory as well."""
    hits, host_hits = totals.counter(f"{name}_hits_total"), totals.counter(f"{name}_host_hits_total")
    return CacheStats(
        usage=totals.gauge(usage),
        num_bytes=int(totals.gauge(f"{name}_bytes")),
        host_bytes=int(totals.gauge(f"{name}_host_bytes")),
        queries=int(totals.counter(f"{name}_queries_total")),
        hits=int(hits - host_hits if hits_are_of_both else hits),
        host_hits=int(host_hits),
        evictions=int(totals.counter(f"{name}_evictions_total")),
    )


def _actor(actor: ActorStatus, snapshot: MetricsSnapshot | None) -> ActorStats:
    gauges = {} if snapshot is None else snapshot.gauges
    return ActorStats(
        actor=actor.actor,
        state=actor.state,
        epoch=actor.epoch,
        pid=actor.pid,
        device=actor.device,
        restarts=actor.num_restarts,
        heartbeat_age_s=actor.heartbeat_age_s,
        loop_lag_ms=actor.loop_lag_ms,
        resident_bytes=int(gauges.get("resident_memory_bytes", 0)),
        device_bytes=int(gauges.get("device_memory_bytes", 0)),
        mailbox_depth=int(gauges.get("mailbox_depth", 0)),
    )
