"""The client processes against a small server that answers as it is told."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from aiohttp import web

from benchmarks.server import free_port
from tests.tools.bench.chunks import chunk, stream_answer
from vlmrt.tools.bench.asks import Ask, Dialogue, Target, text_of
from vlmrt.tools.bench.media import MediaFile, prepared
from vlmrt.tools.bench.pictures import Picture, draw
from vlmrt.tools.bench.pool import ClientPool, Progress, Unplayable, dealt_out
from vlmrt.tools.bench.replies import Load
from vlmrt.tools.bench.summary import most_at_once

Messages = list[dict[str, Any]]
ENDLESS = {"refuse without an end": b"no " * 100, "never end": chunk("word" * 100, 1)}
TARGET = Target("http://nowhere")


class Standing:
    """What the server is doing, for answers that wait for others."""

    def __init__(self) -> None:
        self.num_begun = 0  # streams without a length
        self.news = asyncio.Condition()
        self.short_stream_ended = asyncio.Event()

    async def until_begun(self, count: int) -> None:
        async with self.news:
            await self.news.wait_for(lambda: self.num_begun >= count)

    async def begin(self) -> None:
        async with self.news:
            self.num_begun += 1
            self.news.notify_all()


async def answer(request: web.Request, heard: list[Messages], standing: Standing) -> web.StreamResponse:
    body = await request.json()
    heard.append(body["messages"])
    content = body["messages"][-1]["content"]
    text = content if isinstance(content, str) else content[-1]["text"]
    if text == "refuse":
        return web.json_response({"error": {"message": "no room"}}, status=429)
    response = web.StreamResponse(status=500 if text == "refuse without an end" else 200)
    await response.prepare(request)
    with suppress(ConnectionResetError):  # its client has seen enough
        while text in ENDLESS:
            await response.write(ENDLESS[text] * 1024)
    if text == "hang":
        await asyncio.sleep(60)
    if text == "after two streams began":
        await standing.until_begun(2)
    if text == "after a stream ended":
        await standing.short_stream_ended.wait()
    if "max_tokens" not in body:
        await standing.begin()
    with suppress(ConnectionResetError):  # a stream that was stopped
        await stream_answer(response, text, body.get("max_tokens", 1 << 30))
    if text == "short stream":
        await response.write_eof()
        standing.short_stream_ended.set()
    return response


@pytest.fixture(scope="module")
def heard() -> list[Messages]:
    """The messages of every request that the server got."""
    return []


@pytest.fixture(scope="module")
def standing() -> Standing:
    return Standing()


@pytest.fixture(scope="module")
def pool(heard: list[Messages], standing: Standing) -> Iterator[ClientPool]:
    """Two client processes and the server that they send to."""
    loop = asyncio.new_event_loop()
    ports: list[int] = []
    ready = threading.Event()

    async def serve() -> web.AppRunner:
        async def healthy(_: web.Request) -> web.Response:
            return web.Response()

        app = web.Application()
        answering = partial(answer, heard=heard, standing=standing)
        app.add_routes([web.post("/v1/chat/completions", answering), web.get("/health", healthy)])
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
        with ClientPool(Target(f"http://127.0.0.1:{ports[0]}"), num_processes=2) as found:
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
    dialogue = Dialogue(TARGET, {})
    dialogue.body(Ask("first", 2))
    messages = json.loads(dialogue.body(Ask("second", 2, turn=2), chunk(odd, 1)))["messages"]
    assert messages[1] == {"role": "assistant", "content": odd}


def test_failures_are_errors_of_their_own_request_only(pool: ClientPool) -> None:
    wrong = ("refuse", "too short", "error inside", "no end")
    replies = pool.play(Load((*((Ask(text, 4),) for text in wrong), (Ask("one by one", 4),))))
    shown = "\n".join(replies.errors)
    assert len(replies.errors) == len(wrong)
    assert "429" in shown
    assert "no room" in shown
    assert "the answer has 3 of 4 tokens\n" in shown + "\n"
    assert "the answer has 4 of 4 tokens and no end" in shown
    assert "the tower burnt down" in shown
    kinds = {reply.error_kind for reply in replies.clients}
    assert kinds == {"", "HTTP 429", "wrong length", "error in the stream", "no end"}


@pytest.mark.parametrize(
    ("text", "kind", "error"),
    [
        ("refuse without an end", "HTTP 500", "500: " + "no " * 100),
        ("never end", "too long", "the answer has more than 64 MiB"),
    ],
)
def test_what_has_no_end_is_not_kept(pool: ClientPool, text: str, kind: str, error: str) -> None:
    (reply,) = pool.play(Load(((Ask(text, 4),),))).clients
    assert (reply.error_kind, reply.error) == (kind, error)


def test_what_takes_longer_than_the_limit_has_failed(pool: ClientPool) -> None:
    (reply,) = pool.play(Load(((Ask("hang", 4),),), limit_s=0.2)).clients
    assert (reply.error_kind, reply.error) == ("timeout", "not done 0.2 s after the start")


def test_streams_end_when_the_clients_are_done(pool: ClientPool) -> None:
    streams = (Ask("one by one", None, exact=False), Ask("one by one", None, exact=False))
    replies = pool.play(Load(((Ask("after two streams began", 20),),), streams))
    assert replies.errors == []
    assert len(replies.streams) == 2
    for stream in replies.streams:
        assert stream.times_s[-1] > replies.clients[0].times_s[-1]  # it went on until it was told to stop
    assert pool.play(Load(((Ask("one by one", 2),),))).errors == []  # the pool is as good as before


def test_a_stream_that_ends_before_the_clients_is_an_error(pool: ClientPool) -> None:
    replies = pool.play(Load(((Ask("after a stream ended", 2),),), streams=(Ask("short stream", 3),)))
    assert replies.errors == ["a stream ended after 3 tokens, before the other clients were done"]


def test_no_more_clients_are_open_at_once_than_there_are_slots(pool: ClientPool) -> None:
    replies = pool.play(Load(tuple((Ask("one by one", 4),) for _ in range(12)), num_slots=3))
    assert replies.errors == []
    assert len(replies.clients) == 12
    assert most_at_once(replies.clients) <= 3


def test_every_slot_has_as_many_clients_and_keeps_their_order() -> None:
    clients = tuple((Ask(str(number), 1),) for number in range(11))
    dealt = dealt_out(Load(clients, num_slots=5), 2)
    assert [num_slots for _, num_slots in dealt] == [3, 2]
    assert [[asks[0].text for asks in share] for share, _ in dealt] == [
        ["0", "2", "4", "5", "7", "9", "10"],
        ["1", "3", "6", "8"],
    ]
    assert dealt_out(Load(clients[:1], num_slots=5), 2) == [(clients[:1], 1), ((), None)]


def test_requests_are_sent_at_their_times_and_say_when_they_were_due(pool: ClientPool) -> None:
    replies = pool.play(Load(tuple((Ask("one by one", 2, at_s=at_s),) for at_s in (0.0, 0.05, 0.1)), num_slots=1))
    assert replies.errors == []
    for reply in replies.clients[1:]:
        assert reply.due_s is not None
        assert reply.sent_s >= reply.due_s - 0.002  # the loop's timers are of milliseconds
    first, second, _ = sorted(replies.clients, key=lambda reply: reply.sent_s)
    assert second.sent_s >= first.end_s  # one slot: it waited for the one before it


def test_counts_and_prompts_of_the_server_are_told(pool: ClientPool) -> None:
    (reply,) = pool.play(Load(((Ask("two by two", 6),),))).clients
    assert (reply.answer_tokens, reply.prompt_tokens, reply.asked_tokens, reply.counted_by) == (6, 3, 6, "usage")


def test_an_answer_of_another_length_fails_only_where_it_must_be_exact(pool: ClientPool) -> None:
    replies = pool.play(Load(((Ask("too short", 4, exact=False), Ask("too short", 4)),)))
    lax, strict = replies.clients
    assert (lax.error, lax.output_tokens) == (None, 3)
    assert (strict.error_kind, strict.error) == ("wrong length", "the answer has 3 of 4 tokens")


def test_a_watcher_sees_requests_and_tokens_go_by(pool: ClientPool) -> None:
    seen: list[Progress] = []
    pool.play(Load(tuple((Ask("one by one", 5),) for _ in range(4))), seen.append)
    assert seen[-1].num_done == 4
    assert seen[-1].num_tokens == 20
    assert seen[-1].num_open == 0


def test_a_file_that_is_not_there_is_said_before_anything_is_sent(heard: list[Messages], tmp_path: Path) -> None:
    ask = Ask("What is it?", 2, (MediaFile(str(tmp_path / "nowhere.png")),))
    with pytest.raises(Unplayable, match=r"nowhere\.png"), ClientPool(TARGET, num_processes=1) as pool:
        pool.play(Load(((ask,),)))


def test_a_client_process_that_dies_ends_the_load(pool: ClientPool) -> None:
    def kill(_: Progress) -> None:
        psutil.Process(doomed.pids[0]).kill()

    doomed = ClientPool(pool.target, num_processes=1)
    with pytest.raises(Unplayable, match="client process 0 died"), doomed:
        doomed.play(Load(((Ask("hang", 4),),)), kill)


def test_client_processes_end_with_their_parent(pool: ClientPool) -> None:
    with ClientPool(pool.target, num_processes=1) as short:
        workers = [psutil.Process(pid) for pid in short.pids]
        assert short.play(Load(((Ask("one by one", 2),),))).errors == []
    assert not any(worker.is_running() for worker in workers)


PARENT = """
import sys
from vlmrt.tools.bench.asks import Ask, Target
from vlmrt.tools.bench.pool import ClientPool
from vlmrt.tools.bench.replies import Load
with ClientPool(Target(sys.argv[1]), num_processes=1) as pool:
    pool.play(Load(((Ask("hang", 4),),)), lambda _: print(pool.pids[0], flush=True))
