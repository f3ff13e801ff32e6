"""The spans that the scheduler hands to edges: whose time, from when to when, and told once."""

from __future__ import annotations

from tests.actors.scheduler.driver import Driver, clip, image, messages, outputs_of
from vlmrt.actors.scheduler.request_trace import MAX_SPANS, RequestTrace
from vlmrt.runtime.errors import WireError
from vlmrt.runtime.messages import DecodeFailed, Encode, MmHash, Restore, TokenOutput
from vlmrt.runtime.timeline import Span

Told = dict[tuple[str, str], tuple[str, float, float]]


def told(output: TokenOutput) -> Told:
    """(name, what) -> (actor, begin, end)."""
    found: Told = {(span.name, span.what): (span.actor, span.begin_s, span.end_s) for span in output.spans}
    assert len(found) == len(output.spans), "a span twice"
    return found


def test_a_text_request_is_told_of_its_queue_and_its_prefill_with_the_first_token() -> None:
    driver = Driver()
    driver.now_s = 10.0
    driver.submit("r1", 8, max_tokens=3)
    driver.now_s = 12.0
    driver.advance()
    driver.now_s = 15.0
    (first,) = outputs_of(driver.result())
    assert told(first) == {("queue", ""): ("scheduler:0", 10.0, 12.0), ("prefill", ""): ("llm:0", 12.0, 15.0)}
    driver.now_s = 20.0
    outputs = driver.run()["r1"]
    assert [output.spans for output in outputs] == [(), ()]
    assert outputs[-1].finish_reason == "length"


def test_a_request_of_one_token_is_told_with_its_end() -> None:
    driver = Driver()
    driver.submit("r1", 8, max_tokens=1)
    driver.advance()
    (only,) = outputs_of(driver.result())
    assert only.finish_reason == "length"
    assert [span.name for span in only.spans] == ["queue", "prefill"]


def test_a_picture_is_followed_from_decoder_to_the_step_that_reads_it() -> None:
    driver = Driver()
    driver.submit("r1", 10, (image("a", 0, 4),))
    driver.now_s = 3.0  # decoded from 2 to 3
    (encode,) = messages(driver.pixels("a"), Encode)
    driver.now_s = 6.0  # encoded from 5 to 6
    driver.embeds(encode)
    driver.now_s = 7.0
    driver.advance()
    driver.now_s = 9.0
    (first,) = outputs_of(driver.result())
    assert told(first) == {
        ("decode_wait", "a"): ("scheduler:0", 0.0, 2.0),
        ("decode_media", "a"): ("media:0", 2.0, 3.0),
        ("encode_wait", "a"): ("scheduler:0", 3.0, 5.0),
        ("encode", "a"): ("vit:0", 5.0, 6.0),
        ("hand_off", "a"): ("scheduler:0", 6.0, 7.0),
        ("media_wait", ""): ("scheduler:0", 0.0, 6.0),
        ("queue", ""): ("scheduler:0", 0.0, 7.0),
        ("prefill", ""): ("llm:0", 7.0, 9.0),
    }


def test_of_work_begun_for_another_a_request_is_told_what_it_waited_for() -> None:
    driver = Driver()
    driver.submit("r1", 10, (image("a", 0, 4),))
    driver.now_s = 3.0
    (encode,) = messages(driver.pixels("a"), Encode)
    driver.now_s = 5.5
    driver.submit("r2", 12, (image("a", 0, 4),))
    driver.now_s = 6.0  # encoded from 5 on
    driver.embeds(encode)
    driver.advance()
    second = next(output for output in outputs_of(driver.result()) if output.request_id == "r2")
    assert told(second)["encode", "a"] == ("vit:0", 5.5, 6.0)
    assert ("decode_media", "a") not in told(second)
    assert ("decode_wait", "a") not in told(second)


def test_a_cached_picture_has_no_spans() -> None:
    driver = Driver()
    driver.submit("r1", 10, (image("a", 0, 4),), max_tokens=1)
    driver.make_ready("a")
    driver.run()
    driver.submit("r2", [5] * 12, (image("a", 4, 4),), max_tokens=1)
    (only,) = driver.run()["r2"]
    assert [span.name for span in only.spans] == ["queue", "prefill"]


def test_the_groups_of_a_clip_are_one_span_each_kind() -> None:
    driver = Driver()
    driver.submit("r1", 14, clip("c", 0, 3))
    for group in range(3):
        driver.now_s += 2.0  # each is decoded in the second before
        (encode,) = messages(driver.pixels(f"c{group}"), Encode)
        driver.embeds(encode)
    driver.advance()
    (first,) = outputs_of(driver.result())
    spans = told(first)
    assert {what for _, what in spans} == {"c0", ""}
    assert spans["decode_media", "c0"] == ("media:0", 1.0, 6.0)
    assert spans["encode", "c0"] == ("vit:0", 1.0, 6.0)
    assert spans["media_wait", ""] == ("scheduler:0", 0.0, 6.0)


def test_rows_from_host_memory_are_told_as_a_restore() -> None:
    driver = Driver(num_pages=2, num_host_pages=8)
    driver.submit("r1", 10, (image("a", 0, 4),), max_tokens=1)
    driver.make_ready("a")
    driver.run()
    driver.submit("r2", [5] * 10, (image("b", 4, 4),), max_tokens=1)
    driver.make_ready("b")  # takes the pages of a
    driver.run()
    driver.now_s = 5.0
    (restore,) = messages(driver.submit("r3", [6] * 10, (image("a", 4, 4),), max_tokens=1), Restore)
    driver.now_s = 8.0
    driver.restored(restore)
    driver.now_s = 9.0
    (only,) = driver.run()["r3"]
    spans = told(only)
    assert spans["restore", "a"] == ("vit:0", 7.0, 8.0)
    assert spans["hand_off", "a"] == ("scheduler:0", 8.0, 9.0)
    assert ("decode_media", "a") not in spans


def test_a_request_that_fails_while_it_waits_tells_how_long_it_did() -> None:
    driver = Driver()
    driver.submit("r1", 10, (image("a", 0, 4),))
    driver.now_s = 4.0
    (failed,) = outputs_of(driver.event("media:0", DecodeFailed(MmHash("a"), WireError(400, "broken"))))
    assert failed.error is not None
    assert told(failed) == {("queue", ""): ("scheduler:0", 0.0, 4.0)}


def test_a_request_recomputed_after_its_first_token_is_told_of_no_second_queue() -> None:
    driver = Driver()
    driver.submit("r1", 8, max_tokens=4)
    driver.advance()
    driver.result()
    driver.down("llm:0")
    driver.llm_up(epoch=2)
    outputs = driver.run()["r1"]
    assert outputs[-1].finish_reason == "length"
    assert all(output.spans == () for output in outputs)


def test_a_trace_holds_so_many_spans_and_no_more() -> None:
    trace = RequestTrace(0.0)
    for number in range(MAX_SPANS):
        spans = [Span("encode_wait", "scheduler:0", 1.0, 2.0), Span("encode", "vit:0", 2.0, 3.0)]
        trace.on_media(MmHash(f"{number:08}"), MmHash(f"{number:08}"), spans, 3.0)
    assert len(trace.take()) == MAX_SPANS
    assert trace.take() == ()
