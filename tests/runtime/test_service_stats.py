"""Figures of a running service from two of its statuses."""

from __future__ import annotations

import msgspec
import pytest

from vlmrt.runtime.control_messages import ActorStatus, Histogram, MetricsSnapshot, ServiceStatus
from vlmrt.runtime.messages import ActorName, Epoch
from vlmrt.runtime.metrics import Metrics
from vlmrt.runtime.service_stats import (
    RATES_PERIOD_S,
    RECENT_PERIOD_S,
    Latency,
    ServiceStats,
    StatsHistory,
    percentile,
    service_stats,
)


def status(at_s: float, **metrics: Metrics) -> ServiceStatus:
    actors = (
        ActorStatus(ActorName("edge:0"), Epoch(1), 11, "ready", 0, 0.25, 1.5),
        ActorStatus(ActorName("vit:0"), Epoch(3), 12, "restarting", 2, 9.0, 0.0, "cuda:1"),
    )
    snapshots = {name.replace("_", ":"): each.snapshot() for name, each in metrics.items()}
    return ServiceStatus(True, actors, snapshots, at_s=at_s, uptime_s=at_s - 100.0)


def test_an_empty_status_has_figures_of_nothing() -> None:
    stats = service_stats(status(100.0))
    assert (stats.requests.running, stats.rates.requests_per_s, stats.prefix_cache.hit_rate) == (0, 0.0, None)
    assert stats.recent.time_to_first_token == stats.total.inter_token == Latency(0)
    assert [actor.actor for actor in stats.actors] == ["edge:0", "vit:0"]


def test_rates_are_the_growth_of_the_counters_of_all_actors() -> None:
    first, second, tower = Metrics(), Metrics(), Metrics()
    first.add("generation_tokens_total", 100)
    for _ in range(2):
        first.observe("e2e_request_latency_seconds", 1.0)
    before = status(110.0, scheduler_0=first, edge_1=second)
    first.add("generation_tokens_total", 50)
    for _ in range(2):
        second.observe("e2e_request_latency_seconds", 1.0)
        second.add("request_success_total", 8, finished_reason="stop")  # each had eight choices: they are no requests
    tower.add("images_encoded_total", 30)
    stats = service_stats(status(115.0, scheduler_0=first, edge_1=second, vit_0=tower), before)
    assert stats.rates.period_s == 5.0
    assert stats.rates.generation_tokens_per_s == 10.0
    assert stats.rates.requests_per_s == pytest.approx(0.4)
    assert stats.rates.images_per_s == 6.0
    assert stats.requests.succeeded == 4


def test_counts_that_a_dead_actor_took_along_make_no_negative_rate() -> None:
    more, less = Metrics(), Metrics()
    more.add("generation_tokens_total", 100)
    less.add("generation_tokens_total", 60)
    stats = service_stats(status(111.0, scheduler_0=less), status(110.0, scheduler_0=more))
    assert stats.rates.generation_tokens_per_s == 0.0


def test_a_name_that_begins_like_another_is_not_counted_with_it() -> None:
    metrics = Metrics()
    metrics.set("prefix_cache_bytes", 5)
    metrics.set("prefix_cache_host_bytes", 7)
    cache = service_stats(status(100.0, scheduler_0=metrics)).prefix_cache
    assert (cache.num_bytes, cache.host_bytes) == (5, 7)


def test_recent_latencies_leave_out_what_came_before_and_total_ones_do_not() -> None:
    edge = Metrics()
    for _ in range(50):
        edge.observe("time_to_first_token_seconds", 9.0)
    before = status(110.0, edge_0=edge)
    for _ in range(50):
        edge.observe("time_to_first_token_seconds", 0.09)
    stats = service_stats(status(120.0, edge_0=edge), None, before)
    recent, total = stats.recent.time_to_first_token, stats.total.time_to_first_token
    assert (recent.count, total.count) == (50, 100)
    assert recent.mean_s == pytest.approx(0.09)
    assert recent.p99_s is not None
    assert 0.05 < recent.p99_s <= 0.1
    assert total.p99_s is not None
    assert 5.0 < total.p99_s <= 10.0
    assert stats.recent.period_s == 10.0
    assert stats.total.period_s == 20.0


