"""Whatever ends a request - the client, the clock, the scheduler, a shutdown - it ends once and leaves nothing."""

from __future__ import annotations

import asyncio
import base64
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.actors.edge.encoded_images import save
from tests.actors.edge.raw import RawConnection, connection, silent_host
from tests.actors.edge.running import MODEL, RunningEdge, edge_config, http, running_edge
from tests.pictures import noise, picture
from tests.support import peer_down, peer_up
from vlmrt.actors.edge import body as edge_body
from vlmrt.actors.edge.detokenizer import Detokenizer
from vlmrt.runtime.config import ServerOptions
from vlmrt.runtime.control_messages import MediaReady, SchedulerReady
from vlmrt.runtime.errors import WireError
from vlmrt.runtime.messages import Abort, ActorName, Decode, Epoch, MediaUnsent, MmHash, NeedMedia, Submit

SCHEDULER = ActorName("scheduler:0")
HELLO = [{"role": "user", "content": "Hello"}]
STREAM = {"messages": HELLO, "stream": True}
WHOLE = {"messages": HELLO}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  nothing announces it
            await asyncio.sleep(0.005)


def used_bytes(edge: RunningEdge) -> int:
    return edge.actor.media_bytes_in_flight


def num_open(edge: RunningEdge) -> int:
    return edge.actor.num_open_requests


async def gone(edge: RunningEdge) -> None:
    """Nothing of any request is left."""
    await until(lambda: num_open(edge) == 0 and used_bytes(edge) == 0)


# ---------------------------------------------------------------- the client goes


async def _at_body(raw: RawConnection, edge: RunningEdge) -> None:
    await raw.send_head(10_000)
    raw.writer.write(b'{"messages": [')
    await raw.writer.drain()
    await until(lambda: used_bytes(edge) == 10_000)


async def _at_queue(raw: RawConnection, edge: RunningEdge) -> None:
    await raw.post(STREAM)
    await until(lambda: len(edge.sent) == 1)


async def _at_queue_whole(raw: RawConnection, edge: RunningEdge) -> None:
    await raw.post(WHOLE)
    await until(lambda: len(edge.sent) == 1)


async def _at_media(raw: RawConnection, edge: RunningEdge) -> None:
    await raw.post({"messages": [{"role": "user", "content": [picture(1).part]}], "stream": True})
    submit = await edge.submitted()
    need = NeedMedia(submit.request_id, submit.media[0].mm_hash, ActorName("media:0"), Epoch(1))
    await edge.actor.handle(need, SCHEDULER)
    assert isinstance((await edge.context.outbox.next()).message, Decode)
    edge.sent.append((SCHEDULER, submit))  # type: ignore[arg-type]


async def _at_stream(raw: RawConnection, edge: RunningEdge) -> None:
    await raw.post(STREAM)
    submit = await edge.submitted()
    await edge.output(submit, edge.ids("some"))
    await raw.head()
    edge.sent.append((SCHEDULER, submit))  # type: ignore[arg-type]


async def _at_partial_whole(raw: RawConnection, edge: RunningEdge) -> None:
    await raw.post(WHOLE)
    submit = await edge.submitted()
    await edge.output(submit, edge.ids("some"))
    edge.sent.append((SCHEDULER, submit))  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", [_at_queue, _at_queue_whole, _at_media, _at_stream, _at_partial_whole])
async def test_a_client_that_goes_is_one_abort(
    stage: Callable[[RawConnection, RunningEdge], Awaitable[None]], edge: RunningEdge
) -> None:
    async with connection(edge.port) as raw:
        await stage(raw, edge)
        submit = edge.sent.pop(0)[1]
        assert isinstance(submit, Submit)
        raw.close()
        assert (await edge.aborted()).request_id == submit.request_id
    await gone(edge)
    await edge.output(submit, edge.ids("late"), "stop")  # drops without harm
    assert edge.sent == []


async def test_a_client_that_goes_while_it_uploads_is_no_message(edge: RunningEdge) -> None:
    async with connection(edge.port) as raw:
        await _at_body(raw, edge)
        raw.close()
    await gone(edge)
    assert edge.sent == []


