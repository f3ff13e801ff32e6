"""Arrival times in, figures out."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from benchmarks.published import AIMS, PEER_FIGURES, floors
from benchmarks.table import gain, medians, reached, table
from benchmarks.workloads import NAMES, WORKLOADS, Scale, Workload, closed_loop, figures_of, pictures_of
from vlmrt.tools.bench.asks import Ask
from vlmrt.tools.bench.replies import Load, Replies, Reply

BY_NAME = {workload.name: workload for workload in WORKLOADS}


def reply(sent_s: float, *arrivals: tuple[float, int]) -> Reply:
    return Reply(sent_s, tuple(at for at, _ in arrivals), tuple(count for _, count in arrivals))


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
        return [picture for asks in load.clients for ask in asks for picture in ask.media]

    loads = [workload.load(Scale(), 1), workload.load(Scale(), 2), workload.warm_up(Scale(), 3)]
    found = [set(pictures(load)) for load in loads]
    assert not found[0] & found[1]
    assert not found[0] & found[2]
    if workload.name not in ("two-images-same", "text-stream", "sliding-window", "clips-same"):
        assert len(found[0]) == len(pictures(loads[0]))


def test_the_workloads_have_the_counts_they_say() -> None:
    counts = {
        workload.name: [
            sum(map(len, load.clients)),
            len(load.clients),
            sum(len(ask.media) for asks in load.clients for ask in asks),
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
        "clips": [30, 10, 30, 0],
        "clips-same": [100, 10, 100, 0],
        "one-clip": [8, 1, 8, 0],
        "one-group": [8, 1, 8, 0],
    }


def test_a_dialogue_has_one_picture_and_stays_with_one_client() -> None:
    for asks in BY_NAME["dialogue"].load(Scale(), 0).clients:
        assert [ask.turn for ask in asks] == [1, 2, 3, 4, 5] * 2
        assert [len(ask.media) for ask in asks] == [1, 0, 0, 0, 0] * 2
        assert {ask.num_tokens for ask in asks} == {128}


def test_a_window_gains_one_picture_and_drops_the_oldest() -> None:
    load = BY_NAME["sliding-window"].load(Scale(), 0)
    assert len(pictures_of(load)) == 30 * (5 + 7)
    for asks in load.clients:
        assert {ask.turn for ask in asks} == {1}  # no history is sent
        for before, after in itertools.pairwise(asks):
            assert after.media[:-1] == before.media[1:]
            assert after.media[-1] not in before.media


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
    answers = [reply(0.0, (1.0, 1), (2.0, 2))]
    for turn, seconds in ((2, 0.1), (5, 0.3)):
        answers.append(msgspec.structs.replace(reply(2.0, (2.0 + seconds, 1), (3.0, 2)), turn=turn))
    figures = figures_of(BY_NAME["dialogue"], Replies(answers, []))
    assert figures["ttft_first_p50_ms"] == pytest.approx(1000)
    assert figures["ttft_later_p50_ms"] == pytest.approx(200)
    assert figures["requests_per_s"] == pytest.approx(1.0)
