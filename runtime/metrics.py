"""Counters, gauges and histograms of one actor, and the Prometheus text of all of them.

An actor keeps cumulative values of its own incarnation; the supervisor adds up incarnations; an edge renders the
totals.
"""

from __future__ import annotations

import re
import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

from vlmrt.runtime.messages import ActorStatus, Histogram, MetricsSnapshot, ServiceStatus

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric as Family

MetricKind = Literal["counter", "gauge", "histogram"]

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TOKEN_COUNTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0)
IMAGE_COUNTS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0)


class Metric(NamedTuple):
    kind: MetricKind
    help: str
    bounds: tuple[float, ...] = ()  # of a histogram


METRICS: Mapping[str, Metric] = {
    "requests_running": Metric("gauge", "Requests in a slot of the running batch."),
    "requests_waiting": Metric("gauge", "Accepted requests that are not running yet."),
    "kv_cache_usage_ratio": Metric("gauge", "Share of the KV blocks that hold data of running requests."),
    "embedding_cache_usage_ratio": Metric("gauge", "Share of the embedding pages in use."),
    "prefix_cache_queries_total": Metric("counter", "Prompt tokens looked up in the KV prefix cache."),
    "prefix_cache_hits_total": Metric("counter", "Prompt tokens found in the KV prefix cache."),
    "prefix_cache_evictions_total": Metric("counter", "Blocks evicted from the KV prefix cache."),
    "prefix_cache_host_hits_total": Metric("counter", "Prompt tokens found in the KV prefix cache's host memory."),
    "prefix_cache_host_evictions_total": Metric("counter", "Blocks evicted from the KV prefix cache's host memory."),
    "prefix_cache_bytes": Metric("gauge", "Bytes of KV blocks whose content can be found, on all ranks."),
    "prefix_cache_host_bytes": Metric("gauge", "Bytes of KV blocks kept in host memory, by all ranks."),
    "embedding_cache_queries_total": Metric("counter", "Images looked up in the embedding cache."),
    "embedding_cache_hits_total": Metric("counter", "Images found in the embedding cache."),
    "embedding_cache_evictions_total": Metric("counter", "Images evicted from the embedding cache."),
    "embedding_cache_bytes": Metric("gauge", "Bytes of image rows in the embedding cache."),
    "embedding_cache_host_hits_total": Metric("counter", "Images found only in the embedding cache's host memory."),
    "embedding_cache_host_evictions_total": Metric("counter", "Images evicted from the embedding cache's host memory."),
    "embedding_cache_host_bytes": Metric("gauge", "Bytes of image rows in the embedding cache's host memory."),
    "media_aliases": Metric("gauge", "Names under which clients may leave out an image's bytes."),
    "media_lookups_total": Metric("counter", "Images looked up by name, without their bytes."),
    "media_lookup_hits_total": Metric("counter", "Images found by name."),
    "preemptions_total": Metric("counter", "Running requests put back to waiting for want of KV blocks."),
    "recomputations_total": Metric("counter", "Requests resumed by recomputation after the LLM group was lost."),
    "prompt_tokens_total": Metric("counter", "Prompt tokens of admitted requests."),
    "generation_tokens_total": Metric("counter", "Tokens generated and sent."),
    "request_success_total": Metric("counter", "Requests that ended well, by finished_reason."),
    "request_errors_total": Metric("counter", "Requests that ended with an error, by code."),
    "requests_aborted_total": Metric("counter", "Requests given up by their client or their edge."),
    "time_to_first_token_seconds": Metric("histogram", "From the request's arrival to its first token.", SECONDS),
    "inter_token_latency_seconds": Metric("histogram", "Between two tokens of one request.", SECONDS),
    "max_inter_token_gap_seconds": Metric("histogram", "The longest time between two tokens of a request.", SECONDS),
    "e2e_request_latency_seconds": Metric("histogram", "From the request's arrival to its end.", SECONDS),
    "request_queue_time_seconds": Metric(
        "histogram", "From the scheduler's hearing of a request to the first step that works for it.", SECONDS
    ),
    "request_prefill_time_seconds": Metric("histogram", "From that step to the request's first token.", SECONDS),
    "request_decode_time_seconds": Metric("histogram", "From the request's first token to its last.", SECONDS),
    "request_prompt_tokens": Metric("histogram", "Prompt tokens of a request that was answered.", TOKEN_COUNTS),
    "request_generation_tokens": Metric("histogram", "Tokens generated for a request.", TOKEN_COUNTS),
    "prompt_seconds": Metric("histogram", "Chat template and tokenizer, for a request's prompt.", SECONDS),
    "media_fetch_seconds": Metric("histogram", "Getting the bytes of one image or clip.", SECONDS),
    "media_hash_seconds": Metric(
        "histogram", "Hashing one image and reading its header, or finding out what is in one clip.", SECONDS
    ),
    "media_wait_seconds": Metric(
        "histogram", "From the scheduler's hearing of a request to the rows of its last image.", SECONDS
    ),
    "decode_wait_seconds": Metric(
        "histogram", "From the scheduler's hearing of a request to the start of an image's decoding.", SECONDS
    ),
    "encode_wait_seconds": Metric("histogram", "From an image's pixels to its forward in the vision tower.", SECONDS),
    "hand_off_seconds": Metric(
        "histogram", "From an image's rows to the step of the language model that reads them.", SECONDS
    ),
    "restore_seconds": Metric("histogram", "Copying the rows of images back from host memory.", SECONDS),
    "images_encoded_total": Metric("counter", "Images that went through the vision tower."),
    "vit_batch_images": Metric("histogram", "Images in one forward of the vision tower.", IMAGE_COUNTS),
    "encode_seconds": Metric("histogram", "One forward of the vision tower.", SECONDS),
    "images_decoded_total": Metric("counter", "Images decoded and resized."),
    "decode_image_seconds": Metric("histogram", "Decoding and resizing one image.", SECONDS),
    "videos_total": Metric("counter", "Clips in the prompts of requests."),
    "video_probes_total": Metric("counter", "Clips that a media worker was asked about, as none knew them."),
    "frames_decoded_total": Metric("counter", "Frames of clips decoded and resized, by the library that read them."),
    "decode_frames_seconds": Metric("histogram", "Decoding and resizing one temporal group of a clip.", SECONDS),
    "pixel_arena_bytes": Metric("gauge", "Bytes of the pixel arena in use."),
    "step_seconds": Metric("histogram", "One step of the language model.", SECONDS),
    "step_tokens": Metric("histogram", "Tokens in one step of the language model.", TOKEN_COUNTS),
    "actor_up": Metric("gauge", "1 if the actor is ready, 0 if not."),
    "actor_restarts_total": Metric("counter", "Restarts of the actor since the service started."),
    "heartbeat_age_seconds": Metric("gauge", "Time since the actor's last heartbeat."),
    "loop_lag_ms": Metric("gauge", "How late the actor's event loop ran its last heartbeat."),
    "resident_memory_bytes": Metric("gauge", "Host memory of the actor's process that is in use."),
    "device_memory_bytes": Metric("gauge", "Device memory that the actor's process holds."),
    "mailbox_depth": Metric("gauge", "Messages waiting in the actor's mailbox."),
    "mailbox_age_seconds": Metric("gauge", "How long the next message in the actor's mailbox has waited."),
    "stale_messages_total": Metric("counter", "Messages of dead incarnations, dropped."),
    "unsent_messages_total": Metric("counter", "Messages not sent because the peer was not up."),
    "bad_frames_total": Metric("counter", "Frames that were no message, dropped."),
    "http_requests_total": Metric("counter", "HTTP requests answered, by code."),
    "media_bytes_in_flight": Metric("gauge", "Encoded bytes of media held for open requests."),
}


