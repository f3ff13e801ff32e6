"""Arrival times in, figures out."""

from __future__ import annotations

import itertools
import math

import pytest

from benchmarks.asks import Ask
from benchmarks.caches import Caches, caches_between
from benchmarks.client import Load, Replies, Reply
from benchmarks.figures import (
    Window,
    first_token_times,
    itl_figures,
    longest_gap,
    percentile,
    span_s,
    stall_figures,
    token_gaps,
)
from benchmarks.published import AIMS, PEER_FIGURES, floors
from benchmarks.table import gain, medians, reached, table
from benchmarks.trace import Histogram, Scrape, parse, request_lines, trace_lines
from benchmarks.workloads import NAMES, WORKLOADS, Scale, Workload, closed_loop, figures_of, pictures_of

BY_NAME = {workload.name: workload for workload in WORKLOADS}


def reply(sent_s: float, *arrivals: tuple[float, int]) -> Reply:
    return Reply(sent_s, tuple(at for at, _ in arrivals), tuple(count for _, count in arrivals))


def test_percentiles_are_linear_between_neighbours_and_none_of_nothing() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([float(value) for value in range(101)], 99) == 99.0
    assert math.isnan(percentile([], 50))


def test_a_chunk_of_several_tokens_counts_as_that_many_gaps() -> None:
    answer = reply(0.0, (1.0, 1), (1.3, 4), (1.7, 5))
    assert token_gaps([answer]) == pytest.approx([0.1, 0.1, 0.1, 0.4])
    assert itl_figures([answer])["itl_p50_ms"] == pytest.approx(100)


def test_the_first_token_is_no_gap() -> None:
    assert token_gaps([reply(0.0, (5.0, 1))]) == []
    assert first_token_times([reply(2.0, (5.0, 1)), Reply(0.0, error="500")]) == [3.0]


def test_a_gap_that_reaches_into_the_window_counts_whole() -> None:
    answer = reply(0.0, (0.0, 1), (1.0, 2), (3.0, 3), (3.5, 4), (4.5, 5), (5.0, 6))
    assert token_gaps([answer], Window(2.0, 4.0)) == [2.0, 0.5, 1.0]
    assert token_gaps([answer], Window(1.0, 3.0)) == [2.0]


def test_the_longest_gap_is_not_shared_out_among_the_tokens_that_end_it() -> None:
    answer = reply(0.0, (0.0, 1), (0.5, 2), (2.5, 12))
    assert longest_gap([answer], Window(0.0, 3.0)) == 2.0
    assert max(token_gaps([answer])) == 0.5
    assert math.isnan(longest_gap([answer], Window(5.0, 6.0)))


def test_the_stall_window_is_from_the_first_image_to_the_last_images_first_token() -> None:
    steady = reply(0.0, *((0.1 * index, index) for index in range(1, 10)), (1.5, 10), (1.6, 11), (9.0, 12))
    images = [reply(1.0, (1.4, 1), (8.0, 16)), reply(1.2, (1.55, 1))]
    figures = stall_figures([steady], images)
    assert figures["quiet_itl_p50_ms"] == pytest.approx(100)
    assert figures["itl_max_ms"] == pytest.approx(600)  # 0.9 to 1.5; what comes after 1.55 is no part of it
    assert figures["itl_p50_ms"] == pytest.approx(350)  # of 600 and 100
    assert figures["itl_p50_times_quiet"] == pytest.approx(3.5)
    assert figures["last_image_s"] == pytest.approx(0.55)
    assert figures["image_ttft_p50_ms"] == pytest.approx(375)


def test_quiet_begins_when_every_stream_has_tokens() -> None:
    early = reply(0.0, (0.1, 1), (0.9, 2), (1.0, 3), (1.1, 4), (3.0, 5))
    late = reply(0.0, (0.9, 1), (1.0, 2), (1.1, 3), (3.0, 4))
    figures = stall_figures([early, late], [reply(1.1, (2.0, 1))])
    assert figures["quiet_itl_p50_ms"] == pytest.approx(100)


def test_the_span_is_from_the_first_request_to_the_last_token() -> None:
    assert span_s([reply(1.0, (2.0, 1)), reply(0.5, (0.7, 1), (4.5, 2))]) == 4.0