async def test_a_client_that_goes_while_its_picture_is_fetched_is_no_message(checkpoint: Path, tmp_path: Path) -> None:
    async with silent_host() as (port, asked):
        config = edge_config(checkpoint, server=ServerOptions(allowed_media_domains=(f"127.0.0.1:{port}",)))
        async with running_edge(config, tmp_path) as edge, connection(edge.port) as raw:
            part = {"type": "image_url", "image_url": {"url": f"http://127.0.0.1:{port}/cat.png"}}
            await raw.post({"messages": [{"role": "user", "content": [part]}]})
            await asked.wait()
            raw.close()
            await gone(edge)
            assert edge.sent == []


async def test_clients_that_go_after_any_token_leave_nothing(edge: RunningEdge) -> None:
    rng = random.Random(1)
    for _ in range(40):
        async with connection(edge.port) as raw:
            await raw.post(STREAM)
            submit = await edge.submitted()
            for count in range(rng.randrange(6)):
                await edge.output(submit, edge.ids("a"), num_output_tokens=count)
                if rng.random() < 0.5:
                    await asyncio.sleep(0)
            if rng.random() < 0.3:
                await edge.output(submit, [], "stop")
                raw.close()
                await gone(edge)
                assert edge.sent == []  # it had ended: no Abort
            else:
                raw.close()
                assert (await edge.aborted()).request_id == submit.request_id
    await gone(edge)
    assert edge.sent == []


async def test_an_abort_that_does_not_fit_the_channel_is_sent_later(edge: RunningEdge) -> None:
    async with connection(edge.port) as raw:
        await raw.post(STREAM)
        submit = await edge.submitted()
        edge.context.outbox.full.add(SCHEDULER)
        raw.close()
        await gone(edge)
        assert edge.sent == []
        edge.context.outbox.full.clear()
        await edge.tell_status()
        assert edge.sent == [(SCHEDULER, Abort(submit.request_id))]


# ---------------------------------------------------------------- the clock


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_takes_too_long_is_504_and_one_abort(
    stream: bool, checkpoint: Path, tmp_path: Path
) -> None:
    config = edge_config(checkpoint, server=ServerOptions(request_timeout_s=0.2))
    async with running_edge(config, tmp_path) as edge, http() as session:
        body = STREAM if stream else WHOLE
        async with session.post(edge.url + "/v1/chat/completions", json=body) as response:
            assert response.status == 504
            assert response.headers["x-should-retry"] == "false"
            assert (await response.json())["error"]["code"] == "request_timeout"
        submit = await edge.submitted()
        assert (await edge.aborted()).request_id == submit.request_id
        await gone(edge)


async def test_a_stream_that_takes_too_long_ends_with_an_error_event(checkpoint: Path, tmp_path: Path) -> None:
    config = edge_config(checkpoint, server=ServerOptions(request_timeout_s=0.3))
    async with running_edge(config, tmp_path) as edge, connection(edge.port) as raw:
        await raw.post(STREAM)
        submit = await edge.submitted()
        await edge.output(submit, edge.ids("some"))
        assert (await raw.head())[0] == 200
        body = await raw.body()
        assert b'"code":"request_timeout"' in body
        assert body.endswith(b"\n\ndata: [DONE]\n\n")
        await edge.aborted()
        await gone(edge)


async def test_a_body_that_stops_coming_is_408(edge: RunningEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_body, "PAUSE_TIMEOUT_S", 0.1)
    async with connection(edge.port) as raw:
        await _at_body(raw, edge)
        assert (await raw.head())[0] == 408
    await gone(edge)