def series_key(name: str, labels: Mapping[str, str]) -> str:
    """`name` or `name{label="value"}`, labels sorted, values escaped as Prometheus does."""
    if not labels:
        return name
    pairs = (f'{label}="{_escape(value)}"' for label, value in sorted(labels.items()))
    return f"{name}{{{','.join(pairs)}}}"


_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"(?:,|$)')
_ESCAPES = {"\\\\": "\\", '\\"': '"', "\\n": "\n"}


def parse_series_key(key: str) -> tuple[str, dict[str, str]]:
    """The inverse of series_key."""
    name, brace, rest = key.partition("{")
    if not brace:
        return name, {}
    return name, {
        label: re.sub(r'\\[\\"n]', lambda match: _ESCAPES[match[0]], value)
        for label, value in _LABEL.findall(rest.removesuffix("}"))
    }


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class HistogramSeries:
    """The values of one series, counted.  Safe from any thread."""

    __slots__ = ("_lock", "bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...], lock: threading.Lock) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0
        self._lock = lock

    def observe(self, value: float) -> None:
        """Count a value in its bucket: the first whose bound is not below it."""
        bucket = bisect_left(self.bounds, value)
        with self._lock:
            self.counts[bucket] += 1
            self.total += value


class Metrics:
    """This actor's metrics.  Safe from any thread; a snapshot costs one copy.  Unknown names are a ValueError."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: dict[str, float] = {}
        self._gauges: dict[str, float] = {}
        self._histograms: dict[str, HistogramSeries] = {}

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Count up.  Raises ValueError if the name is no counter or the amount is negative."""
        _check(name, "counter")
        if amount < 0:
            raise ValueError(f"counter {name} cannot go down by {-amount}")
        key = series_key(name, labels)
        with self._lock:
            self._counters[key] = self._counters.get(key, 0.0) + amount

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge.  Raises ValueError if the name is none."""
        _check(name, "gauge")
        key = series_key(name, labels)
        with self._lock:
            self._gauges[key] = value

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Count a value in its bucket: the first whose bound is not below it.

        Raises ValueError if the name is no histogram.
        """
        self.histogram(name, **labels).observe(value)

    def histogram(self, name: str, **labels: str) -> HistogramSeries:
        """One series by itself, for who observes often.  Raises ValueError if the name is no histogram."""
        bounds = _check(name, "histogram").bounds
        key = series_key(name, labels)
        with self._lock:
            series = self._histograms.get(key)
            if series is None:
                series = self._histograms[key] = HistogramSeries(bounds, self._lock)
        return series

    def snapshot(self) -> MetricsSnapshot:
        with self._lock:
            return MetricsSnapshot(
                counters=dict(self._counters),
                gauges=dict(self._gauges),
                histograms={
                    key: Histogram(series.bounds, tuple(series.counts), series.total)
                    for key, series in self._histograms.items()
                    if series.total or any(series.counts)
                },
            )


def _check(name: str, kind: MetricKind) -> Metric:
    metric = METRICS.get(name)
    if metric is None:
        raise ValueError(f"unknown metric {name!r}: add it to METRICS in runtime/metrics.py")
    if metric.kind != kind:
        raise ValueError(f"metric {name} is a {metric.kind}, not a {kind}")
    return metric


EMPTY_SNAPSHOT = MetricsSnapshot({}, {}, {})


def merge_snapshots(finished: MetricsSnapshot, live: MetricsSnapshot) -> MetricsSnapshot:
    """Counters and histograms added up; gauges are the live incarnation's only."""
    counters = dict(finished.counters)
    for key, value in live.counters.items():
        counters[key] = counters.get(key, 0.0) + value
    histograms = dict(finished.histograms)
    for key, histogram in live.histograms.items():
        histograms[key] = _add_histograms(histograms.get(key), histogram)
    return MetricsSnapshot(counters, dict(live.gauges), histograms)


def _add_histograms(before: Histogram | None, after: Histogram) -> Histogram:
    if before is None or before.bounds != after.bounds:
        return after
    counts = tuple(a + b for a, b in zip(before.counts, after.counts, strict=True))
    return Histogram(after.bounds, counts, before.total + after.total)


def prometheus_text(status: ServiceStatus) -> bytes:
    """Every actor's totals in the Prometheus text format, names prefixed `vlmrt_`, with a label `actor`."""
    from prometheus_client.exposition import generate_latest
    from prometheus_client.metrics_core import Metric as Family

    families: dict[str, Family] = {}
    for actor, key, value in _samples(status):
        name, labels = parse_series_key(key)
        if name not in METRICS:
            continue  # the text stays valid whatever an actor sent
        metric = METRICS[name]
        family = families.setdefault(name, Family(f"vlmrt_{name}".removesuffix("_total"), metric.help, metric.kind))
        labels = {"actor": actor, **labels}
        if isinstance(value, Histogram):
            for bound, count in _cumulative(value):
                family.add_sample(f"vlmrt_{name}_bucket", {**labels, "le": bound}, count)
            family.add_sample(f"vlmrt_{name}_sum", labels, value.total)
            family.add_sample(f"vlmrt_{name}_count", labels, sum(value.counts))
        else:
            family.add_sample(f"vlmrt_{name}", labels, value)
    return bytes(generate_latest(_Collected(families.values())))


class _Collected:
    """What prometheus_client calls a registry."""

    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def collect(self) -> Iterable[Family]:
        return self._families


def _samples(status: ServiceStatus) -> Iterator[tuple[str, str, float | Histogram]]:
    for actor in status.actors:
        yield from ((actor.actor, key, value) for key, value in _actor_samples(actor))
    for name, snapshot in status.metrics.items():
        for values in (snapshot.counters, snapshot.gauges, snapshot.histograms):
            yield from ((name, key, value) for key, value in values.items())


def _actor_samples(actor: ActorStatus) -> Iterator[tuple[str, float]]:
    yield "actor_up", float(actor.state == "ready")
    yield "actor_restarts_total", float(actor.num_restarts)
    yield "heartbeat_age_seconds", actor.heartbeat_age_s
    yield "loop_lag_ms", actor.loop_lag_ms


def _cumulative(histogram: Histogram) -> Iterator[tuple[str, float]]:
    running = 0
    for bound, count in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
        running += count
        yield ("+Inf" if bound == float("inf") else repr(float(bound))), running
