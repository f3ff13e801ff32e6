"""The admin socket: replies, deadlines, garbage, clients that are slow or gone."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil
import pytest
import zmq

from tests.runtime.admin_world import AdminWorld, admin_world, open_answer, running_request
from vlmrt.runtime import asks
from vlmrt.runtime.admin import MAX_ANSWERING
from vlmrt.runtime.admin_messages import (
    ADMIN_PROTOCOL,
    MAX_REQUEST_BYTES,
    BeginDrain,
    BeginProfile,
    CachesReply,
    CancelOne,
    CancelReply,
    ConfigReply,
    DrainReply,
    EndDrain,
    EndProfile,
    GetCaches,
    GetConfig,
    GetRequests,
    GetStats,
    GetTrace,
    LevelReply,
    ProfileReply,
    RequestsReply,
    ResetCaches,
    SetLevel,
    StatsReply,
    TraceReply,
    encode_admin_body,
    encode_admin_header,
)
from vlmrt.runtime.config import ApiKey, Config, ModelOptions, ServerOptions
from vlmrt.runtime.questions import CancelRequest, EmptyCaches, ListRequests, SetLogLevel, StartProfile
from vlmrt.runtime.timeline import Span, Timeline
from vlmrt.runtime.transport import Socket
from vlmrt.tools.admin.client import AdminClient, AdminError, ServiceSilent

STATS = encode_admin_body(GetStats())


@pytest.fixture
async def world(short_dir: Path) -> AsyncIterator[AdminWorld]:
    async with admin_world(short_dir) as world:
        yield world


@pytest.fixture
async def client(world: AdminWorld) -> AsyncIterator[AdminClient]:
    async with AdminClient(world.address) as client:
        yield client


@contextmanager
def raw_socket(world: AdminWorld) -> Iterator[Socket]:
    """A client that says what it likes."""
    context: zmq.Context[Socket] = zmq.Context()
    try:
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(world.address)
        yield socket
    finally:
        context.destroy(0)


# ---------------------------------------------------------------- figures


async def test_stats_are_those_of_the_last_heartbeat_and_cost_actors_nothing(
    world: AdminWorld, client: AdminClient
) -> None:
    world.count("scheduler:0", lambda metrics: metrics.set("requests_running", 3))
    world.beat()
    reply = await client.ask(GetStats(), StatsReply)
    assert (reply.stats.requests.running, reply.model, reply.pid) == (3, "test-model", os.getpid())
    assert [actor.actor for actor in reply.stats.actors] == ["edge:0", "media:0", "scheduler:0", "vit:0", "llm:0"]
    assert world.asked == []


async def test_many_clients_of_one_heartbeat_share_one_count_of_its_stats(
    world: AdminWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = 0
    count = world.desk._history.stats

    def counting() -> object:
        nonlocal counts
        counts += 1
        return count()

    monkeypatch.setattr(world.desk._history, "stats", counting)
    clients = [AdminClient(world.address) for _ in range(5)]
    try:
        for _ in range(4):
            await asyncio.gather(*(client.ask(GetStats(), StatsReply) for client in clients))
        assert counts == 1
        world.beat()
        await clients[0].ask(GetStats(), StatsReply)
        assert counts == 2
    finally:
        for client in clients:
            client.close()


async def test_requests_are_asked_of_actors_once_a_heartbeat_however_many_ask(
    short_dir: Path,
) -> None:
    async with admin_world(short_dir) as world, AdminClient(world.address) as client:
        world.desk._requests._period_s = 3600.0
        await asyncio.gather(*(client.ask(GetRequests(), RequestsReply) for _ in range(10)))
        await client.ask(GetRequests(), RequestsReply)
        assert sorted(actor for actor, question in world.asked if isinstance(question, ListRequests)) == [
            "edge:0",
            "scheduler:0",
        ]


async def test_requests_say_how_far_each_of_them_is(world: AdminWorld, client: AdminClient) -> None:
    world.open_answers = [
        open_answer("new", age_s=1.0),
        open_answer("queued", "a1", "a1", age_s=2.0),
        open_answer("looking", "a2", "a2", age_s=3.0),
        open_answer("reading", "a3", "a3", age_s=4.0),
        open_answer("writing", "a4", "a4", "a4-1", age_s=5.0),
        open_answer("done", "a5", "a5", age_s=6.0),
    ]
    none_yet = {"num_output_tokens": 0, "num_computed_tokens": 0}
    world.requests = [
        running_request("a4", num_output_tokens=7),
        running_request("a4-1", num_output_tokens=2),
        running_request("a3", num_output_tokens=0),
        running_request("a2", status="waiting", num_wanted=1, **none_yet),
        running_request("a1", status="waiting", **none_yet),
    ]
    reply = await client.ask(GetRequests(), RequestsReply)
    assert [(row.label, row.state) for row in reply.rows] == [
        ("done", "ending"),
        ("writing", "decode"),
        ("reading", "prefill"),
        ("looking", "media"),
        ("queued", "waiting"),
        ("new", "preparing"),
    ]
    writing = reply.rows[1]
    assert (writing.num_choices, writing.num_output_tokens, writing.num_images, writing.num_rows) == (2, 9, 1, 64)
    assert reply.num_open == 6


# ---------------------------------------------------------------- orders


async def test_cancelling_says_how_many_answers_end_or_that_there_are_none(
    world: AdminWorld, client: AdminClient
) -> None:
    world.open_answers = [open_answer("mine", "chatcmpl-1", "chatcmpl-1"), open_answer("other", "chatcmpl-2")]
    assert (await client.ask(CancelOne("mine"), CancelReply)).num_answers == 1
    assert [row.label for row in world.open_answers] == ["other"]
    assert (await client.ask(CancelOne("chatcmpl-2"), CancelReply)).num_answers == 1
    with pytest.raises(AdminError, match="no open request has the id mine"):
        await client.ask(CancelOne("mine"), CancelReply)
    assert world.asked.count(("edge:0", CancelRequest("mine"))) == 2


async def test_caches_are_shown_and_reset_by_the_scheduler(world: AdminWorld, client: AdminClient) -> None:
    await client.ask(GetCaches(), CachesReply)
    await client.ask(ResetCaches(("prefix", "embedding")), CachesReply)
    assert world.asked[-1] == ("scheduler:0", EmptyCaches(("prefix", "embedding")))


async def test_a_level_reaches_every_actor_and_stays_with_its_next_incarnation(
    world: AdminWorld, client: AdminClient
) -> None:
    reply = await client.ask(SetLevel("debug"), LevelReply)
    assert set(reply.actors) == {"supervisor", *world.table.processes}
    assert logging.getLogger().level == logging.DEBUG
    reply = await client.ask(SetLevel("error", "vit:0"), LevelReply)
    assert reply.actors == ("vit:0",)
    assert world.asked[-1] == ("vit:0", SetLogLevel("error"))
    names = list(world.table.processes)
    assert [world.desk.config_of(name).log_level for name in names] == [
        "error" if name == "vit:0" else "debug" for name in names
    ]
    with pytest.raises(AdminError, match="there is no actor vit:9; there are edge:0"):
        await client.ask(SetLevel("error", "vit:9"), LevelReply)


async def test_a_profile_goes_to_a_file_of_the_server_whatever_the_actor_is_called(
    world: AdminWorld, client: AdminClient
) -> None:
    reply = await client.ask(BeginProfile("vit:0", 5.0), ProfileReply)
    assert reply.profile.path.startswith("vlmrt-profiles/vit-0-")
    assert world.asked == [("vit:0", StartProfile(reply.profile.path.removesuffix(".folded"), 5.0))]
    assert (await client.ask(EndProfile("vit:0"), ProfileReply)).profile.seconds == 0.0
    with pytest.raises(AdminError, match="there is no actor"):
        await client.ask(BeginProfile("../../etc/x", 5.0), ProfileReply)


async def test_the_config_is_shown_with_its_origins_and_without_secrets(short_dir: Path) -> None:
    config = Config(
        model=ModelOptions(directory="/m", served_names=("a", "b")),
        server=ServerOptions(api_keys=(ApiKey.of("very-secret-key", "blue"), ApiKey.of("other"))),
        origins={"max-num-seqs": "flag"},
    )
    async with admin_world(short_dir, config) as world, AdminClient(world.address) as client:
        reply = await client.ask(GetConfig(), ConfigReply)
    assert reply.values["scheduling.max_num_seqs"] == 64
    assert reply.values["model.served_names"] == ["a", "b"]
    assert reply.values["memory.kv_cache_gib"] is None
    assert reply.values["server.api_keys"] == ["blue", "(none)"]
    assert reply.origins == {"max-num-seqs": "flag"}
    assert ApiKey.of("other").digest not in msgspec.msgpack.encode(reply)


async def test_a_trace_comes_from_the_edge_that_had_the_request(world: AdminWorld, client: AdminClient) -> None:
    timeline = Timeline("mine", "/v1/completions", 5.0, 1.7e9, spans=(Span("queue", "scheduler:0", 5.0, 6.0),))
    world.timelines["mine"] = timeline
    reply = await client.ask(GetTrace("mine"), TraceReply)
    assert (reply.timeline, reply.edge) == (timeline, "edge:0")
    with pytest.raises(AdminError, match="no request of the id other is open, or among the last that ended"):
        await client.ask(GetTrace("other"), TraceReply)


# ---------------------------------------------------------------- draining


async def test_a_drain_is_announced_at_once_and_ends_nothing_by_itself(world: AdminWorld, client: AdminClient) -> None:
    world.open_answers = [open_answer("mine")]
    assert await client.ask(BeginDrain(), DrainReply) == DrainReply(True, False, 1)
    assert (world.desk.draining, world.num_announced) == (True, 1)
    world.beat()
    assert (await client.ask(GetStats(), StatsReply)).stats.draining
    world.open_answers = []
    assert await client.ask(BeginDrain(), DrainReply) == DrainReply(True, False, 0)
    assert (world.num_announced, world.stops) == (1, [])
    assert await client.ask(EndDrain(), DrainReply) == DrainReply(False, False, 0)
    assert world.num_announced == 2


async def test_a_drain_that_stops_waits_for_the_last_open_request(world: AdminWorld, client: AdminClient) -> None:
    world.open_answers = [open_answer("mine")]
    assert await client.ask(BeginDrain(stop=True), DrainReply) == DrainReply(True, True, 1)
    num_looks = len(world.asked)
    await until(lambda: len(world.asked) >= num_looks + 3)
    assert world.stops == []
    world.open_answers = []
    await until(lambda: world.stops == ["drained"])


async def test_a_drain_that_stops_can_be_taken_back(world: AdminWorld, client: AdminClient) -> None:
    world.open_answers = [open_answer("mine")]
    await client.ask(BeginDrain(stop=True), DrainReply)
    assert await client.ask(EndDrain(), DrainReply) == DrainReply(False, False, 1)
    world.open_answers = []
    await client.ask(GetCaches(), CachesReply)
    assert world.stops == []


async def test_a_drain_does_not_take_an_edge_that_says_nothing_for_an_empty_one(
    world: AdminWorld, client: AdminClient
) -> None:
    world.deaf = {"edge:0"}
    assert await client.ask(BeginDrain(stop=True), DrainReply) == DrainReply(True, True, None)
    assert world.stops == []
    world.deaf = set()
    await until(lambda: world.stops == ["drained"])


# ---------------------------------------------------------------- deadlines


async def test_an_actor_that_says_nothing_is_named_when_its_time_is_up(
    world: AdminWorld, client: AdminClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asks.Asks.ask, "__defaults__", (0.05,))
    world.silent = {"scheduler:0"}
    with pytest.raises(AdminError, match=r"scheduler:0 did not answer within 0.05 s"):
        await client.ask(GetCaches(), CachesReply)
    assert len(world.asks) == 0


async def test_an_actor_that_ends_before_it_answers_ends_the_wait(world: AdminWorld, client: AdminClient) -> None:
    world.silent = {"scheduler:0"}
    asked = asyncio.create_task(client.ask(GetCaches(), CachesReply))
    await until(lambda: len(world.asks) == 1)
    process = world.table.processes[next(name for name in world.table.processes if name == "scheduler:0")]
    world.asks.lose(process.spec.name, process.epoch)
    with pytest.raises(AdminError, match="scheduler:0 ended before it answered"):
        await asked
    process.is_up, process.state = False, "restarting"
    with pytest.raises(AdminError, match=r"scheduler:0 is not up \(restarting\)"):
        await client.ask(GetCaches(), CachesReply)


async def test_a_client_of_no_service_is_told_so_by_its_own_deadline(short_dir: Path) -> None:
    async with AdminClient(f"ipc://{short_dir}/admin.sock") as client:
        with pytest.raises(ServiceSilent, match=r"no answer from ipc://.* within 0.1 s"):
            await client.ask(GetStats(), StatsReply, timeout_s=0.1)


async def test_an_order_that_nobody_took_is_not_carried_out_later(short_dir: Path) -> None:
    async with admin_world(short_dir) as world, AdminClient(world.address) as client:
        await client.ask(GetStats(), StatsReply)
        world.stop()
        with pytest.raises(ServiceSilent):
            await client.ask(BeginDrain(), DrainReply, timeout_s=0.2)
        world.start()
        await client.ask(GetStats(), StatsReply)
        assert not world.desk.draining


async def test_a_mistake_of_ours_is_an_answer_and_the_next_request_is_answered(
    world: AdminWorld, client: AdminClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(world.desk, "_cancel", broken)
    monkeypatch.setattr(world.desk, "stats", broken)
    with pytest.raises(AdminError, match=r"internal error: RuntimeError\('planted'\)"):
        await client.ask(CancelOne("x"), CancelReply)
    with pytest.raises(AdminError, match=r"internal error: RuntimeError\('planted'\)"):
        await client.ask(GetStats(), StatsReply)
    await client.ask(GetCaches(), CachesReply)


# ---------------------------------------------------------------- garbage


def garbage(rng: random.Random) -> list[bytes]:
    """Frames that are no request, some of them nearly one."""
    header, body = encode_admin_header(rng.randrange(1 << 40)), encode_admin_body(CancelOne("x"))
    kind = rng.randrange(8)
    match kind:
        case 0:
            return [rng.randbytes(rng.randrange(200)) for _ in range(rng.randrange(5))] or [b""]
        case 1:
            return [header, rng.randbytes(rng.randrange(1, 300))]
        case 2:
            return [header, body[: rng.randrange(len(body))]]
        case 3:
            position = rng.randrange(len(body))
            return [header, body[:position] + bytes([body[position] ^ (1 << rng.randrange(8))]) + body[position + 1 :]]
        case 4:
            return [msgspec.msgpack.encode([rng.choice((0, 2, "1", None)), 1]), body]
        case 5:
            return [header, b"\x81" * 3000]  # maps within maps
        case 6:
            return [header, msgspec.msgpack.encode({"type": "CancelOne", "id": "x" * 300})]
        case _:
            return [header, msgspec.msgpack.encode({"type": rng.choice(("Nothing", "SetLevel")), "level": 7})]


async def test_garbage_is_counted_and_dropped_and_the_next_request_answered(world: AdminWorld) -> None:
    rng = random.Random(7)
    num_sent = 0
    with raw_socket(world) as socket:
        async with AdminClient(world.address) as client:
            for _ in range(60):
                for _ in range(10):
                    socket.send_multipart(garbage(rng))
                    num_sent += 1
                await client.ask(GetStats(), StatsReply)
            await until(lambda: world.bad_frames() + len(cancels(world)) >= num_sent)
    assert world.bad_frames() + len(cancels(world)) == num_sent  # one changed bit may leave a request
    assert world.bad_frames() > 0.9 * num_sent


def cancels(world: AdminWorld) -> list[object]:
    return [question for _, question in world.asked if isinstance(question, CancelRequest)]


async def test_a_frame_that_is_too_long_ends_its_connection_and_no_other(
    world: AdminWorld, client: AdminClient
) -> None:
    with raw_socket(world) as socket:
        socket.send_multipart([encode_admin_header(1), b"\0" * (MAX_REQUEST_BYTES + 1)])
        await client.ask(GetStats(), StatsReply)
    assert world.asked == []


async def test_bytes_that_are_not_zeromq_change_nothing(world: AdminWorld, client: AdminClient) -> None:
    path = world.address.removeprefix("ipc://")
    rng = random.Random(3)
    for _ in range(20):
        _, writer = await asyncio.open_unix_connection(path)
        writer.write(rng.randbytes(rng.randrange(1, 5000)))
        await writer.drain()
        writer.close()
        await client.ask(GetStats(), StatsReply)


async def test_another_version_of_the_protocol_is_refused_like_garbage(world: AdminWorld) -> None:
    with raw_socket(world) as socket:
        socket.send_multipart([msgspec.msgpack.encode([ADMIN_PROTOCOL + 1, 1]), STATS])
        await until(lambda: world.bad_frames() == 1)


# ---------------------------------------------------------------- clients that are slow or gone


async def test_a_client_that_does_not_read_costs_the_others_nothing_and_holds_few_replies(world: AdminWorld) -> None:
    with raw_socket(world) as socket:
        socket.setsockopt(zmq.RCVHWM, 1)
        async with AdminClient(world.address) as client:
            for number in range(400):
                socket.send_multipart([encode_admin_header(number), STATS])
                if number % 20 == 0:
                    await client.ask(GetStats(), StatsReply)
        num_kept = 0
        while socket.poll(50):
            socket.recv_multipart()
            num_kept += 1
        assert num_kept < 400  # the rest was dropped, not kept


async def test_more_requests_than_can_be_answered_at_once_are_refused(world: AdminWorld) -> None:
    world.silent = {"scheduler:0"}
    clients = [AdminClient(world.address) for _ in range(8)]
    asked = [
        asyncio.create_task(client.ask(GetCaches(), CachesReply))
        for client in clients
        for _ in range(MAX_ANSWERING // 8 + 1)
    ]
    done, pending = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
    assert "requests are being answered" in str(done.pop().exception())
    for task in pending:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    for client in clients:
        client.close()


async def cycles(world: AdminWorld, count: int) -> None:
    for number in range(count):
        async with AdminClient(world.address) as client:
            await client.ask(GetStats(), StatsReply)
            if number % 3 == 0:  # goes away while an answer is made
                asked = asyncio.create_task(client.ask(GetRequests(), RequestsReply))
                await asyncio.sleep(0)
                asked.cancel()
                await asyncio.gather(asked, return_exceptions=True)


async def check_cycles(world: AdminWorld, count: int, max_growth_bytes: int) -> None:
    process = psutil.Process()
    await cycles(world, 20)  # what is made once
    gc.collect()
    num_before, bytes_before = process.num_fds(), process.memory_info().rss
    await cycles(world, count)
    gc.collect()
    await until(lambda: process.num_fds() <= num_before)
    assert process.memory_info().rss - bytes_before < max_growth_bytes
    assert len(world.asks) == 0


async def test_clients_that_come_and_go_leave_no_descriptor_and_no_memory(world: AdminWorld) -> None:
    await check_cycles(world, 60, 16 << 20)


@pytest.mark.soak
async def test_a_thousand_clients_that_come_and_go_leave_no_descriptor_and_no_memory(world: AdminWorld) -> None:
    await check_cycles(world, 1000, 8 << 20)


async def until(condition: object) -> None:
    assert callable(condition)
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - of the other side's state
            await asyncio.sleep(0.005)