async def test_a_client_that_does_not_read_is_cut_and_aborted(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_edge(edge_config(checkpoint), tmp_path, write_timeout_s=0.2) as edge:
        async with connection(edge.port, receive_buffer=4096) as raw:
            await raw.post(STREAM)
            submit = await edge.submitted()
            raw.writer.transport.pause_reading()  # type: ignore[attr-defined]
            ids = edge.ids("many words ") * 5000
            for _ in range(200):
                await edge.output(submit, ids)
                await asyncio.sleep(0.005)
                if edge.sent:
                    break
            assert (await edge.aborted()).request_id == submit.request_id
        await gone(edge)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize("begun", [False, True])
async def test_a_mistake_of_ours_is_an_internal_error_that_tells_nothing(
    begun: bool, edge: RunningEdge, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with connection(edge.port) as raw:
        await raw.post(STREAM)
        submit = await edge.submitted()
        if begun:
            await edge.output(submit, edge.ids("some"))
            await raw.head()
        monkeypatch.setattr(Detokenizer, "push", lambda *arguments: 1 / 0)
        await edge.output(submit, edge.ids("more"))
        if not begun:
            assert (await raw.head())[0] == 500
        body = await raw.reader.read()
        assert b'"message":"internal error"' in body
        assert b"ZeroDivision" not in body
        assert (b"data: [DONE]" in body) == begun
        await edge.aborted()
    assert "ZeroDivisionError" in caplog.text


async def test_a_queue_that_nobody_empties_is_bounded(edge: RunningEdge) -> None:
    async with connection(edge.port) as raw:
        await raw.post(WHOLE)
        submit = await edge.submitted()
        await edge.output(submit, [5] * 100_000)
        assert (await raw.head())[0] == 408
        await edge.aborted()


# ---------------------------------------------------------------- the scheduler


async def test_the_schedulers_end_ends_every_open_request(edge: RunningEdge) -> None:
    async with connection(edge.port) as begun, connection(edge.port) as waiting, connection(edge.port) as whole:
        await begun.post(STREAM)
        await edge.output(await edge.submitted(), edge.ids("some"))
        assert (await begun.head())[0] == 200
        await waiting.post(STREAM)
        await edge.submitted()
        await whole.post(WHOLE)
        await edge.submitted()
        await edge.actor.peer_down(peer_down(SCHEDULER))
        for raw in (waiting, whole):
            status, headers = await raw.head()
            assert status == 503
            assert 0 < int(headers["retry-after"]) <= 60
        body = await begun.body()
        assert b'"type":"server_error"' in body
        assert body.endswith(b"\n\ndata: [DONE]\n\n")
    await gone(edge)
    assert edge.sent == []
    await edge.actor.peer_up(peer_up(SCHEDULER, SchedulerReady(), epoch=2))
    async with edge.answering("again"):
        done = await edge.client.chat.completions.create(model=MODEL, messages=HELLO)  # type: ignore[arg-type]
    assert done.choices[0].message.content == "again"


async def test_a_new_incarnation_ends_requests_of_the_old_one(edge: RunningEdge) -> None:
    async with connection(edge.port) as raw:
        await raw.post(WHOLE)
        await edge.submitted()
        await edge.actor.peer_up(peer_up(SCHEDULER, SchedulerReady(), epoch=2))
        assert (await raw.head())[0] == 503
    await edge.actor.peer_down(peer_down(SCHEDULER, epoch=1))  # late news of the old one
    async with edge.answering("again"):
        await edge.client.chat.completions.create(model=MODEL, messages=HELLO)  # type: ignore[arg-type]


async def test_tokens_that_came_before_the_end_are_not_lost(edge: RunningEdge) -> None:
    call = asyncio.create_task(edge.client.chat.completions.create(model=MODEL, messages=HELLO))  # type: ignore[arg-type]
    submit = await edge.submitted()
    await edge.output(submit, edge.ids("whole"), "stop")
    await edge.actor.peer_down(peer_down(SCHEDULER))
    assert (await call).choices[0].message.content == "whole"


# ---------------------------------------------------------------- pictures


async def test_a_picture_can_be_asked_for_until_the_end(edge: RunningEdge) -> None:
    async with connection(edge.port) as raw:
        await raw.post({"messages": [{"role": "user", "content": [picture(1).part]}], "stream": True})
        submit = await edge.submitted()
        need = NeedMedia(submit.request_id, submit.media[0].mm_hash, ActorName("media:1"), Epoch(1))
        for _ in range(2):
            await edge.actor.handle(need, SCHEDULER)
            peer, message = await edge.context.outbox.next()
            assert peer == "media:1"
            assert isinstance(message, Decode)
            assert message.encoded == picture(1).data
            await edge.output(submit, edge.ids("a"))
        await edge.output(submit, [], "stop")
        await raw.head()
        await gone(edge)
        await edge.actor.handle(need, SCHEDULER)
        assert edge.sent == []


async def test_a_worker_that_is_gone_or_full_is_reported(edge: RunningEdge) -> None:
    async with connection(edge.port) as raw:
        await raw.post({"messages": [{"role": "user", "content": [picture(1).part]}], "stream": True})
        submit = await edge.submitted()
        unsent = MediaUnsent(submit.request_id, submit.media[0].mm_hash)
        worker = ActorName("media:0")
        need = NeedMedia(submit.request_id, submit.media[0].mm_hash, worker, Epoch(1))
        edge.context.outbox.down.add(worker)
        await edge.actor.handle(need, SCHEDULER)
        assert edge.context.outbox.take() == [(SCHEDULER, unsent)]
        edge.context.outbox.down.clear()
        edge.context.outbox.full.add(worker)
        await edge.actor.handle(need, SCHEDULER)
        assert edge.sent == []  # not at once, or the two would talk without end
        assert await edge.context.outbox.next() == (SCHEDULER, unsent)
        await edge.actor.handle(NeedMedia(submit.request_id, MmHash("unknown"), worker, Epoch(1)), SCHEDULER)
        assert edge.sent == []


async def test_a_picture_for_another_incarnation_of_a_worker_is_reported(edge: RunningEdge) -> None:
    async with connection(edge.port) as raw:
        await raw.post({"messages": [{"role": "user", "content": [picture(1).part]}], "stream": True})
        submit = await edge.submitted()
        mm_hash = submit.media[0].mm_hash
        await edge.actor.peer_up(peer_up("media:0", MediaReady(1 << 20)))
        need = NeedMedia(submit.request_id, mm_hash, ActorName("media:0"), Epoch(2))
        await edge.actor.handle(need, SCHEDULER)  # the first one is dead, and this edge has not heard of it
        assert edge.context.outbox.take() == [(SCHEDULER, MediaUnsent(submit.request_id, mm_hash))]
        await edge.actor.peer_down(peer_down("media:0"))
        await edge.actor.peer_up(peer_up("media:0", MediaReady(1 << 20), epoch=2))
        await edge.actor.handle(need, SCHEDULER)
        assert [(sent.peer, type(sent.message)) for sent in edge.context.outbox.take()] == [("media:0", Decode)]


async def test_a_report_is_kept_while_the_channel_is_full(edge: RunningEdge) -> None:
    async with connection(edge.port) as raw:
        await raw.post({"messages": [{"role": "user", "content": [picture(1).part]}], "stream": True})
        submit = await edge.submitted()
        edge.context.outbox.down.add(ActorName("media:0"))
        edge.context.outbox.full.add(SCHEDULER)
        mm_hash = submit.media[0].mm_hash
        await edge.actor.handle(NeedMedia(submit.request_id, mm_hash, ActorName("media:0"), Epoch(1)), SCHEDULER)
        await edge.tell_status()
        assert edge.sent == []
        edge.context.outbox.full.clear()
        await edge.tell_status()
        assert edge.context.outbox.take() == [(SCHEDULER, MediaUnsent(submit.request_id, mm_hash))]


async def test_pictures_beyond_the_budget_are_429_and_alone_too_large_413(checkpoint: Path, tmp_path: Path) -> None:
    data = save(noise(500, 500, 0), "BMP")  # 750 kB
    url = f"data:image/bmp;base64,{base64.b64encode(data).decode()}"
    body: dict[str, Any] = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]}
    config = edge_config(checkpoint, server=ServerOptions(max_media_mib=2))
    async with running_edge(config, tmp_path) as edge, connection(edge.port) as first, connection(edge.port) as second:
        await first.post(body)
        submit = await edge.submitted()
        await until(lambda: used_bytes(edge) >= len(data))
        assert used_bytes(edge) < len(data) + 100  # the body is not held any more
        await second.post(body)
        status, headers = await second.head()
        assert (status, headers["retry-after"]) == (429, "1")
        async with connection(edge.port) as third:
            await third.post({"messages": [{"role": "user", "content": "x" * (3 << 20)}]})
            assert (await third.head())[0] == 413
        await edge.answer(submit, "done")
        assert (await first.head())[0] == 200
        await gone(edge)
        async with connection(edge.port) as fourth:
            await fourth.post(body)
            await edge.answer(await edge.submitted(), "done")
            assert (await fourth.head())[0] == 200