"""


def test_a_client_process_does_not_outlive_a_killed_parent(pool: ClientPool) -> None:
    command = [sys.executable, "-c", PARENT, pool.target.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))  # it plays
        parent.kill()
    _, alive = psutil.wait_procs([worker], timeout=10)
    assert not alive


def test_a_server_that_is_gone_fails_every_request_and_not_the_pool() -> None:
    with ClientPool(Target(f"http://127.0.0.1:{free_port()}"), num_processes=2) as pool:
        replies = pool.play(Load(((Ask("one", 2), Ask("two", 2)),), streams=(Ask("three", None),)))
        assert len(replies.errors) == 3
        assert all("ClientConnectorError" in error for error in replies.errors)


def test_a_body_holds_its_pictures_and_asks_for_counts() -> None:
    ask = Ask("What is it?", 7, (Picture(64, 48, (1,)), Picture(64, 48, (2,))))
    body = json.loads(Dialogue(TARGET, prepared(ask.media)).body(ask))
    content = body["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url", "image_url", "text"]
    assert content[0] != content[1]
    assert body["max_tokens"] == 7
    assert body["ignore_eos"] is True
    assert body["stream_options"]["continuous_usage_stats"] is True
    assert "max_tokens" not in json.loads(Dialogue(TARGET, {}).body(Ask("Go on", None)))


def test_pictures_have_the_size_of_photographs_and_are_the_same_every_time() -> None:
    assert 70_000 < len(draw(Picture(640, 480, (3, 1)))) < 140_000
    assert draw(Picture(640, 480, (3, 1))) == draw(Picture(640, 480, (3, 1)))
    assert draw(Picture(640, 480, (3, 1))) != draw(Picture(640, 480, (3, 2)))