def test_failed_requests_raise_no_rate() -> None:
    good, bad = reply(0.0, (1.0, 1), (2.0, 256)), Reply(0.0, (1.0,), (1,), error="cut short")
    figures = figures_of(BY_NAME["two-images-same"], Replies([good, bad], []))
    assert figures["requests_per_s"] == 0.5
    assert figures_of(BY_NAME["two-images-same"], Replies([bad], [])) == {}
    assert figures_of(BY_NAME["stall"], Replies([good], [bad])) == {}


def test_images_are_counted_not_requests() -> None:
    answers = [reply(0.0, (1.0, 1), (2.0, 256))] * 5
    assert figures_of(BY_NAME["eight-images"], Replies(answers, []))["images_per_s"] == 20


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_no_picture_is_in_two_runs_or_in_the_warm_up(workload: Workload) -> None:
    def pictures(load: Load) -> list[object]:
        return [picture for asks in load.clients for ask in asks for picture in ask.pictures]

    loads = [workload.load(Scale(), 1), workload.load(Scale(), 2), workload.warm_up(Scale(), 3)]
    found = [set(pictures(load)) for load in loads]
    assert not found[0] & found[1]
    assert not found[0] & found[2]
    if workload.name not in ("two-images-same", "text-stream", "sliding-window"):
        assert len(found[0]) == len(pictures(loads[0]))


def test_the_workloads_have_the_counts_they_say() -> None:
    counts = {
        workload.name: [
            sum(map(len, load.clients)),
            len(load.clients),
            sum(len(ask.pictures) for asks in load.clients for ask in asks),
            len(load.streams),
        ]
        for workload in WORKLOADS
        for load in [workload.load(Scale(), 0)]
    }
    assert counts == {
        "text-stream": [1, 1, 0, 0],
        "two-images-same": [100, 10, 200, 0],
        "two-images-fresh": [100, 10, 200, 0],
        "burst": [100, 100, 100, 0],
        "eight-images": [25, 10, 200, 0],
        "stall": [32, 32, 32, 8],
        "dialogue": [100, 10, 20, 0],
        "dialogue-crowd": [300, 60, 60, 0],
        "sliding-window": [240, 30, 1200, 0],
    }


def test_a_dialogue_has_one_picture_and_stays_with_one_client() -> None:
    for asks in BY_NAME["dialogue"].load(Scale(), 0).clients:
        assert [ask.turn for ask in asks] == [1, 2, 3, 4, 5] * 2
        assert [len(ask.pictures) for ask in asks] == [1, 0, 0, 0, 0] * 2
        assert {ask.num_tokens for ask in asks} == {128}


def test_a_window_gains_one_picture_and_drops_the_oldest() -> None:
    load = BY_NAME["sliding-window"].load(Scale(), 0)
    assert len(pictures_of(load)) == 30 * (5 + 7)
    for asks in load.clients:
        assert {ask.turn for ask in asks} == {1}  # no history is sent
        for before, after in itertools.pairwise(asks):
            assert after.pictures[:-1] == before.pictures[1:]
            assert after.pictures[-1] not in before.pictures


def test_no_client_is_without_a_request() -> None:
    load = closed_loop([Ask("one", 1), Ask("two", 1)], 10)
    assert load.clients == ((Ask("one", 1),), (Ask("two", 1),))


def test_gain_and_aim_look_the_way_that_is_better() -> None:
    assert gain("requests_per_s", 20.0, 10.0) == 2
    assert gain("itl_p50_ms", 2.0, 5.0) == 2.5
    assert reached("images_per_s", 120.0, 120.0)
    assert not reached("itl_max_ms", 41.0, 40.0)


def test_the_table_has_a_row_for_every_figure_and_for_failures() -> None:
    text = table("qwen2-vl-2b", {"burst": {"images_per_s": 104.0, "ttft_p50_ms": 400.0}}, {"burst": 3})
    assert "| burst | images_per_s | 104 | 52 | 2.00 |" in text
    assert "| burst | ttft_p50_ms | 400 |  |  |" in text
    assert "| burst | failed requests | 3 |" in text


def test_medians_are_taken_figure_by_figure() -> None:
    assert medians([{"a": 1.0}, {}, {"a": 3.0, "b": 5.0}]) == {"a": 2.0, "b": 5.0}


@pytest.mark.parametrize("preset", PEER_FIGURES)
def test_no_peer_and_no_aim_is_beyond_the_floor(preset: str) -> None:
    for key, floor in floors(preset).items():
        for published in (PEER_FIGURES[preset], AIMS[preset]):
            assert key[0] in NAMES
            if key in published:
                assert gain(key[1], published[key], floor) < 1