async def test_refused_requests_give_their_memory_back(edge: RunningEdge) -> None:
    for content in ([picture(0).part] * 3 + [{"type": "image_url", "image_url": "ftp://x"}], [picture(2).part] * 200):
        with pytest.raises(openai.BadRequestError):
            await edge.client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": content}])  # type: ignore[list-item,misc]
        await gone(edge)


# ---------------------------------------------------------------- shutdown


async def test_a_shutdown_lets_open_requests_finish_and_refuses_new_ones(checkpoint: Path, tmp_path: Path) -> None:
    async with running_edge(edge_config(checkpoint), tmp_path) as edge, http() as session:
        async with session.get(edge.url + "/ping"):
            pass  # leaves a connection that is kept alive
        async with connection(edge.port) as raw:
            await raw.post(STREAM)
            submit = await edge.submitted()
            await edge.output(submit, edge.ids("some"))
            stopping = asyncio.create_task(edge.actor.stop(5.0))
            await asyncio.sleep(0.05)
            async with session.post(edge.url + "/v1/chat/completions", json=WHOLE) as response:
                assert response.status == 503
            assert not stopping.done()
            await edge.output(submit, edge.ids(" more"), "stop")
            assert (await raw.head())[0] == 200
            assert b"more" in await raw.body()
            await asyncio.wait_for(stopping, 3)
        assert edge.sent == []


