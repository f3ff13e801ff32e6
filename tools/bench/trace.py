"""Where a workload's time went, from what the server counts: /metrics before and after it, and gauges between."""

from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

SETTLE_S = 1.5  # actors report every 0.5 s and a scrape may be 1 s old
SAMPLE_S = 0.5
GAUGES = (
    "requests_running",
    "requests_waiting",
    "kv_cache_usage_ratio",
    "embedding_cache_usage_ratio",
    "mailbox_depth",
    "mailbox_age_seconds",
    "loop_lag_ms",
)
BUSY = (
    "decode_image_seconds",
    "decode_frames_seconds",
    "encode_seconds",
    "step_seconds",
)  # of work that one process does one after the other

Key = tuple[str, str]  # (actor, metric and its other labels)


class Histogram(NamedTuple):
    """Counts of the values up to each bound, and the sum of all values."""

    counts: Mapping[float, float]  # cumulative, by upper bound
    total: float

    @property
    def num_values(self) -> float:
        return max(self.counts.values(), default=0.0)

    def bound_of(self, share: float) -> float:
        """The lowest bound that at least this share of the values is within."""
        return min(bound for bound, count in self.counts.items() if count >= share * self.num_values)

    def since(self, before: Histogram | None) -> Histogram:
        if before is None:
            return self
        counts = {bound: count - before.counts.get(bound, 0.0) for bound, count in self.counts.items()}
        return Histogram(counts, self.total - before.total)


class Scrape(NamedTuple):
    """One reading of /metrics."""

    counters: dict[Key, float]
    gauges: dict[Key, float]
    histograms: dict[Key, Histogram]


def parse(text: str) -> Scrape:
    scrape = Scrape({}, {}, {})
    for family in text_string_to_metric_families(text):
        name = family.name.removeprefix("vlmrt_")
        for sample in family.samples:
            labels = dict(sample.labels)
            key = labels.pop("actor", ""), name
            bound = labels.pop("le", None)
            if labels:
                key = key[0], f"{name} {' '.join(labels.values())}"
            if family.type == "counter":
                scrape.counters[key] = sample.value
            elif family.type == "gauge":
                scrape.gauges[key] = sample.value
            elif family.type == "histogram":
                known = scrape.histograms.get(key, Histogram({}, 0.0))
                if bound is not None:
                    scrape.histograms[key] = known._replace(counts={**known.counts, float(bound): sample.value})
                elif sample.name.endswith("_sum"):
                    scrape.histograms[key] = known._replace(total=sample.value)
    return scrape


def read(url: str) -> Scrape:
    straight = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # as the load goes
    with straight.open(f"{url}/metrics", timeout=10) as answer:
        return parse(answer.read().decode())


class Trace:
    """Reads the server's metrics around a workload: `with Trace(url) as trace: ...`.

    Gauges are read within it as well if `sampled`, which the edge feels.
    """

    def __init__(self, url: str, *, sampled: bool = True) -> None:
        self._url = url
        self._sampled = sampled
        self.before = self.after = Scrape({}, {}, {})
        self._peaks: dict[Key, float] = {}
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, name="trace")

    def __enter__(self) -> Trace:
        time.sleep(SETTLE_S)
        self.before = read(self._url)
        if self._sampled:
            self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._sampled:
            self._sampler.join()
        if error is None:
            time.sleep(SETTLE_S)
            self.after = read(self._url)

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            with suppress(OSError):  # a server that is gone shows in the requests
                for key, value in read(self._url).gauges.items():
                    if key[1] in GAUGES:
                        self._peaks[key] = max(value, self._peaks.get(key, 0.0))

    def lines(self, wall_s: float) -> list[str]:
        """wall_s: from the first request to the last token, without the preparation of the load."""
        return trace_lines(self.before, self.after, self._peaks, wall_s)


def trace_lines(before: Scrape, after: Scrape, peaks: Mapping[Key, float], wall_s: float) -> list[str]:
    """What a request's time went to, then one line for each histogram, counter and gauge that moved."""
    moved = {key: histogram.since(before.histograms.get(key)) for key, histogram in after.histograms.items()}
    lines = request_lines(moved)
    for key, histogram in sorted(moved.items()):
        if histogram.num_values:
            lines.append(f"  {' '.join(key):44} {histogram_text(key[1], histogram, wall_s)}")
    for key, value in sorted(after.counters.items()):
        if (amount := value - before.counters.get(key, 0.0)) > 0:
            lines.append(f"  {' '.join(key):44} +{amount:g}")
    for key, peak in sorted(peaks.items()):
        if peak:
            lines.append(f"  {' '.join(key):44} peak {peak:.4g}")
    return lines


def request_lines(moved: Mapping[Key, Histogram]) -> list[str]:
    """A request's latency beside the work that was done for it; what is left of the latency it waited.

    Work is the sum over all steps, forwards and decoded images by request; the latency until the end is that of the
    requests that came to one.
    """

    def sums(name: str) -> tuple[float, float]:
        """(values, their sum in ms) over all actors."""
        found = [histogram for key, histogram in moved.items() if key[1] == name]
        return sum(histogram.num_values for histogram in found), 1e3 * sum(histogram.total for histogram in found)

    num_requests, first_ms = sums("time_to_first_token_seconds")
    num_ended, end_ms = sums("e2e_request_latency_seconds")
    if not num_requests:
        return []
    images, frames, tower, steps = (sums(name)[1] / num_requests for name in BUSY)
    return [
        f"  a request of {num_requests:.0f}: first token after {first_ms / num_requests:.1f} ms, "
        f"end after {end_ms / max(1, num_ended):.1f} ms; "
        f"work: decoding {images + frames:.2f} ms, tower {tower:.2f} ms, steps {steps:.2f} ms"
    ]


def histogram_text(name: str, moved: Histogram, wall_s: float) -> str:
    mean = moved.total / moved.num_values
    p50, p99 = moved.bound_of(0.5), moved.bound_of(0.99)
    if not name.endswith("_seconds"):
        return f"{moved.num_values:6.0f} x mean {mean:.1f}, p50 <= {p50:g}, p99 <= {p99:g}"
    share = f", {moved.total / wall_s:.0%} of the time" if name in BUSY else ""
    return f"{moved.num_values:6.0f} x mean {1e3 * mean:.2f} ms, p50 <= {1e3 * p50:g}, p99 <= {1e3 * p99:g}{share}"
