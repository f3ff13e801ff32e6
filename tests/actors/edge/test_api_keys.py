"""API keys on every route, and tenants that cannot reach each other's cached work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from hypothesis import given
from hypothesis import strategies as st

from tests.actors.edge.running import SCHEDULER, RunningEdge, edge_config, http, running_edge
from vlmrt.actors.edge.api_keys import OPEN_ROUTES, TENANT, tenant_salt
from vlmrt.actors.edge.openapi import OPERATIONS
from vlmrt.runtime.config import ApiKey, ServerOptions
from vlmrt.runtime.errors import RequestError
from vlmrt.runtime.messages import LookUpMedia, MediaFound

KEYS = (ApiKey.of("k1"), ApiKey.of("k2", "team-a"), ApiKey.of("k3", "team-b"))
OPERATION_IDS = [f"{operation.method} {operation.path}" for operation in OPERATIONS]


@pytest.fixture
async def guarded(checkpoint: Path, tmp_path: Path) -> AsyncIterator[RunningEdge]:
    options = ServerOptions(api_keys=KEYS, admin_routes=True)
    async with running_edge(edge_config(checkpoint, server=options), tmp_path) as edge:
        yield edge


@pytest.mark.parametrize(("method", "path"), [op.key for op in OPERATIONS], ids=OPERATION_IDS)
async def test_every_route_but_the_open_ones_needs_a_key(method: str, path: str, guarded: RunningEdge) -> None:
    url = guarded.url + path.replace("{file}", "style.css")
    async with http() as session, session.request(method, url) as response:
        if path in OPEN_ROUTES:
            assert response.status == 200
            return
        assert response.status == 401
        assert response.headers["WWW-Authenticate"] == "Bearer"
        answer = await response.json()
        assert set(answer) == ({"type", "error", "request_id"} if path.startswith("/v1/messages") else {"error"})
        error = answer["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["code"], error["type"], error["param"]) == ("invalid_api_key", "authentication_error", None)
    assert guarded.sent == []


@pytest.mark.parametrize("path", ["/nowhere", "/v1/embeddings", "/v1//models", "/health/../v1/models", "/health/x"])
async def test_routes_that_are_none_say_nothing_without_a_key(path: str, guarded: RunningEdge) -> None:
    async with http() as session, session.get(guarded.url + path) as response:
        assert response.status == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "Bearer k1"}, 200),
        ({"Authorization": "bearer   k2 "}, 200),
        ({"x-api-key": "k3"}, 200),
        ({"Authorization": "Basic azE6", "x-api-key": "k3"}, 200),
        ({"Authorization": "Bearer K1"}, 401),
        ({"Authorization": "Bearer k1k2"}, 401),
        ({"Authorization": "Bearer k"}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({"Authorization": "Bearer "}, 401),
        ({"Authorization": "Basic k1"}, 401),
        ({"Authorization": "k1"}, 401),
        ({"Authorization": "Bearer none", "x-api-key": "k1"}, 401),
        ({"x-api-key": ""}, 401),
        ({"x-api-key": "k\xe9\u4e2d"}, 401),
        ({"Cookie": "key=k1"}, 401),
        ({}, 401),
    ],
)
async def test_a_key_comes_as_bearer_or_x_api_key(headers: dict[str, str], status: int, guarded: RunningEdge) -> None:
    async with http() as session, session.get(guarded.url + "/v1/models?api_key=k1", headers=headers) as response:
        assert response.status == status


async def test_the_openai_client_raises_its_own_error(guarded: RunningEdge) -> None:
    with pytest.raises(openai.AuthenticationError) as refused:
        await guarded.client.models.list()
    assert refused.value.code == "invalid_api_key"
    allowed = guarded.client.with_options(api_key="k2")
    assert (await allowed.models.list()).data


async def test_a_browser_asks_without_a_key_what_it_may_send(checkpoint: Path, tmp_path: Path) -> None:
    options = ServerOptions(api_keys=KEYS, cors_origins=("https://a.example",))
    asks = {
        "Origin": "https://a.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,x-stainless-lang",
    }
    async with running_edge(edge_config(checkpoint, server=options), tmp_path) as edge, http() as session:
        async with session.options(edge.url + "/v1/chat/completions", headers=asks) as response:
            assert response.status == 204
            assert response.headers["Access-Control-Allow-Headers"] == "authorization,x-stainless-lang"
        async with session.get(edge.url + "/v1/models", headers={"Origin": "https://a.example"}) as response:
            assert response.status == 401  # which the page may read
            assert response.headers["Access-Control-Allow-Origin"] == "https://a.example"


async def test_the_right_key_finds_its_tenant_and_a_served_request(guarded: RunningEdge) -> None:
    client = guarded.client.with_options(api_key="k1")
    async with asyncio.timeout(10), guarded.answering("fine"):
        done = await client.chat.completions.create(model="model", messages=[{"role": "user", "content": "Hello"}])
    assert done.choices[0].message.content == "fine"


ASKED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
    ("/v1/completions", {"prompt": "Hello"}),
    ("/v1/responses", {"input": "Hello"}),
    ("/v1/messages", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 9}),
]


def test_every_route_that_generates_is_asked_below() -> None:
    assert {path for path, _ in ASKED} == {operation.path for operation in OPERATIONS if operation.events}


@pytest.mark.parametrize(("path", "body"), ASKED, ids=[path for path, _ in ASKED])
async def test_the_tenant_stands_before_the_salt_on_every_route(
    path: str, body: dict[str, Any], guarded: RunningEdge
) -> None:
    async def salt(key: str, **fields: str) -> str:
        async with http() as session:
            headers = {"x-api-key": key}
            call = asyncio.create_task(session.post(guarded.url + path, json={**body, **fields}, headers=headers))
            submit = await guarded.submitted()
            await guarded.answer(submit, "x")
            async with await call as response:
                assert response.status == 200
        return submit.cache_salt

    assert [await salt("k1"), await salt("k2"), await salt("k3")] == ["", "team-a ", "team-b "]
    assert [await salt("k1", cache_salt="s"), await salt("k2", cache_salt="s")] == ["s", "team-a s"]
    async with http() as session:
        wrong = {**body, "cache_salt": "team-a s"}
        async with session.post(guarded.url + path, json=wrong, headers={"x-api-key": "k1"}) as response:
            assert response.status == 400
            assert (await response.json())["error"]["param"] == "cache_salt"
    assert guarded.sent == []


@pytest.mark.parametrize("path", ["/tokenize", "/v1/chat/completions"])
async def test_images_are_looked_up_by_name_within_the_tenant(path: str, guarded: RunningEdge) -> None:
    image = {"type": "image_url", "uuid": "sku-1"}
    body: dict[str, Any] = {"messages": [{"role": "user", "content": [image]}], "cache_salt": "s"}
    async with http() as session:
        call = asyncio.create_task(session.post(guarded.url + path, json=body, headers={"x-api-key": "k2"}))
        asked = (await guarded.context.outbox.next()).message
        assert isinstance(asked, LookUpMedia)
        assert asked.cache_salt == "team-a s"
        await guarded.actor.handle(MediaFound(asked.lookup_id, (None,)), SCHEDULER)
        async with await call as response:
            assert (await response.json())["error"]["code"] == "media_not_cached"


def request_of(tenant: str) -> web.Request:
    request = make_mocked_request("POST", "/v1/chat/completions")
    request[TENANT] = tenant
    return request


TENANTS = st.from_regex(r"([\w.:-]{1,8})?", fullmatch=True).filter(str.isascii)
SALTS = st.one_of(st.none(), st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12))


@given(TENANTS, SALTS, TENANTS, SALTS)
def test_no_choice_of_a_salt_meets_another_tenants_work(
    tenant: str, salt: str | None, other: str, other_salt: str | None
) -> None:
    for name, wanted in ((tenant, salt), (other, other_salt)):
        if " " in (wanted or ""):
            with pytest.raises(RequestError, match="cache_salt"):
                tenant_salt(request_of(name), wanted)
            return
    mine, theirs = tenant_salt(request_of(tenant), salt), tenant_salt(request_of(other), other_salt)
    assert (mine == theirs) == ((tenant, salt or "") == (other, other_salt or ""))


def test_a_client_without_tenant_cannot_write_a_tenants_salt() -> None:
    theirs = tenant_salt(request_of("team-a"), "s")
    with pytest.raises(RequestError, match="space"):
        tenant_salt(request_of(""), theirs)
    assert tenant_salt(request_of(""), "s") == "s"
    assert tenant_salt(request_of(""), None) == ""
    assert tenant_salt(make_mocked_request("POST", "/"), "s") == "s"
