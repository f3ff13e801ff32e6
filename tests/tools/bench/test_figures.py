"""Arrival times in, figures out."""

from __future__ import annotations

import math

import pytest

from vlmrt.tools.bench.figures import (
    Window,
    first_token_times,
    itl_figures,
    longest_gap,
    percentile,
    span_s,
    stall_figures,
    token_gaps,
)
from vlmrt.tools.bench.replies import Reply


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
