"""What a server counts before and after a load -> where its time went."""

from __future__ import annotations

import math

import pytest

from vlmrt.tools.bench.caches import Caches, caches_between
from vlmrt.tools.bench.trace import Histogram, Scrape, parse, request_lines, trace_lines


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
        embedding_cache_hits=2,  # on the device alone, unlike those of prefixes
        embedding_cache_host_hits=4,
        images_decoded=13,
        images_encoded=4,
    )
    caches = caches_between(before, after, 4)
    assert caches == Caches(200, 100, 50, 0, 0, 8, 6, 4, 0, 0, 6, 4, num_pictures=4)
    assert caches.figures == {"decodes_per_picture": 1.5, "encodes_per_picture": 1.0}
    shown = "\n".join(caches.lines)
    assert "50.0% of 200 tokens hit, 25.0% from host memory" in shown
    assert "75.0% of 8 images hit, 50.0% from host memory" in shown


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
