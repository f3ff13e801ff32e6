"""Pictures named by uuid, with and without their bytes; and the resets of the caches."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.actors.edge.raw import connection
from tests.actors.edge.running import SCHEDULER, RunningEdge, edge_config, http, running_edge
from tests.pictures import picture
from tests.support import peer_down, peer_up
from vlmrt.actors.edge import scheduler_link
from vlmrt.runtime.config import ServerOptions
from vlmrt.runtime.control_messages import SchedulerReady
from vlmrt.runtime.messages import (
    Abort,
    ActorName,
    CacheReset,
    Decode,
    Epoch,
    ForgetLookUp,
    KnownMedia,
    LookUpMedia,
    MediaFound,
    MediaItem,
    NeedMedia,
    ResetCache,
    Submit,
)

TEXT = {"type": "text", "text": "What is it?"}
UUID = "messages[0].content[0].uuid"


def named(uuid: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "uuid": uuid, **fields}


def sent(index: int, uuid: str) -> dict[str, Any]:
    return {**picture(index).part, "uuid": uuid}


def body(*parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [*parts, TEXT]}], **fields}


class Call:
    """One request under way."""

    def __init__(self, edge: RunningEdge, json: dict[str, Any], route: str = "/v1/chat/completions") -> None:
        self._edge = edge
        self._task = asyncio.create_task(self._post(edge.url + route, json))

    async def _post(self, url: str, json: dict[str, Any]) -> tuple[int, Any]:
        async with http() as session, session.post(url, json=json) as response:
            return response.status, await response.json()

    async def end(self) -> tuple[int, Any]:
        """Status and body."""
        return await self._task

    async def error(self) -> tuple[int, str, str | None]:
        """Status, code and param."""
        status, answer = await self.end()
        return status, answer["error"]["code"], answer["error"]["param"]

    async def lookup(self) -> LookUpMedia:
        message = (await self._edge.context.outbox.next()).message
        assert isinstance(message, LookUpMedia), message
        return message

    async def found(self, lookup: LookUpMedia, *items: KnownMedia | None) -> None:
        await self._edge.actor.handle(MediaFound(lookup.lookup_id, items), SCHEDULER)


async def known_as(edge: RunningEdge, index: int, uuid: str, **fields: Any) -> tuple[Submit, KnownMedia]:
    """A picture sent with its bytes, and what the scheduler then knows of it."""
    call = Call(edge, body(sent(index, uuid), **fields))
    submit = await edge.submitted()
    await edge.answer(submit, "A cat.")
    assert (await call.end())[0] == 200
    (item,) = submit.media
    assert (item.uuid, item.has_bytes) == (uuid, True)
    return submit, KnownMedia(item.mm_hash, item.num_tokens, item.grid_thw)


WITHOUT_BYTES = [
    {},
    {"image_url": None},
    {"image_url": {}},
    {"image_url": ""},
    {"image_url": {"url": ""}},
    {"image_url": {"url": None, "detail": "low"}},
    {"type": "image"},
    {"type": "image", "image": None},
]


@pytest.mark.parametrize("fields", WITHOUT_BYTES, ids=str)
async def test_a_named_picture_gives_the_prompt_that_its_bytes_give(fields: dict[str, Any], edge: RunningEdge) -> None:
    first, known = await known_as(edge, 0, "sku-1", cache_salt="mine")
    call = Call(edge, body(named("sku-1", **fields), cache_salt="mine"))
    lookup = await call.lookup()
    assert (lookup.cache_salt, lookup.uuids) == ("mine", ("sku-1",))
    await call.found(lookup, known)
    submit = await edge.submitted()
    assert submit.lookup_id == lookup.lookup_id > 0
    assert (submit.prompt_token_ids, submit.rope_delta) == (first.prompt_token_ids, first.rope_delta)
    (item,), (named_item,) = first.media, submit.media
    assert named_item == MediaItem(item.mm_hash, item.start, item.num_tokens, item.grid_thw, "sku-1", has_bytes=False)
    await edge.answer(submit, "A cat.")
    status, answer = await call.end()
    assert status == 200
    assert answer["usage"]["prompt_tokens_details"]["image_tokens"] == item.num_tokens
    assert edge.sent == []


async def test_where_both_are_there_the_bytes_win_and_nothing_is_looked_up(edge: RunningEdge) -> None:
    submit, _ = await known_as(edge, 1, "sku-1")
    assert submit.lookup_id == 0
    assert edge.sent == []


async def test_one_lookup_asks_for_all_names_of_a_request_once(edge: RunningEdge) -> None:
    _, one = await known_as(edge, 0, "one")
    _, two = await known_as(edge, 1, "two")
    call = Call(edge, body(named("one"), sent(2, "three"), named("two"), named("one"), named("three")))
    lookup = await call.lookup()
    assert lookup.uuids == ("one", "two")  # the third is in the request itself
    await call.found(lookup, one, two)
    submit = await edge.submitted()
    assert [(item.uuid, item.has_bytes) for item in submit.media] == [
        ("one", False),
        ("three", True),
        ("two", False),
        ("one", False),
        ("three", True),
    ]
    assert submit.media[1].mm_hash == submit.media[4].mm_hash
    need = NeedMedia(submit.request_id, submit.media[0].mm_hash, ActorName("media:0"), Epoch(1))
    await edge.actor.handle(need, SCHEDULER)  # which nobody has the bytes of: not answered
    need = NeedMedia(submit.request_id, submit.media[1].mm_hash, ActorName("media:0"), Epoch(1))
    await edge.actor.handle(need, SCHEDULER)
    decode = (await edge.context.outbox.next()).message
    assert isinstance(decode, Decode)
    assert decode.encoded == picture(2).data
    await edge.answer(submit, "Three.")
    assert (await call.end())[0] == 200


async def test_a_name_that_nobody_knows_is_400_and_forgotten(edge: RunningEdge) -> None:
    _, one = await known_as(edge, 0, "one")
    call = Call(edge, body(named("one"), named("sku-2")))
    lookup = await call.lookup()
    await call.found(lookup, one, None)
    status, answer = await call.end()
    error = answer["error"]
    assert (status, error["code"], error["param"]) == (400, "media_not_cached", "messages[0].content[1].uuid")
    assert error["type"] == "invalid_request_error"
    assert "'sku-2'" in error["message"]
    assert "bytes" in error["message"]
    assert (await edge.context.outbox.next()).message == ForgetLookUp(lookup.lookup_id)
    assert edge.actor.num_open_requests == 0


REFUSED: list[tuple[str, dict[str, Any], str, str | None]] = [
    ("empty", body(named("")), "invalid_value", UUID),
    ("too long", body(named("x" * 129)), "invalid_value", UUID),
    ("a space", body(named("a b")), "invalid_value", UUID),
    ("a line break", body(named("ab\n")), "invalid_value", UUID),
    ("not ASCII", body(named("ä")), "invalid_value", UUID),
    ("a number", body(named(5)), "invalid_value", UUID),
    ("bad beside bytes", body({**picture(0).part, "uuid": "a b"}), "invalid_value", UUID),
    ("null and no bytes", body(named(None)), "missing_field", "messages[0].content[0].image_url"),
    (
        "broken bytes win",
        body(named("sku-1", image_url={"url": "data:image/png;base64,@"})),
        "invalid_image_url",
        "messages[0].content[0].image_url.url",
    ),
    (
        "broken bytes elsewhere",
        body(named("sku-1"), {"type": "image_url", "image_url": "ftp://x"}),
        "invalid_image_url",
        "messages[0].content[1].image_url",
    ),
    (
        "too long a text",
        body(named("sku-1"), {"type": "text", "text": "word " * 3000}),
        "context_length_exceeded",
        "messages",
    ),
    ("too many", body(*[named("sku-1")] * 65), "too_many_images", "messages"),
    ("salt", body(named("sku-1"), cache_salt="x" * 129), "invalid_value", "cache_salt"),
    ("stop token", body(named("sku-1"), stop_token_ids=[2**31 - 1]), "invalid_value", "stop_token_ids"),
    ("min_tokens", body(named("sku-1"), min_tokens=5000), "context_length_exceeded", "min_tokens"),
    ("model", body(named("sku-1"), model="other"), "model_not_found", "model"),
]


@pytest.mark.parametrize(("json", "code", "param"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
async def test_what_can_be_refused_without_the_scheduler_is(
    json: dict[str, Any], code: str, param: str | None, edge: RunningEdge
) -> None:
    status, *seen = await Call(edge, json).error()
    assert status in (400, 404)
    assert seen == [code, param]
    assert edge.sent == []


@pytest.mark.parametrize("uuid", ["x", "~" * 128, "sku/1?a=b&c", '"quoted"'])
async def test_names_within_bounds_are_taken_as_they_are(uuid: str, edge: RunningEdge) -> None:
    call = Call(edge, body(named(uuid)))
    lookup = await call.lookup()
    assert lookup.uuids == (uuid,)
    await call.found(lookup, None)
    assert (await call.error())[1] == "media_not_cached"


async def test_a_prompt_that_its_named_pictures_make_too_long_is_refused_and_the_lookup_forgotten(
    edge: RunningEdge,
) -> None:
    _, known = await known_as(edge, 0, "one")
    call = Call(edge, body(named("one")))
    lookup = await call.lookup()
    await call.found(lookup, KnownMedia(known.mm_hash, 2500, (1, 100, 100)))
    assert await call.error() == (400, "context_length_exceeded", "messages")
    assert (await edge.context.outbox.next()).message == ForgetLookUp(lookup.lookup_id)


@pytest.mark.parametrize("is_answered", [False, True])
async def test_a_client_that_goes_while_a_name_is_looked_up_is_one_forget(is_answered: bool, edge: RunningEdge) -> None:
    _, known = await known_as(edge, 0, "one")
    async with connection(edge.port) as raw:
        await raw.post(body(named("one")))
        lookup = (await edge.context.outbox.next()).message
        assert isinstance(lookup, LookUpMedia)
        raw.close()
        assert (await edge.context.outbox.next()).message == ForgetLookUp(lookup.lookup_id)
    if is_answered:
        await edge.actor.handle(MediaFound(lookup.lookup_id, (known,)), SCHEDULER)
    assert edge.sent == []


async def test_after_the_submit_a_client_that_goes_is_an_abort_and_no_forget(edge: RunningEdge) -> None:
    _, known = await known_as(edge, 0, "one")
    async with connection(edge.port) as raw:
        await raw.post(body(named("one")))
        lookup = (await edge.context.outbox.next()).message
        assert isinstance(lookup, LookUpMedia)
        await edge.actor.handle(MediaFound(lookup.lookup_id, (known,)), SCHEDULER)
        submit = await edge.submitted()
        raw.close()
        assert (await edge.context.outbox.next()).message == Abort(submit.request_id)
    assert edge.sent == []


async def test_a_lookup_that_the_scheduler_does_not_take_is_503(edge: RunningEdge) -> None:
    edge.context.outbox.full.add(SCHEDULER)
    assert (await Call(edge, body(named("one"))).error())[:2] == (503, "service_unavailable")
    edge.context.outbox.full.clear()
    edge.context.outbox.down.add(SCHEDULER)
    assert (await Call(edge, body(named("one"))).error())[:2] == (503, "service_unavailable")
    edge.context.outbox.down.clear()
    await edge.tell_status()
    assert edge.sent == []


@pytest.mark.parametrize("returns_at_once", [False, True])
async def test_a_scheduler_that_dies_before_it_answers_is_503(returns_at_once: bool, edge: RunningEdge) -> None:
    call = Call(edge, body(named("one")))
    lookup = await call.lookup()
    if returns_at_once:
        await edge.actor.peer_up(peer_up(SCHEDULER, SchedulerReady(), epoch=2))
    else:
        await edge.actor.peer_down(peer_down(SCHEDULER))
    assert (await call.error())[:2] == (503, "service_unavailable")
    await call.found(lookup, None)  # of the dead: drops without harm
    assert edge.sent == []


async def test_a_lookup_that_takes_too_long_is_504_and_forgotten(checkpoint: Path, tmp_path: Path) -> None:
    config = edge_config(checkpoint, server=ServerOptions(request_timeout_s=0.2))
    async with running_edge(config, tmp_path) as edge:
        call = Call(edge, body(named("one")))
        lookup = await call.lookup()
        assert (await call.error())[:2] == (504, "request_timeout")
        assert (await edge.context.outbox.next()).message == ForgetLookUp(lookup.lookup_id)


# ---------------------------------------------------------------- resets

RESETS = [("/reset_prefix_cache", "prefix"), ("/reset_mm_cache", "embedding")]


@pytest.mark.parametrize(("route", "kind"), RESETS)
async def test_a_cache_is_reset_when_the_scheduler_says_so(
    route: str, kind: str, checkpoint: Path, tmp_path: Path
) -> None:
    async with running_edge(edge_config(checkpoint, server=ServerOptions(admin_routes=True)), tmp_path) as edge:
        call = Call(edge, {}, route)
        message = (await edge.context.outbox.next()).message
        assert isinstance(message, ResetCache)
        assert message.kind == kind
        await edge.actor.handle(CacheReset(message.reset_id), SCHEDULER)
        assert await call.end() == (200, {"reset": kind})
        await edge.actor.peer_down(peer_down(SCHEDULER))
        assert (await Call(edge, {}, route).error())[:2] == (503, "service_unavailable")


async def test_a_reset_that_is_not_answered_is_504(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_link, "RESET_TIMEOUT_S", 0.05)
    async with running_edge(edge_config(checkpoint, server=ServerOptions(admin_routes=True)), tmp_path) as edge:
        assert (await Call(edge, {}, "/reset_mm_cache").error())[:2] == (504, "request_timeout")


@pytest.mark.parametrize(("route", "kind"), RESETS)
async def test_without_admin_routes_there_are_none(route: str, kind: str, edge: RunningEdge) -> None:
    async with aiohttp.ClientSession() as session, session.post(edge.url + route) as response:
        assert response.status == 404
    assert edge.sent == []