async def test_a_shutdown_ends_what_does_not_finish_in_time(edge: RunningEdge) -> None:
    async with connection(edge.port) as begun, connection(edge.port) as waiting:
        await begun.post(STREAM)
        await edge.output(await edge.submitted(), edge.ids("some"))
        await begun.head()
        await waiting.post(WHOLE)
        await edge.submitted()
        await asyncio.wait_for(edge.actor.stop(0.1), 3)
        assert (await waiting.head())[0] == 503
        assert b"shutting down" in await begun.body()
    assert sorted(type(sent.message).__name__ for sent in edge.sent) == ["Abort", "Abort"]


async def test_an_idle_connection_does_not_delay_a_shutdown(edge: RunningEdge) -> None:
    async with http() as session:
        async with session.get(edge.url + "/ping"):
            pass
        await asyncio.wait_for(edge.actor.stop(10.0), 2)


async def test_counters_follow_the_requests(edge: RunningEdge) -> None:
    async with edge.answering("some words"):
        for _ in range(3):
            await edge.client.chat.completions.create(model=MODEL, messages=HELLO)  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError):
        await edge.client.chat.completions.create(model=MODEL, messages=[])
    call = asyncio.create_task(edge.client.chat.completions.create(model=MODEL, messages=HELLO))  # type: ignore[arg-type]
    await edge.output(await edge.submitted(), error=WireError(500, "broken", "step_failed"))
    with pytest.raises(openai.InternalServerError):
        await call
    snapshot = edge.context.metrics.snapshot()
    assert snapshot.counters['http_requests_total{code="200"}'] == 3
    assert snapshot.counters['http_requests_total{code="400"}'] == 1
    assert snapshot.counters['http_requests_total{code="500"}'] == 1
    assert sum(snapshot.histograms["time_to_first_token_seconds"].counts) == 3
    assert sum(snapshot.histograms["e2e_request_latency_seconds"].counts) == 3
    assert sum(snapshot.histograms["inter_token_latency_seconds"].counts) >= 3