def test_turn_one_is_apart_from_the_turns_after_it() -> None:
    answers = [reply(0.0, (1.0, 1), (2.0, 2))._replace(turn=1)]
    answers += [reply(2.0, (2.0 + seconds, 1), (3.0, 2))._replace(turn=turn) for turn, seconds in ((2, 0.1), (5, 0.3))]
    figures = figures_of(BY_NAME["dialogue"], Replies(answers, []))
    assert figures["ttft_first_p50_ms"] == pytest.approx(1000)
    assert figures["ttft_later_p50_ms"] == pytest.approx(200)
    assert figures["requests_per_s"] == pytest.approx(1.0)


def scrape(**counters: float) -> Scrape:
    """Counters of which each is that of two actors."""
    return Scrape({(actor, name): value / 2 for name, value in counters.items() for actor in ("a", "b")}, {}, {})


def test_caches_are_what_moved_summed_over_actors_and_nothing_where_there_is_no_counter() -> None:
    before = scrape(prefix_cache_queries=100, prefix_cache_hits=10, images_decoded=7)
    after = scrape(
        prefix_cache_queries=300,
        prefix_cache_hits=110,
        prefix_cache_host_hits=50,
        embedding_cache_queries=8,
        embedding_cache_hits=2,
        images_decoded=13,
        images_encoded=4,
    )
    caches = caches_between(before, after, 4)
    assert caches == Caches(200, 100, 50, 0, 0, 8, 2, 0, 0, 0, 6, 4, num_pictures=4)
    assert caches.figures == {"decodes_per_picture": 1.5, "encodes_per_picture": 1.0}
    shown = "\n".join(caches.lines)
    assert "50.0% of 200 tokens hit, 25.0% from host memory" in shown
    assert "25.0% of 8 images hit, 0.0% from host memory" in shown


def test_a_server_without_our_counters_has_no_figures_of_caches() -> None:
    caches = caches_between(Scrape({}, {}, {}), Scrape({("", "vllm:prompt_tokens"): 9.0}, {}, {}), 4)
    assert caches.figures == {}
    assert "none of 0 images hit" in "\n".join(caches.lines)


METRICS = """\
# TYPE vlmrt_step_seconds histogram
vlmrt_step_seconds_bucket{actor="llm:0",le="0.001"} %d
vlmrt_step_seconds_bucket{actor="llm:0",le="0.0025"} %d
vlmrt_step_seconds_bucket{actor="llm:0",le="+Inf"} %d
vlmrt_step_seconds_sum{actor="llm:0"} %g
vlmrt_step_seconds_count{actor="llm:0"} %d
# TYPE vlmrt_images_encoded_total counter
vlmrt_images_encoded_total{actor="vit:0"} %d
"""


def test_the_trace_says_what_moved_between_two_scrapes() -> None:
    before, after = parse(METRICS % (5, 5, 5, 1.0, 5, 7)), parse(METRICS % (5, 103, 105, 1.2, 105, 7))
    moved = after.histograms["llm:0", "step_seconds"].since(before.histograms["llm:0", "step_seconds"])
    assert moved.counts == {0.001: 0.0, 0.0025: 98.0, math.inf: 100.0}
    assert moved.total == pytest.approx(0.2)
    lines = trace_lines(before, after, {}, wall_s=0.5)
    assert len(lines) == 1
    assert "100 x mean 2.00 ms, p50 <= 2.5, p99 <= inf, 40% of the time" in lines[0]


def test_the_trace_puts_a_requests_work_beside_its_latency() -> None:
    moved = {
        ("edge:0", "time_to_first_token_seconds"): Histogram({math.inf: 4.0}, 2.0),
        ("edge:0", "e2e_request_latency_seconds"): Histogram({math.inf: 4.0}, 4.0),
        ("media:0", "decode_image_seconds"): Histogram({math.inf: 6.0}, 0.012),
        ("media:1", "decode_image_seconds"): Histogram({math.inf: 2.0}, 0.004),
        ("llm:0", "step_seconds"): Histogram({math.inf: 100.0}, 0.2),
    }
    (line,) = request_lines(moved)
    assert "first token after 500.0 ms, end after 1000.0 ms" in line
    assert "decoding 4.00 ms, tower 0.00 ms, steps 50.00 ms" in line
    assert request_lines({}) == []
