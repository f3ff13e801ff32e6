"""What the service's operator does to an edge: looks at its open requests, cancels them, drains it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest

from tests.actors.edge.raw import connection, silent_host
from tests.actors.edge.running import MODEL, RunningEdge, edge_config, http, running_edge, service_status
from tests.actors.edge.test_life import HELLO, STREAM, WHOLE, gone, until
from vlmrt.runtime.config import ServerOptions
from vlmrt.runtime.questions import (
    AnswersOpen,
    Cancelled,
    CancelRequest,
    Finding,
    FindTimeline,
    ListRequests,
    ShowCaches,
    TimelineFound,
)

CHAT = "/v1/chat/completions"


async def open_answers(edge: RunningEdge) -> AnswersOpen:
    found = await edge.actor.answer(ListRequests())
    assert isinstance(found, AnswersOpen)
    return found


async def cancel(edge: RunningEdge, id: str) -> Finding | None:
    return await edge.actor.answer(CancelRequest(id))


async def drain(edge: RunningEdge, draining: bool = True) -> None:
    await edge.actor.status(msgspec.structs.replace(service_status(), draining=draining))


def error_of(body: bytes) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(body)["error"]
    return error


# ---------------------------------------------------------------- looking


async def test_an_open_request_is_shown_by_its_label_its_answer_and_its_choices(edge: RunningEdge) -> None:
    assert await open_answers(edge) == AnswersOpen((), 0)
    async with connection(edge.port) as raw:
        await raw.post({**STREAM, "n": 2}, x_request_id="mine")
        submit = await edge.submitted()
        (row,) = (await open_answers(edge)).rows
        assert (row.label, row.path, row.streams, row.request_ids) == ("mine", CHAT, True, (submit.request_id,))
        assert row.answer_id == submit.request_id
        assert row.age_s > 0
        await edge.output(submit, edge.ids("some"))
        second = await edge.submitted()
        assert (await open_answers(edge)).rows[0].request_ids == (submit.request_id, second.request_id)
    await gone(edge)
    await until(lambda: not edge.actor._open_answers)


async def test_a_request_whose_body_is_still_coming_is_shown_without_an_answer(edge: RunningEdge) -> None:
    async with connection(edge.port) as raw:
        await raw.send_head(1000, x_request_id="slow")
        await until(lambda: len(edge.actor._open_answers) == 1)
        (row,) = (await open_answers(edge)).rows
        assert (row.label, row.answer_id, row.request_ids) == ("slow", "", ())


async def test_a_request_is_traced_while_it_runs_and_after(edge: RunningEdge) -> None:
    async with connection(edge.port) as raw:
        await raw.post(WHOLE, x_request_id="mine")
        submit = await edge.submitted()
        found = await edge.actor.answer(FindTimeline(submit.request_id))
        assert isinstance(found, TimelineFound)
        assert found.timeline is not None
        assert (found.timeline.label, found.timeline.end_s) == ("mine", None)
        assert await cancel(edge, "mine") == Cancelled(1)
        await raw.head()
    await gone(edge)
    found = await edge.actor.answer(FindTimeline("mine"))
    assert isinstance(found, TimelineFound)
    assert found.timeline is not None
    assert (found.timeline.answer_id, found.timeline.outcome) == (submit.request_id, "cancelled")
    assert found.timeline.end_s is not None
    assert await edge.actor.answer(FindTimeline("other")) == TimelineFound(None)


async def test_what_is_the_schedulers_to_answer_is_not_the_edges(edge: RunningEdge) -> None:
    assert await edge.actor.answer(ShowCaches()) is None


# ---------------------------------------------------------------- cancelling


@pytest.mark.parametrize("by", ["label", "answer_id"])
async def test_a_stream_that_is_cancelled_ends_with_one_error_event_and_one_abort(edge: RunningEdge, by: str) -> None:
    async with connection(edge.port) as raw:
        await raw.post(STREAM, x_request_id="mine")
        submit = await edge.submitted()
        await edge.output(submit, edge.ids("some"))
        assert (await raw.head())[0] == 200
        assert await cancel(edge, "mine" if by == "label" else submit.request_id) == Cancelled(1)
        *_, last, done = (event for event in (await raw.body()).split(b"\n\n") if event)
        assert done == b"data: [DONE]"
        assert error_of(last.removeprefix(b"data: ")) == {
            "message": "the request was cancelled by the server's operator",
            "type": "invalid_request_error",
            "param": None,
            "code": "cancelled",
        }
        assert (await edge.aborted()).request_id == submit.request_id
    await gone(edge)
    assert edge.sent == []
    counters = edge.context.metrics.snapshot().counters
    assert counters['request_errors_total{code="cancelled"}'] == 1
    assert counters.get("requests_aborted_total", 0) == 0


@pytest.mark.parametrize(
    ("path", "body", "end"),
    [
        ("/v1/completions", {"model": MODEL, "prompt": "Hello", "max_tokens": 9}, b'data: {"error":'),
        ("/v1/responses", {"model": MODEL, "input": "Hello"}, b"event: response.failed"),
        ("/v1/messages", {"model": MODEL, "messages": HELLO, "max_tokens": 9}, b"event: error"),
    ],
)
async def test_a_stream_of_any_route_ends_with_one_error(
    path: str, body: dict[str, Any], end: bytes, edge: RunningEdge
) -> None:
    async with connection(edge.port) as raw:
        await raw.post({**body, "stream": True}, path, x_request_id="mine")
        await edge.output(await edge.submitted(), edge.ids("some"))
        assert (await raw.head())[0] == 200
        assert await cancel(edge, "mine") == Cancelled(1)
        text = await raw.body()
        assert text.count(end) == 1
        assert b"cancelled by the server's operator" in text[text.index(end) :]
        await edge.aborted()
    await gone(edge)
    assert edge.sent == []


async def test_an_answer_that_has_not_begun_is_499_and_is_not_tried_again(edge: RunningEdge) -> None:
    client = edge.client.with_options(max_retries=3)
    call = asyncio.create_task(
        client.chat.completions.create(model=MODEL, messages=HELLO, extra_headers={"x-request-id": "mine"})  # type: ignore[arg-type]
    )
    submit = await edge.submitted()
    assert await cancel(edge, "mine") == Cancelled(1)
    with pytest.raises(openai.APIStatusError) as raised:
        await call
    assert (raised.value.status_code, raised.value.code) == (499, "cancelled")
    assert (await edge.aborted()).request_id == submit.request_id
    await gone(edge)
    assert edge.sent == []  # no second try


async def test_all_choices_of_an_answer_end_together(edge: RunningEdge) -> None:
    async with connection(edge.port) as raw:
        await raw.post({**WHOLE, "n": 2}, x_request_id="mine")
        submit = await edge.submitted()
        await edge.output(submit, edge.ids("some"))
        second = await edge.submitted()
        assert await cancel(edge, second.request_id) == Cancelled(1)
        assert (await raw.head())[0] == 499
        assert {(await edge.aborted()).request_id for _ in range(2)} == {submit.request_id, second.request_id}
    await gone(edge)


async def test_choices_that_had_not_begun_when_the_answer_was_cancelled_end_with_it(edge: RunningEdge) -> None:
    async with connection(edge.port) as raw:
        await raw.post(WHOLE | {"n": 2}, x_request_id="mine")
        first = await edge.submitted()
        await edge.output(first, edge.ids("Hi"), "stop", num_output_tokens=1)  # and nobody has taken it yet
        assert await cancel(edge, "mine") == Cancelled(1)
        status, _ = await raw.head()
        assert status == 499
    await gone(edge)


async def test_a_request_is_cancelled_while_its_body_comes(edge: RunningEdge) -> None:
    async with connection(edge.port) as raw:
        await raw.send_head(1000, x_request_id="slow")
        await until(lambda: len(edge.actor._open_answers) == 1)
        assert await cancel(edge, "slow") == Cancelled(1)
        status, headers = await raw.head()
        assert (status, headers["x-request-id"], headers["x-should-retry"]) == (499, "slow", "false")
        body = await raw.reader.readexactly(int(headers["content-length"]))
        assert error_of(body)["code"] == "cancelled"
    await gone(edge)
    assert edge.sent == []


async def test_a_request_is_cancelled_while_its_picture_is_fetched(checkpoint: Path, tmp_path: Path) -> None:
    async with silent_host() as (port, asked):
        config = edge_config(checkpoint, server=ServerOptions(allowed_media_domains=(f"127.0.0.1:{port}",)))
        async with running_edge(config, tmp_path) as edge, connection(edge.port) as raw:
            part = {"type": "image_url", "image_url": {"url": f"http://127.0.0.1:{port}/cat.png"}}
            await raw.post({"messages": [{"role": "user", "content": [part]}]}, x_request_id="mine")
            await asked.wait()
            assert await cancel(edge, "mine") == Cancelled(1)
            assert (await raw.head())[0] == 499
            await gone(edge)
            assert edge.sent == []


async def test_a_client_that_goes_as_it_is_cancelled_is_aborted_and_not_answered(edge: RunningEdge) -> None:
    async with connection(edge.port) as raw:
        await raw.send_head(1000, x_request_id="slow")
        await until(lambda: len(edge.actor._open_answers) == 1)
        (opened,) = edge.actor._open_answers._open.values()
        assert opened._task is not None
        opened.cancel()
        opened._task.cancel()  # as aiohttp does when the connection is lost
        await until(lambda: not edge.actor._open_answers)
        assert edge.context.metrics.snapshot().counters["requests_aborted_total"] == 1
    await gone(edge)


async def test_an_id_that_nobody_has_ends_nothing(edge: RunningEdge) -> None:
    async with connection(edge.port) as raw:
        await raw.post(WHOLE, x_request_id="mine")
        submit = await edge.submitted()
        assert await cancel(edge, "other") == Cancelled(0)
        assert await cancel(edge, "") == Cancelled(0)
        await edge.answer(submit, "some words")
        assert (await raw.head())[0] == 200


async def test_a_request_is_cancelled_once(edge: RunningEdge) -> None:
    async with connection(edge.port) as raw:
        await raw.send_head(1000, x_request_id="slow")
        await until(lambda: len(edge.actor._open_answers) == 1)
        await cancel(edge, "slow")
        await cancel(edge, "slow")
        assert (await raw.head())[0] == 499
    await gone(edge)


# ---------------------------------------------------------------- draining


async def test_a_draining_edge_refuses_new_requests_and_ends_the_open_ones(edge: RunningEdge) -> None:
    async with connection(edge.port) as begun, connection(edge.port) as uploading, http() as session:
        await begun.post(STREAM)
        submit = await edge.submitted()
        body = json.dumps(WHOLE).encode()
        await uploading.send_head(len(body))
        await until(lambda: len(edge.actor._open_answers) == 2)
        await drain(edge)
        async with session.post(edge.url + CHAT, json=WHOLE) as response:
            assert response.status == 503
            assert response.headers["Retry-After"] == "5"
            assert (await response.json())["error"]["code"] == "draining"
        async with session.get(edge.url + "/health") as response:
            assert response.status == 503
            assert (await response.json())["down"] == ["edge (draining)"]
        async with session.get(edge.url + "/health/live") as response:
            assert response.status == 200
        uploading.writer.write(body)
        await edge.answer(await edge.submitted(), "some words")
        assert (await uploading.head())[0] == 200
        await edge.answer(submit, "some words")
        assert (await begun.head())[0] == 200
        assert b'"finish_reason":"stop"' in await begun.body()


async def test_an_edge_that_no_longer_drains_takes_requests_again(edge: RunningEdge) -> None:
    async with http() as session, edge.answering("some words"):
        await drain(edge)
        async with session.post(edge.url + CHAT, json=WHOLE) as response:
            assert response.status == 503
        await drain(edge, draining=False)
        async with session.post(edge.url + CHAT, json=WHOLE) as response:
            assert response.status == 200
        async with session.get(edge.url + "/health") as response:
            assert response.status == 200
