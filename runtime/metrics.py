"""Counters, gauges and histograms of one actor.

An actor keeps cumulative values of its own incarnation; the supervisor adds up incarnations; an edge renders the
totals (prometheus.py).
"""

from __future__ import annotations

import re
import threading
from bisect import bisect_left
from collections.abc import Mapping

from vlmrt.runtime.control_messages import Histogram, MetricsSnapshot
from vlmrt.runtime.metric_table import METRICS, OF_STATUS, Metric, MetricKind


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
    """This actor's metrics.  Safe from any thread; a snapshot costs one copy.

    What METRICS says an actor of this kind has is there from the start, at 0, as far as it has no labels: a counter
    that appears at 1 has no increase.  A name, kind or set of labels that METRICS does not have is a ValueError.
    """

    def __init__(self, actor_kind: str | None = None) -> None:
        self._lock = threading.Lock()
        self._counters: dict[str, float] = {}
        self._gauges: dict[str, float] = {}
        self._histograms: dict[str, HistogramSeries] = {}
        for name, metric in METRICS.items():
            if actor_kind in metric.actors and not metric.labels:
                if metric.kind == "counter" and name not in OF_STATUS:
                    self._counters[name] = 0.0
                elif metric.kind == "histogram":
                    self.histogram(name)

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Count up.  Raises ValueError if the name is no counter or the amount is negative."""
        _check(name, "counter", labels)
        if amount < 0:
            raise ValueError(f"counter {name} cannot go down by {-amount}")
        key = series_key(name, labels)
        with self._lock:
            self._counters[key] = self._counters.get(key, 0.0) + amount

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge.  Raises ValueError if the name is none."""
        _check(name, "gauge", labels)
        key = series_key(name, labels)
        with self._lock:
            self._gauges[key] = value

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Count a value in its bucket.  Raises ValueError if the name is no histogram."""
        self.histogram(name, **labels).observe(value)

    def histogram(self, name: str, **labels: str) -> HistogramSeries:
        """One series by itself, for who observes often.  Raises ValueError if the name is no histogram."""
        bounds = _check(name, "histogram", labels).bounds
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
                },
            )


def _check(name: str, kind: MetricKind, labels: Mapping[str, str]) -> Metric:
    metric = METRICS.get(name)
    if metric is None:
        raise ValueError(f"unknown metric {name!r}: add it to METRICS in runtime/metric_table.py")
    if metric.kind != kind:
        raise ValueError(f"metric {name} is a {metric.kind}, not a {kind}")
    if (labels or metric.labels) and tuple(sorted(labels)) != metric.labels:
        raise ValueError(f"metric {name} has the labels {metric.labels}, not {tuple(labels)}")
    return metric


EMPTY_SNAPSHOT = MetricsSnapshot({}, {}, {})


def merge_snapshots(finished: MetricsSnapshot, live: MetricsSnapshot) -> MetricsSnapshot:
    """Counters and histograms added up; gauges are the live incarnation's only."""
    counters = dict(finished.counters)
    for key, value in live.counters.items():
        counters[key] = counters.get(key, 0.0) + value
    histograms = dict(finished.histograms)
    for key, histogram in live.histograms.items():
        histograms[key] = add_histograms(histograms.get(key), histogram)
    return MetricsSnapshot(counters, dict(live.gauges), histograms)


def add_histograms(before: Histogram | None, after: Histogram) -> Histogram:
    if before is None or before.bounds != after.bounds:
        return after
    counts = tuple(a + b for a, b in zip(before.counts, after.counts, strict=True))
    return Histogram(after.bounds, counts, before.total + after.total)
