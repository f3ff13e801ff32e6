"""Scripted arrival times in, the fields of a result out."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest

from vlmrt.tools.bench.replies import Replies, Reply
from vlmrt.tools.bench.summary import num_within, open_requests, per_request, summary, tokens_by_second

PERCENTILES = (90.0, 99.0, 99.9)


def reply(sent_s: float, *times_s: float, tokens: tuple[int, ...] = (), **fields: object) -> Reply:
    """One token for each time, unless `tokens` says how many there are so far."""
    counts = tokens or tuple(range(1, len(times_s) + 1))
    end_s = times_s[-1] if times_s else sent_s + 1.0
    made = Reply(sent_s, times_s, counts, end_s=end_s, prompt_tokens=10, asked_tokens=counts[-1] if counts else 1)
    return msgspec.structs.replace(made, **fields)


FIRST = reply(0.0, 0.1, 0.2, 0.4)  # ttft 100, tpot 150, gaps 100 and 200, e2el 400
SECOND = reply(1.0, 1.3, 1.5, num_images=2)  # ttft 300, tpot 200, gap 200, e2el 500
FAILED = Reply(0.5, end_s=4.0, error="429: no room", error_kind="HTTP 429", asked_tokens=3)


def test_every_latency_is_as_defined() -> None:
    result = summary(Replies([SECOND, FIRST], []), {}, PERCENTILES)
    assert result["mean_ttft_ms"] == pytest.approx(200)
    assert result["std_ttft_ms"] == pytest.approx(100)
    assert result["mean_tpot_ms"] == pytest.approx(175)
    assert result["mean_itl_ms"] == pytest.approx(500 / 3)
    assert result["median_itl_ms"] == pytest.approx(200)
    assert result["mean_e2el_ms"] == pytest.approx(450)
    assert result["median_silence_ms"] == pytest.approx(200)
    for name, samples in (("ttft", (100, 300)), ("itl", (100, 200, 200)), ("e2el", (400, 500))):
        for percent, word in ((90, "p90"), (99, "p99"), (99.9, "p99.9")):
            assert result[f"{word}_{name}_ms"] == pytest.approx(np.percentile(samples, percent))


def test_rates_are_over_the_time_from_the_first_request_to_the_end_of_the_last() -> None:
    result = summary(Replies([FIRST, SECOND], []), {}, PERCENTILES)
    assert result["duration"] == pytest.approx(1.5)
    assert result["request_throughput"] == pytest.approx(2 / 1.5)
    assert result["output_throughput"] == pytest.approx(5 / 1.5)
    assert result["total_token_throughput"] == pytest.approx(25 / 1.5)
    assert result["image_throughput"] == pytest.approx(2 / 1.5)
    assert (result["total_input_tokens"], result["total_output_tokens"], result["total_images"]) == (20, 5, 2)


def test_failures_raise_no_rate_and_are_counted_by_kind_with_their_words() -> None:
    lost = msgspec.structs.replace(FAILED, error="cut", error_kind="ClientPayloadError")
    result = summary(Replies([FIRST, FAILED, FAILED, lost], []), {}, PERCENTILES)
    assert (result["completed"], result["failed"]) == (1, 3)
    assert result["duration"] == pytest.approx(4.0)
    assert result["request_throughput"] == pytest.approx(1 / 4)
    assert result["errors_by_kind"] == {"HTTP 429": 2, "ClientPayloadError": 1}
    assert result["first_errors"]["HTTP 429"] == "429: no room"
    assert result["mean_ttft_ms"] == pytest.approx(100)


def test_a_run_without_an_answer_has_no_latency_and_is_still_json() -> None:
    result = summary(Replies([FAILED], []), {"ttft": 100.0}, PERCENTILES)
    assert (result["mean_ttft_ms"], result["p99_itl_ms"]) == (None, None)
    assert (result["request_throughput"], result["request_goodput"]) == (0.0, 0.0)
    json.dumps(result, allow_nan=False)


def test_good_requests_meet_every_objective() -> None:
    assert num_within([FIRST, SECOND], {"ttft": 250.0}) == 1
    assert num_within([FIRST, SECOND], {"ttft": 301.0, "tpot": 160.0}) == 1
    assert num_within([FIRST, SECOND], {"ttft": 301.0, "tpot": 201.0, "e2el": 501.0}) == 2
    assert num_within([reply(0.0, 0.1)], {"tpot": 0.0}) == 1  # one token has no time per token after it
    assert summary(Replies([FIRST, SECOND], []), {}, PERCENTILES)["request_goodput"] is None


def test_tokens_that_share_a_chunk_share_its_gap() -> None:
    result = summary(Replies([reply(0.0, 1.0, 1.6, tokens=(1, 4))], []), {}, PERCENTILES)
    assert result["mean_itl_ms"] == pytest.approx(200)
    assert result["median_silence_ms"] == pytest.approx(600)
    assert result["mean_tpot_ms"] == pytest.approx(200)


def test_the_servers_count_of_an_answer_goes_before_the_number_of_chunks() -> None:
    two_chunks = reply(0.0, 1.0, 2.0, answer_tokens=5, counted_by="chunks")
    result = summary(Replies([two_chunks], []), {}, PERCENTILES)
    assert result["total_output_tokens"] == 5
    assert result["mean_tpot_ms"] == pytest.approx(250)
    assert result["mean_itl_ms"] == pytest.approx(1000)  # of chunks, and it says so
    assert result["itl_of"] == "chunks with text (2 of them, 5 tokens by the server)"


def test_the_result_says_what_an_itl_is_of() -> None:
    assert "as the server counts them" in summary(Replies([FIRST], []), {}, PERCENTILES)["itl_of"]
    mixed = [FIRST, msgspec.structs.replace(SECOND, counted_by="chunks")]
    said = summary(Replies(mixed, []), {}, PERCENTILES)["itl_of"]
    assert "in 1 answers; chunks with text (2 of them, whose tokens nobody counted) in 1 answers" in said


def test_short_answers_are_counted() -> None:
    short = msgspec.structs.replace(FIRST, asked_tokens=9)
    assert summary(Replies([short, SECOND], []), {}, PERCENTILES)["short_answers"] == 1


def test_a_failed_stream_is_not_hidden_behind_answered_requests() -> None:
    result = summary(Replies([FIRST], [FAILED]), {}, PERCENTILES)
    assert (result["failed"], result["failed_streams"]) == (0, 1)
    assert result["errors_by_kind"] == {"HTTP 429": 1}


def test_most_at_once_is_exact_and_a_request_that_begins_as_one_ends_is_not_beside_it() -> None:
    replies = [reply(0.0, 2.0), reply(1.0, 1.5), reply(2.0, 3.0)]
    assert [count for _, count in open_requests(replies)] == [1, 2, 1, 0, 1, 0]
    assert summary(Replies(replies, []), {}, PERCENTILES)["max_concurrent_requests"] == 2


def test_tokens_are_counted_in_the_second_they_came_in() -> None:
    assert tokens_by_second([reply(5.0, 5.5, 5.9, 7.1, tokens=(1, 4, 6))]) == [4.0, 0.0, 2.0]
    assert tokens_by_second([]) == []


VLLM_FIELDS = """duration completed failed total_input_tokens total_output_tokens request_throughput request_goodput
output_throughput total_token_throughput max_output_tokens_per_s max_concurrent_requests mean_ttft_ms median_ttft_ms
std_ttft_ms p99_ttft_ms mean_tpot_ms median_tpot_ms std_tpot_ms p99_tpot_ms mean_itl_ms median_itl_ms std_itl_ms
p99_itl_ms mean_e2el_ms median_e2el_ms std_e2el_ms p99_e2el_ms""".split()  # of vllm bench serve 0.32.0
VLLM_LISTS = "input_lens output_lens start_times ttfts itls latencies queue_times errors".split()


def test_fields_have_the_names_of_vllms_benchmark() -> None:
    result = summary(Replies([FIRST, FAILED], []), {"ttft": 500.0}, PERCENTILES)
    assert not set(VLLM_FIELDS) - set(result)
    lists = per_request(Replies([FIRST, FAILED], []))
    assert set(lists) == set(VLLM_LISTS)
    assert all(len(values) == 2 for values in lists.values())
    assert lists["ttfts"] == pytest.approx([0.1, 0.0])
    assert lists["itls"] == [pytest.approx([0.1, 0.2]), []]
    assert lists["errors"] == ["", "429: no room"]
