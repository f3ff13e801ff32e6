"""Counting, adding up incarnations, and text that Prometheus reads."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from vlmrt.runtime.control_messages import ActorStatus, MetricsSnapshot, ServiceStatus
from vlmrt.runtime.messages import ActorName, Epoch
from vlmrt.runtime.metric_table import METRICS
from vlmrt.runtime.metrics import (
    EMPTY_SNAPSHOT,
    Metrics,
    merge_snapshots,
    parse_series_key,
    series_key,
)
from vlmrt.runtime.prometheus import VLLM_METRICS, prometheus_text


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
    with pytest.raises(ValueError, match=r"has the labels \('code',\), not \(\)"):
        metrics.add("http_requests_total")
    with pytest.raises(ValueError, match=r"has the labels \(\), not \('code',\)"):
        metrics.set("requests_running", 1, code="200")


def test_every_metric_is_named_and_described_as_prometheus_wants() -> None:
    for name, metric in METRICS.items():
        assert name.endswith("_total") == (metric.kind == "counter"), name
        assert bool(metric.bounds) == (metric.kind == "histogram"), name
        assert metric.bounds == tuple(sorted(set(metric.bounds))), name
        assert metric.help.endswith("."), name
        assert metric.actors, name
        assert metric.labels == tuple(sorted(metric.labels)), name


def test_a_value_on_a_bound_falls_below_it() -> None:
    metrics = Metrics()
    for value in (0.5, 1.0, 1.5, 2.0, 99.0):
        metrics.observe("vit_batch_images", value)
    histogram = metrics.snapshot().histograms["vit_batch_images"]
    assert (histogram.counts[:3], histogram.counts[-1], sum(histogram.counts)) == ((2, 2, 0), 1, 5)
    assert histogram.total == 104.0


def test_an_actor_begins_with_what_it_has_at_zero() -> None:
    snapshot = Metrics("scheduler").snapshot()
    assert snapshot.counters["preemptions_total"] == snapshot.counters["bad_frames_total"] == 0
    assert "images_encoded_total" not in snapshot.counters
    assert "actor_restarts_total" not in snapshot.counters  # the supervisor's to say
    edge = Metrics("edge").snapshot()
    assert sum(edge.histograms["time_to_first_token_seconds"].counts) == 0
    assert not any(key.startswith("http_requests_total") for key in edge.counters)  # which codes there are is not known


def test_a_series_by_itself_counts_into_the_snapshot() -> None:
    metrics = Metrics()
    series = metrics.histogram("inter_token_latency_seconds")
    series.observe(0.02)
    metrics.observe("inter_token_latency_seconds", 0.02)
    assert metrics.histogram("inter_token_latency_seconds") is series
    assert sum(metrics.snapshot().histograms["inter_token_latency_seconds"].counts) == 2


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
    assert read["vlmrt_loop_lag_seconds", (edge,)] == 0.0015
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


# ---------------------------------------------------------------- vLLM's names


def test_without_the_option_no_name_is_vllms() -> None:
    assert b"vllm:" not in prometheus_text(status(edge_0=Metrics("edge").snapshot()))


def test_every_metric_of_ours_behind_one_of_vllms_exists_and_is_of_one_kind() -> None:
    for name, compat in VLLM_METRICS.items():
        kinds = {METRICS[source].kind for source in compat.sources}
        assert len(kinds) == 1, name
        (kind,) = kinds
        assert kind == "histogram" or name.endswith("_total") == (kind == "counter"), name


def test_vllms_figures_are_the_sums_over_our_actors() -> None:
    first, second, scheduler, rank, other = (Metrics() for _ in range(5))
    for edge, count in ((first, 2), (second, 3)):
        edge.add("request_success_total", count, finished_reason="stop")
        edge.observe("time_to_first_token_seconds", 0.5)
        edge.add("requests_aborted_total")
    second.add("request_success_total", 1, finished_reason="tool_calls")
    scheduler.set("kv_cache_usage_ratio", 0.25)
    scheduler.add("embedding_cache_hits_total", 4)
    scheduler.add("embedding_cache_host_hits_total", 1)
    for llm in (rank, other):
        llm.observe("step_tokens", 100)
    snapshots = {"edge_0": first, "edge_1": second, "scheduler_0": scheduler, "llm_0": rank, "llm_1": other}
    report = status(**{name: metrics.snapshot() for name, metrics in snapshots.items()})
    read = samples(prometheus_text(report, "a-model"))
    labels = (("engine", "0"), ("model_name", "a-model"))

    def success(reason: str) -> float:
        return read["vllm:request_success_total", (labels[0], ("finished_reason", reason), labels[1])]

    assert (success("stop"), success("abort")) == (6, 2)
    assert read["vllm:time_to_first_token_seconds_count", labels] == 2
    assert read["vllm:time_to_first_token_seconds_sum", labels] == pytest.approx(1.0)
    assert read["vllm:kv_cache_usage_perc", labels] == read["vllm:gpu_cache_usage_perc", labels] == 0.25
    assert read["vllm:mm_cache_hits_total", labels] == 5
    assert read["vllm:iteration_tokens_total_count", labels] == 1  # of one rank
    assert read["vlmrt_step_tokens_count", (("actor", "llm:1"),)] == 1  # and ours are all there
