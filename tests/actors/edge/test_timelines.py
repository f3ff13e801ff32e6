"""The timelines of an edge: what they hold of open and ended requests, how many are kept, what is counted."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from tests.actors.edge.raw import connection
from tests.actors.edge.running import RunningEdge, http
from tests.pictures import picture
from vlmrt.actors.edge.timelines import MAX_ENDED, MAX_SPANS, Timelines
from vlmrt.runtime.errors import WireError
from vlmrt.runtime.messages import ActorName
from vlmrt.runtime.metrics import Metrics
from vlmrt.runtime.timeline import Span, SpanName, Timeline

EDGE = ActorName("edge:0")
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]


def queue(seconds: float) -> Span:
    return Span("queue", "scheduler:0", 0.0, seconds)


def num_counted(metrics: Metrics, name: str) -> int:
    histogram = metrics.snapshot().histograms.get(name)
    return sum(histogram.counts) if histogram is not None else 0


async def ended(edge: RunningEdge, id: str) -> Timeline:
    async with asyncio.timeout(10):
        while (found := edge.actor.timelines.find(id)) is None or found.end_s is None:  # noqa: ASYNC110  nothing announces it
            await asyncio.sleep(0)
    return found


async def shown(edge: RunningEdge) -> Timeline:
    """The one open timeline, once the first token has reached the answer."""
    async with asyncio.timeout(10):
        while (found := edge.actor.timelines.open()[0]).first_token_s is None:  # noqa: ASYNC110  nothing announces it
            await asyncio.sleep(0)
    return found


async def post(edge: RunningEdge, body: dict[str, Any], label: str, **headers: str) -> tuple[int, Any]:
    async with http() as session:
        url = f"{edge.url}/v1/chat/completions"
        async with session.post(url, json=body, headers={"x-request-id": label, **headers}) as response:
            return response.status, await response.json()


def names(timeline: Timeline) -> list[SpanName]:
    return [span.name for span in timeline.spans]


# ---------------------------------------------------------------- a request's timeline


async def test_a_request_is_open_until_it_is_answered_and_can_be_found_by_either_id(edge: RunningEdge) -> None:
    begun_s = time.monotonic()
    task = asyncio.create_task(post(edge, {"messages": HELLO}, "mine"))
    submit = await edge.submitted()
    (open_one,) = edge.actor.timelines.open()
    assert (open_one.label, open_one.path, open_one.end_s) == ("mine", "/v1/chat/completions", None)
    assert open_one.answer_id == submit.request_id
    assert open_one.num_prompt_tokens == len(submit.prompt_token_ids)
    assert names(open_one) == ["receive", "prompt"]

    spans = (queue(0.25), Span("prefill", "llm:0", 0.25, 1.0))
    await edge.output(submit, edge.ids("Hi"), num_output_tokens=1, num_cached_tokens=3, spans=spans)
    open_one = await shown(edge)
    assert set(spans) <= set(open_one.spans)
    assert (open_one.num_cached_tokens, open_one.num_output_tokens) == (3, len(edge.ids("Hi")))
    await edge.output(submit, edge.ids("!"), "stop", num_output_tokens=2, num_cached_tokens=3)
    status, answer = await task
    assert status == 200

    found = await ended(edge, "mine")
    assert edge.actor.timelines.find(answer["id"]) == found
    assert edge.actor.timelines.open() == ()
    assert found.outcome == "stop"
    assert (found.num_cached_tokens, found.num_output_tokens) == (3, len(edge.ids("Hi")) + 1)
    assert found.first_token_s is not None
    assert found.end_s is not None
    assert begun_s <= found.arrived_s <= found.first_token_s <= found.end_s <= time.monotonic()
    assert abs(time.time() - time.monotonic() - (found.arrived_at_s - found.arrived_s)) < 1
    decode = next(span for span in found.spans if span.name == "decode")
    assert 0 < decode.duration_s == found.max_gap_s
    snapshot = edge.context.metrics.snapshot()
    assert snapshot.histograms["request_queue_time_seconds"].total == 0.25
    assert snapshot.histograms["request_prefill_time_seconds"].total == 0.75
    assert snapshot.histograms["request_decode_time_seconds"].total == pytest.approx(decode.duration_s)
    assert snapshot.histograms["max_inter_token_gap_seconds"].total == pytest.approx(found.max_gap_s)
    assert snapshot.histograms["request_prompt_tokens"].total == len(submit.prompt_token_ids)
    assert snapshot.histograms["request_generation_tokens"].total == found.num_output_tokens


async def test_every_picture_is_fetched_and_hashed_in_spans_of_its_own(edge: RunningEdge) -> None:
    content = [picture(0).part, picture(1).part, {"type": "text", "text": "What?"}]
    body = {"messages": [{"role": "user", "content": content}]}
    async with edge.answering("A shape."):
        status, _ = await post(edge, body, "pictures")
    assert status == 200
    found = await ended(edge, "pictures")
    assert found.num_media == 2
    for name in ("fetch", "identify"):
        whats = {span.what for span in found.spans if span.name == name}
        assert whats == {f"messages[0].content[{index}].image_url.url" for index in range(2)}
    assert num_counted(edge.context.metrics, "media_fetch_seconds") == 2
    assert num_counted(edge.context.metrics, "media_hash_seconds") == 2
    assert num_counted(edge.context.metrics, "prompt_seconds") == 1


async def test_the_spans_of_further_choices_bear_their_number(edge: RunningEdge) -> None:
    task = asyncio.create_task(post(edge, {"messages": HELLO, "n": 2}, "two"))
    first = await edge.submitted()
    await edge.output(first, edge.ids("Hi"), "stop", spans=(queue(1.0),))
    second = await edge.submitted()
    await edge.output(second, edge.ids("Hi"), "stop", spans=(queue(2.0), Span("encode", "vit:0", 0.0, 1.0, "ab")))
    assert (await task)[0] == 200
    spans = (await ended(edge, "two")).spans
    scheduled = {(span.name, span.what, span.end_s) for span in spans if span.actor != EDGE and span.name != "decode"}
    assert scheduled == {("queue", "", 1.0), ("queue", "choice 1", 2.0), ("encode", "choice 1 ab", 1.0)}


async def test_a_streamed_answer_has_a_span_from_its_first_byte_to_its_last(edge: RunningEdge) -> None:
    async with edge.answering("some words"), http() as session:
        body = {"messages": HELLO, "stream": True}
        url = f"{edge.url}/v1/chat/completions"
        async with session.post(url, json=body, headers={"x-request-id": "streamed"}) as response:
            await response.read()
    found = await ended(edge, "streamed")
    stream = next(span for span in found.spans if span.name == "stream")
    assert found.first_token_s is not None
    assert found.end_s is not None
    assert found.first_token_s <= stream.begin_s < stream.end_s <= found.end_s


# ---------------------------------------------------------------- how it ended


async def test_an_error_of_the_scheduler_is_the_outcome_and_its_spans_are_kept(edge: RunningEdge) -> None:
    task = asyncio.create_task(post(edge, {"messages": HELLO}, "failed"))
    submit = await edge.submitted()
    await edge.output(submit, error=WireError(503, "no memory", "out_of_memory"), spans=(queue(0.5),))
    assert (await task)[0] == 503
    found = await ended(edge, "failed")
    assert found.outcome == "out_of_memory"
    assert queue(0.5) in found.spans
    assert found.first_token_s is None


async def test_a_stream_that_breaks_has_the_error_as_its_outcome(edge: RunningEdge) -> None:
    async with http() as session:
        url, body = f"{edge.url}/v1/chat/completions", {"messages": HELLO, "stream": True}
        task = asyncio.create_task(session.post(url, json=body, headers={"x-request-id": "broken"}))
        submit = await edge.submitted()
        await edge.output(submit, edge.ids("Hi"), num_output_tokens=1)
        response = await task
        await edge.output(submit, error=WireError(500, "gone", "llm_group_died"))
        await response.read()
    assert (await ended(edge, "broken")).outcome == "llm_group_died"


async def test_a_refused_request_has_a_timeline_without_an_answer(edge: RunningEdge) -> None:
    assert (await post(edge, {"messages": HELLO, "temperature": -1}, "wrong"))[0] == 400
    found = await ended(edge, "wrong")
    assert found.outcome == "invalid_value"
    assert found.answer_id == ""
    assert names(found) == ["receive"]


async def test_a_client_that_goes_leaves_an_aborted_timeline(edge: RunningEdge) -> None:
    async with connection(edge.port) as raw:
        await raw.post({"messages": HELLO, "stream": True})
        submit = await edge.submitted()
    await edge.aborted()
    found = await ended(edge, submit.request_id)
    assert found.outcome == "aborted"


async def test_traceparents_that_are_none_are_not_kept(edge: RunningEdge) -> None:
    good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    async with edge.answering("Hi"):
        for number, header in enumerate((good, good.upper(), good.replace("00f067aa0ba902b7", "0" * 16), "00-1-2-3")):
            await post(edge, {"messages": HELLO}, f"traced-{number}", traceparent=header)
    kept = [(await ended(edge, f"traced-{number}")).traceparent for number in range(4)]
    assert kept == [good, "", "", ""]


# ---------------------------------------------------------------- the ring


def test_the_newest_that_ended_are_kept_and_each_is_told_of_once() -> None:
    told: list[Timeline] = []
    timelines = Timelines(EDGE, Metrics(), told.append)
    for number in range(MAX_ENDED + 3):
        with timelines.timeline(f"r{number}", "/"):
            assert timelines.find(f"r{number}") is not None
    assert [timeline.label for timeline in told] == [f"r{number}" for number in range(MAX_ENDED + 3)]
    assert timelines.find("r2") is None
    assert timelines.find("r3") is not None
    assert timelines.find("") is None


def test_of_two_requests_of_one_name_the_newer_is_found() -> None:
    timelines = Timelines(EDGE, Metrics())
    with timelines.timeline("same", "/first"):
        pass
    with timelines.timeline("same", "/second"), timelines.timeline("same", "/third"):
        assert [timeline.path for timeline in timelines.open()] == ["/second", "/third"]
        found = timelines.find("same")
        assert found is not None
        assert found.path == "/third"
    found = timelines.find("same")
    assert found is not None
    assert found.path == "/second"


def test_spans_beyond_the_bound_are_counted_and_dropped() -> None:
    metrics = Metrics()
    timelines = Timelines(EDGE, metrics)
    with timelines.timeline("r", "/") as timeline:
        timeline.extend(queue(1.0) for _ in range(MAX_SPANS + 5))
    found = timelines.find("r")
    assert found is not None
    assert (len(found.spans), found.num_lost_spans) == (MAX_SPANS, 5)
    assert num_counted(metrics, "request_queue_time_seconds") == MAX_SPANS + 5


def test_spans_are_counted_in_the_histograms_that_no_actor_fills_itself() -> None:
    metrics = Metrics()
    timelines = Timelines(EDGE, metrics)
    with timelines.timeline("r", "/") as timeline:
        timeline.extend((Span("restore", "vit:0", 1.0, 3.0, "ab"), Span("encode", "vit:0", 1.0, 2.0, "cd")))
    histograms = metrics.snapshot().histograms
    assert histograms["restore_seconds"].total == 2.0
    assert "encode_seconds" not in histograms  # the ViT's


def test_a_block_that_raises_is_a_span_all_the_same() -> None:
    timelines = Timelines(EDGE, Metrics())
    with pytest.raises(RuntimeError), timelines.timeline("r", "/") as timeline, timeline.span("fetch", "x"):
        raise RuntimeError
    found = timelines.find("r")
    assert found is not None
    assert [(span.name, span.what) for span in found.spans] == [("fetch", "x")]
