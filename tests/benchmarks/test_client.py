"""The client processes against a small server that answers as it is told."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from aiohttp import web

from benchmarks.asks import Ask, Dialogue, drawn, text_of
from benchmarks.client import AnswerCount, ClientPool, Load
from benchmarks.images import Picture, draw
from benchmarks.server import free_port
from tests.benchmarks.chunks import chunk, stream_answer

Messages = list[dict[str, Any]]


async def answer(request: web.Request, heard: list[Messages]) -> web.StreamResponse:
    body = await request.json()
    heard.append(body["messages"])
    text = body["messages"][-1]["content"][-1]["text"]
    if text == "refuse":
        return web.json_response({"error": {"message": "no room"}}, status=429)
    response = web.StreamResponse()
    await response.prepare(request)
    if text == "hang":
        await asyncio.sleep(60)
    await stream_answer(response, text, body.get("max_tokens", 1 << 30))
    return response


@pytest.fixture(scope="module")
def heard() -> list[Messages]:
    """The messages of every request that the server got."""
    return []


@pytest.fixture(scope="module")
def pool(heard: list[Messages]) -> Iterator[ClientPool]:
    """Two client processes and the server that they send to."""
    loop = asyncio.new_event_loop()
    ports: list[int] = []
    ready = threading.Event()

    async def serve() -> web.AppRunner:
        async def healthy(_: web.Request) -> web.Response:
            return web.Response()

        app = web.Application()
        app.add_routes([web.post("/v1/chat/completions", partial(answer, heard=heard)), web.get("/health", healthy)])
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        ports.append(runner.addresses[0][1])
        ready.set()
        return runner

    def run() -> None:
        runner = loop.run_until_complete(serve())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(10)
        with ClientPool(f"http://127.0.0.1:{ports[0]}", num_processes=2) as found:
            yield found
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def test_every_token_is_counted_also_without_text(pool: ClientPool) -> None:
    replies = pool.play(Load(((Ask("one by one", 5), Ask("two by two", 6)), (Ask("one by one", 3),))))
    assert replies.errors == []
    assert sorted(reply.num_tokens[-1] for reply in replies.clients) == [3, 5, 6]
    for reply in replies.clients:
        assert list(reply.times_s) == sorted(reply.times_s)
        assert reply.sent_s < reply.times_s[0]


def test_a_turn_sends_the_turns_before_it_and_their_answers(pool: ClientPool, heard: list[Messages]) -> None:
    heard.clear()
    picture = Picture(64, 48, (1,))
    first, second, third = Ask("one by one", 2, (picture,)), Ask("two by two", 8, turn=2), Ask("one by one", 4, turn=3)
    replies = pool.play(Load(((first, second, third, first),)))
    assert replies.errors == []
    assert [reply.turn for reply in replies.clients] == [1, 2, 3, 1]
    *turns, anew = heard
    longest = turns[-1]
    assert turns == [longest[:1], longest[:3], longest]
    assert anew == longest[:1]
    assert [message["role"] for message in longest] == ["user", "assistant", "user", "assistant", "user"]
    assert [part["type"] for part in longest[0]["content"]] == ["image_url", "text"]
    assert [longest[1]["content"], longest[3]["content"]] == ["wordword", "wordwordword"]  # 1 and 2; 2, 4, 6 and 8


def test_an_answer_that_is_no_stream_of_chunks_fails_the_turn_after_it(pool: ClientPool) -> None:
    replies = pool.play(Load(((Ask("no text", 2), Ask("one by one", 2, turn=2), Ask("one by one", 2)),)))
    (error,) = replies.errors
    assert error.startswith("not sent after the turn before it: the answer is no stream of chunks")
    assert [reply.error for reply in replies.clients] == [None, error, None]


def test_the_text_of_an_answer_is_that_of_its_chunks() -> None:
    role = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
    empty = b'data: {"choices":[{"index":0,"delta":{"content":null}},{"index":1,"delta":{}}]}\n\n'
    counts = b'data: {"choices":[],"usage":{"completion_tokens":3}}\n\n'
    odd = 'a "quoted\\" \n\ndata: {} \ufffd\0 \N{GRINNING FACE}'
    stream = role + chunk(odd, 1) + empty + chunk(" end", 2) + counts + b"data: [DONE]\n\n"
    assert text_of(stream) == odd + " end"
    assert text_of(b"") == ""
    for wrong in (b'data: {"choices":[{"delta":{"content":"\xff"}}]}\n\n', b"data: {\n\n", b"data: []\n\n"):
        with pytest.raises(ValueError, match="no stream of chunks"):
            text_of(role + wrong)


def test_a_body_is_valid_json_whatever_the_answer_was() -> None:
    odd = '"]}\\ \u2028 \ufffd \0'
    dialogue = Dialogue({})
    dialogue.body(Ask("first", 2))
    messages = json.loads(dialogue.body(Ask("second", 2, turn=2), chunk(odd, 1)))["messages"]
    assert messages[1] == {"role": "assistant", "content": odd}


def test_failures_are_errors_of_their_own_request_only(pool: ClientPool) -> None:
    wrong = ("refuse", "too short", "error inside", "no end", "hang")
    replies = pool.play(Load((*((Ask(text, 4),) for text in wrong), (Ask("one by one", 4),)), limit_s=1.0))
    shown = "\n".join(replies.errors)
    assert len(replies.errors) == len(wrong)
    assert "429" in shown
    assert "no room" in shown
    assert "the answer has 3 of 4 tokens\n" in shown + "\n"
    assert "the answer has 4 of 4 tokens and no end" in shown
    assert "the tower burnt down" in shown
    assert "not done 1 s after the start" in shown


def test_streams_end_when_the_clients_are_done(pool: ClientPool) -> None:
    load = Load(((Ask("one by one", 20, at_s=0.2),),), streams=(Ask("one by one", None), Ask("one by one", None)))
    replies = pool.play(load)
    assert replies.errors == []
    last_s = replies.clients[0].times_s[-1]
    assert len(replies.streams) == 2
    for stream in replies.streams:
        assert stream.times_s[0] < replies.clients[0].sent_s
        assert stream.times_s[-1] > last_s - 0.1
    assert pool.play(Load(((Ask("one by one", 2),),))).errors == []  # the pool is as good as before


def test_a_stream_that_ends_before_the_clients_is_an_error(pool: ClientPool) -> None:
    replies = pool.play(Load(((Ask("one by one", 2, at_s=0.3),),), streams=(Ask("one by one", 3),)))
    assert replies.errors == ["a stream ended after 3 tokens, before the other clients were done"]


def test_a_server_that_is_gone_fails_every_request_and_not_the_pool() -> None:
    with ClientPool(f"http://127.0.0.1:{free_port()}", num_processes=2) as pool:
        replies = pool.play(Load(((Ask("one", 2), Ask("two", 2)),), streams=(Ask("three", None),)))
        assert len(replies.errors) == 3
        assert all("ClientConnectorError" in error for error in replies.errors)


def test_counts_survive_any_cut_of_the_bytes() -> None:
    data = b"".join(chunk("x", count) for count in (9, 10, 11)) + b"data: [DONE]\n\n"
    for cut in range(len(data) + 1):
        count = AnswerCount()
        count.push(data[:cut])
        count.push(data[cut:])
        assert (count.num_tokens, count.done, count.error) == (11, True, None)


def test_a_body_holds_its_pictures_and_asks_for_counts() -> None:
    ask = Ask("What is it?", 7, (Picture(64, 48, (1,)), Picture(64, 48, (2,))))
    body = json.loads(Dialogue(drawn([ask])).body(ask))
    content = body["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url", "image_url", "text"]
    assert content[0] != content[1]
    assert body["max_tokens"] == 7
    assert body["ignore_eos"] is True
    assert body["stream_options"]["continuous_usage_stats"] is True
    assert "max_tokens" not in json.loads(Dialogue({}).body(Ask("Go on", None)))


def test_pictures_have_the_size_of_photographs_and_are_the_same_every_time() -> None:
    assert 70_000 < len(draw(Picture(640, 480, (3, 1)))) < 140_000
    assert draw(Picture(640, 480, (3, 1))) == draw(Picture(640, 480, (3, 1)))
    assert draw(Picture(640, 480, (3, 1))) != draw(Picture(640, 480, (3, 2)))
