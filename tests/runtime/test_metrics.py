"""Counting, adding up incarnations, and text that Prometheus reads."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from vlmrt.runtime.messages import ActorName, ActorStatus, Epoch, MetricsSnapshot, ServiceStatus
from vlmrt.runtime.metrics import (
    EMPTY_SNAPSHOT,
    METRICS,
    Metrics,
    merge_snapshots,
    parse_series_key,
    prometheus_text,
    series_key,
)


def status(**snapshots: MetricsSnapshot) -> ServiceStatus:
    actors = (
        ActorStatus(ActorName("edge:0"), Epoch(1), 11, "ready", 0, 0.25, 1.5),
        ActorStatus(ActorName("vit:0"), Epoch(3), 12, "restarting", 2, 9.0, 0.0),
    )
    return ServiceStatus(ready=False, actors=actors, metrics={k.replace("_", ":"): v for k, v in snapshots.items()})


def samples(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = list(text_string_to_metric_families(text.decode()))
    names = [family.name for family in families]
    assert len(names) == len(set(names)), "a family twice"
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_unknown_names_wrong_kinds_and_falling_counters_raise() -> None:
    metrics = Metrics()
    with pytest.raises(ValueError, match="unknown metric 'request_running'"):
        metrics.set("request_running", 1)
    with pytest.raises(ValueError, match="is a gauge, not a counter"):
        metrics.add("requests_running")
    with pytest.raises(ValueError, match="cannot go down"):
        metrics.add("preemptions_total", -1)
    with pytest.raises(ValueError, match="is a counter, not a histogram"):
        metrics.observe("preemptions_total", 0.1)


def test_every_metric_is_named_and_described_as_prometheus_wants() -> None:
    for name, metric in METRICS.items():
        assert name.endswith("_total") == (metric.kind == "counter"), name
        assert bool(metric.bounds) == (metric.kind == "histogram"), name
        assert metric.bounds == tuple(sorted(set(metric.bounds))), name
        assert metric.help.endswith("."), name


def test_a_value_on_a_bound_falls_below_it() -> None:
    metrics = Metrics()
    for value in (0.5, 1.0, 1.5, 2.0, 99.0):
        metrics.observe("vit_batch_images", value)
    histogram = metrics.snapshot().histograms["vit_batch_images"]
    assert (histogram.counts[:3], histogram.counts[-1], sum(histogram.counts)) == ((2, 2, 0), 1, 5)
    assert histogram.total == 104.0


def test_a_series_that_nothing_was_counted_in_is_not_in_the_snapshot() -> None:
    metrics = Metrics()
    series = metrics.histogram("inter_token_latency_seconds")
    assert metrics.snapshot().histograms == {}
    series.observe(0.0)
    assert metrics.histogram("inter_token_latency_seconds") is series
    assert sum(metrics.snapshot().histograms["inter_token_latency_seconds"].counts) == 1


def test_counts_from_many_threads_are_all_there() -> None:
    metrics = Metrics()

    def count() -> None:
        for _ in range(2000):
            metrics.add("http_requests_total", code="200")
            metrics.observe("step_seconds", 0.01)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    snapshot = metrics.snapshot()
    assert snapshot.counters == {'http_requests_total{code="200"}': 8000}
    assert sum(snapshot.histograms["step_seconds"].counts) == 8000


def test_incarnations_add_up_except_for_gauges() -> None:
    first, second = Metrics(), Metrics()
    for metrics, count in ((first, 2), (second, 3)):
        metrics.add("images_encoded_total", count)
        metrics.set("requests_running", count)
        metrics.observe("encode_seconds", 0.1 * count)
    first.add("preemptions_total")
    total = merge_snapshots(first.snapshot(), second.snapshot())
    assert total.counters == {"images_encoded_total": 5, "preemptions_total": 1}
    assert total.gauges == {"requests_running": 3}
    assert sum(total.histograms["encode_seconds"].counts) == 2
    assert total.histograms["encode_seconds"].total == pytest.approx(0.5)
    assert merge_snapshots(EMPTY_SNAPSHOT, first.snapshot()) == first.snapshot()


def test_the_text_is_read_back_by_prometheus_own_parser() -> None:
    metrics = Metrics()
    metrics.add("http_requests_total", 3, code="200")
    metrics.add("http_requests_total", 1, code="429")
    metrics.set("requests_running", 2)
    for value in (0.002, 0.02, 0.02, 500.0):
        metrics.observe("time_to_first_token_seconds", value)
    read = samples(prometheus_text(status(edge_0=metrics.snapshot(), vit_0=EMPTY_SNAPSHOT)))
    edge, vit = ("actor", "edge:0"), ("actor", "vit:0")
    assert read["vlmrt_http_requests_total", (edge, ("code", "200"))] == 3
    assert read["vlmrt_http_requests_total", (edge, ("code", "429"))] == 1
    assert read["vlmrt_requests_running", (edge,)] == 2
    assert read["vlmrt_actor_up", (edge,)] == 1
    assert read["vlmrt_actor_up", (vit,)] == 0
    assert read["vlmrt_actor_restarts_total", (vit,)] == 2
    assert read["vlmrt_heartbeat_age_seconds", (vit,)] == 9
    assert read["vlmrt_loop_lag_ms", (edge,)] == 1.5
    name = "vlmrt_time_to_first_token_seconds"
    buckets = [read[f"{name}_bucket", (edge, ("le", repr(b)))] for b in METRICS[name.removeprefix("vlmrt_")].bounds]
    assert buckets == sorted(buckets)
    assert (buckets[0], buckets[-1]) == (0, 3)
    assert read[f"{name}_bucket", (edge, ("le", "+Inf"))] == read[f"{name}_count", (edge,)] == 4
    assert read[f"{name}_sum", (edge,)] == pytest.approx(500.042)


def test_the_text_has_help_and_type_for_each_metric() -> None:
    text = prometheus_text(status()).decode()
    assert "# HELP vlmrt_actor_up 1 if the actor is ready, 0 if not." in text
    assert "# TYPE vlmrt_actor_restarts_total counter" in text


@given(st.dictionaries(st.from_regex(r"[a-z_][a-z0-9_]*", fullmatch=True), st.text(), max_size=3))
def test_series_keys_are_read_back_whatever_the_values(labels: dict[str, str]) -> None:
    assert parse_series_key(series_key("http_requests_total", labels)) == ("http_requests_total", labels)
