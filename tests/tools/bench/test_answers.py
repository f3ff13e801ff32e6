"""Bytes of an answer in, arrivals of tokens out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.tools.bench.chunks import chunk
from vlmrt.tools.bench.answers import Answer, CountedBy

END = b"data: [DONE]\n\n"


def text_chunk(text: str | None, **delta: Any) -> bytes:
    """One without a count."""
    said = {"choices": [{"index": 0, "delta": {"content": text, **delta}, "logprobs": None}], "usage": None}
    return b"data: " + json.dumps(said).encode() + b"\n\n"


def last_usage(num_tokens: int) -> bytes:
    usage = {"prompt_tokens": 5, "completion_tokens": num_tokens}
    return b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n"


WITH_COUNTS = b"".join(chunk("x", count) for count in (1, 2, 5)) + END
AT_THE_END = text_chunk("") + text_chunk("a") + text_chunk("b\n\ndata: {}") + last_usage(7) + END
NO_COUNTS = text_chunk("a") + text_chunk("b") + END


@pytest.mark.parametrize(
    ("data", "count", "way", "told"),
    [(WITH_COUNTS, 5, "usage", 5), (AT_THE_END, 2, "chunks", 7), (NO_COUNTS, 2, "chunks", None)],
)
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_counts_survive_any_cut_of_the_bytes(
    data: bytes, count: int, way: CountedBy, told: int | None, newline: bytes
) -> None:
    data = data.replace(b"\n", newline)
    for cut in range(len(data) + 1):
        answer = Answer()
        for number, piece in enumerate((data[:cut], data[cut:])):
            answer.push(piece, float(number))
        assert answer.end() == data
        assert (answer.count, answer.counted_by, answer.usage_tokens) == (count, way, told)
        assert (answer.done, answer.error) == (True, None)


def test_each_arrival_has_its_time_and_the_tokens_so_far() -> None:
    answer = Answer()
    pieces = (chunk("x", 1), chunk("", 2)[:9], chunk("", 2)[9:], chunk("x", 3) + chunk("x", 6), END)
    for number, piece in enumerate(pieces):
        answer.push(piece, float(number))
    assert answer.times_s == [0.0, 2.0, 3.0]
    assert answer.num_tokens == [1, 2, 6]


@pytest.mark.parametrize("digits", [8, 30, 5000])
def test_a_number_that_is_no_count_of_tokens_is_left_out(digits: int) -> None:
    usage = b'data: {"usage": {"prompt_tokens": 9%s, "completion_tokens": 9%s}}\n\n' % ((b"9" * digits,) * 2)
    answer = Answer()
    answer.push(text_chunk("a"), 0.0)
    answer.push(text_chunk("b") + usage + END, 1.0)
    answer.end()
    assert (answer.num_tokens, answer.usage_tokens, answer.done) == ([1, 2], None, True)
    assert answer.prompt_tokens == (999_999_999 if digits == 8 else None)


def test_a_role_without_text_is_no_token() -> None:
    answer = Answer()
    answer.push(text_chunk("", role="assistant"), 1.0)
    answer.push(text_chunk(None), 2.0)
    assert answer.times_s == []
    answer.push(text_chunk("Hello"), 3.0)
    assert answer.times_s == [3.0]


def test_a_role_with_a_count_of_nothing_leaves_the_way_of_counting_open() -> None:
    answer = Answer()
    answer.push(chunk("", 0), 1.0)
    assert (answer.times_s, answer.counted_by) == ([], None)
    answer.push(chunk("a", 1), 2.0)
    assert (answer.times_s, answer.counted_by) == ([2.0], "usage")


def test_thoughts_and_arguments_of_calls_are_tokens_too() -> None:
    answer = Answer()
    answer.push(text_chunk(None, reasoning_content="Hm"), 1.0)
    call = {"index": 0, "function": {"name": "f", "arguments": "{"}}
    answer.push(text_chunk(None, tool_calls=[call]), 2.0)
    assert answer.num_tokens == [1, 2]


def test_what_looks_like_a_count_in_the_text_is_text() -> None:
    answer = Answer()
    answer.push(text_chunk('"completion_tokens": 99, {"error": 1}\ndata: [DONE]\n') + text_chunk('"content": "x"'), 1.0)
    answer.end()
    assert (answer.count, answer.usage_tokens, answer.done, answer.error) == (2, None, False, None)


def test_an_error_within_the_stream_is_kept_and_so_is_a_missing_end() -> None:
    answer = Answer()
    answer.push(chunk("x", 1) + b'data: {"error": {"message": "the tower burnt down"}}\n\n', 1.0)
    assert answer.error == '{"error": {"message": "the tower burnt down"}}'
    assert not answer.done


def test_all_tokens_at_once_without_text_come_with_the_last_count() -> None:
    answer = Answer()
    answer.push(last_usage(3) + END, 4.0)
    assert (answer.times_s, answer.num_tokens) == ([4.0], [3])