def test_latencies_of_several_edges_are_those_of_one_service() -> None:
    edges = Metrics(), Metrics()
    edges[0].observe("inter_token_latency_seconds", 0.02)
    edges[1].observe("inter_token_latency_seconds", 0.04)
    latency = service_stats(status(100.0, edge_0=edges[0], edge_1=edges[1])).total.inter_token
    assert latency.count == 2
    assert latency.mean_s == pytest.approx(0.03)


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [
        ((4, 0, 0), 0.5, 0.5),  # evenly within the first bucket, which begins at 0
        ((0, 4, 0), 0.5, 1.5),
        ((2, 2, 0), 0.5, 1.0),
        ((0, 0, 3), 0.5, 2.0),  # above the last bound: the bound
        ((1, 0, 0), 0.99, 0.99),
        ((0, 0, 0), 0.5, None),
    ],
)
def test_a_percentile_lies_where_its_bucket_says(counts: tuple[int, ...], share: float, expected: float | None) -> None:
    found = percentile(Histogram((1.0, 2.0), counts, 0.0), share)
    assert found is expected if expected is None else found == pytest.approx(expected)


def test_an_actor_has_its_memory_and_its_mailbox() -> None:
    tower = Metrics()
    tower.set("resident_memory_bytes", 1 << 30)
    tower.set("device_memory_bytes", 1 << 31)
    tower.set("mailbox_depth", 3)
    edge, vit = service_stats(status(100.0, vit_0=tower)).actors
    assert (edge.pid, edge.resident_bytes, edge.device) == (11, 0, "cpu")
    assert (vit.resident_bytes, vit.device_bytes, vit.mailbox_depth) == (1 << 30, 1 << 31, 3)
    assert (vit.state, vit.restarts, vit.device) == ("restarting", 2, "cuda:1")


def test_the_hit_rate_is_that_of_both_tiers() -> None:
    metrics = Metrics()
    metrics.add("embedding_cache_queries_total", 8)
    metrics.add("embedding_cache_hits_total", 2)
    metrics.add("embedding_cache_host_hits_total", 4)
    assert service_stats(status(100.0, scheduler_0=metrics)).embedding_cache.hit_rate == 0.75


def test_a_prompt_token_found_in_host_memory_is_one_hit() -> None:
    metrics = Metrics()
    metrics.add("prefix_cache_queries_total", 100)
    metrics.add("prefix_cache_hits_total", 60)  # in either memory
    metrics.add("prefix_cache_host_hits_total", 50)
    cache = service_stats(status(100.0, scheduler_0=metrics)).prefix_cache
    assert (cache.hits, cache.host_hits, cache.hit_rate) == (10, 50, 0.6)


def test_a_history_compares_with_what_is_old_enough_and_keeps_no_more() -> None:
    history, metrics = StatsHistory(), Metrics()
    assert history.stats() is None
    for tick in range(1000):  # 250 s, a status every quarter of a second, 40 tokens a second
        metrics.add("generation_tokens_total", 10)
        history.add(status(100.0 + tick / 4, scheduler_0=metrics))
        stats = history.stats()
        assert stats is not None
        if tick:
            assert stats.rates.generation_tokens_per_s == pytest.approx(40.0)
    assert stats is not None
    assert RATES_PERIOD_S <= stats.rates.period_s < RATES_PERIOD_S + 1.0
    assert RECENT_PERIOD_S <= stats.recent.period_s < RECENT_PERIOD_S + 1.0
    assert len(history) <= RECENT_PERIOD_S + 2


def test_statuses_after_a_long_silence_are_compared_with_the_last_before_it() -> None:
    history, metrics = StatsHistory(), Metrics()
    history.add(status(100.0, scheduler_0=metrics))
    metrics.add("generation_tokens_total", 1000)
    history.add(status(600.0, scheduler_0=metrics))
    stats = history.stats()
    assert stats is not None
    assert stats.rates.generation_tokens_per_s == 2.0


def test_stats_are_written_as_json_and_read_back() -> None:
    metrics = Metrics()
    metrics.observe("e2e_request_latency_seconds", 1.0)
    stats = service_stats(status(100.0, edge_0=metrics))
    assert msgspec.json.decode(msgspec.json.encode(stats), type=ServiceStats) == stats


def test_histograms_of_other_bounds_are_not_added() -> None:
    mixed = MetricsSnapshot(
        {},
        {},
        {
            'e2e_request_latency_seconds{a="1"}': Histogram((1.0, 2.0), (1, 1, 0), 2.0),
            'e2e_request_latency_seconds{a="2"}': Histogram((5.0,), (7, 0), 9.0),
        },
    )
    stats = service_stats(ServiceStatus(True, (), {"edge:0": mixed}))
    assert stats.total.end_to_end.count == 2
