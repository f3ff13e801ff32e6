"""HTTP around the endpoints: methods, small routes, hints, and what is not HTTP at all."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.actors.edge.raw import connection
from tests.actors.edge.running import RunningEdge, edge_config, http, running_edge
from vlmrt.actors.edge.openapi import OPERATIONS
from vlmrt.runtime.messages import PROTOCOL_VERSION

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


def error_of(body: bytes) -> dict[str, Any]:
    """The error of a body that has its four keys and nothing else, but for what Anthropic's has beside it."""
    answer = json.loads(body)
    assert set(answer) - {"type", "request_id"} == {"error"}
    error: dict[str, Any] = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    "sent",
    [
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # somebody speaks TLS
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nbroken\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"a" * 40_000 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: many\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
async def test_what_is_not_http_is_an_error_body_and_no_traceback(
    sent: bytes, edge: RunningEdge, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        async with connection(edge.port) as raw:
            raw.writer.write(sent)
            status, headers = await raw.head()
            async with asyncio.timeout(20):
                body = await raw.reader.read()
    assert status == 400
    assert headers["content-type"].startswith("application/json")
    assert error_of(body)["code"] == "invalid_http"
    assert caplog.records == []
    assert edge.sent == []


async def test_an_expectation_that_cannot_be_met_is_417(edge: RunningEdge) -> None:
    async with http() as session, session.post(edge.url + CHAT, json=HELLO, headers={"Expect": "cake"}) as response:
        assert response.status == 417
        assert error_of(await response.read())["code"] == "expectation_failed"
    assert edge.sent == []


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.path)
async def test_every_route_names_its_methods(operation: Any, edge: RunningEdge) -> None:
    if operation.admin:
        pytest.skip("not without --admin-routes")
    allowed = {"POST"} if operation.method == "post" else {"GET", "HEAD"}
    async with http() as session:
        for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "TRACE"):
            if method not in allowed:
                async with session.request(method, edge.url + operation.path) as response:
                    assert response.status == 405, method
                    assert set(response.headers["Allow"].split(",")) == allowed
                    body = await response.read()
                    assert body == b"" if method == "HEAD" else error_of(body)["code"] == "method_not_allowed"
        async with session.options(edge.url + operation.path) as response:
            assert response.status == 204
            assert set(response.headers["Allow"].split(", ")) == {*allowed, "OPTIONS"}
            assert await response.read() == b""
        async with session.options(edge.url + "/nowhere") as response:
            assert response.status == 404
    assert edge.sent == []


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/version", "/v1/models/unknown", "/nowhere"])
async def test_head_is_get_without_the_body(path: str, edge: RunningEdge) -> None:
    async with http() as session:
        async with session.get(edge.url + path) as response:
            got = response.status, response.content_type, response.headers["Content-Length"]
        async with session.head(edge.url + path) as response:
            assert (response.status, response.content_type, response.headers["Content-Length"]) == got
            assert await response.read() == b""


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/v1/embeddings", "no text embeddings"),
        ("/v1/audio/transcriptions", "not sound"),
        ("/v1/files/file-1", "keeps no files"),
        ("/v1/embeddingsx", "there is no such route"),
        ("/chat/completions", "did you mean /v1/chat/completions?"),
        ("/v1/v1/chat/completions", "did you mean /v1/chat/completions?"),
        ("/v1/chat/completion", "did you mean /v1/chat/completions?"),
        ("/models", "did you mean /v1/models?"),
        ("/nowhere/at/all", "there is no such route"),
    ],
)
async def test_a_route_that_is_none_says_why_or_which_is_near(path: str, says: str, edge: RunningEdge) -> None:
    async with http() as session, session.post(edge.url + path, json={}) as response:
        assert response.status == 404
        error = error_of(await response.read())
    assert says in error["message"]
    assert error["code"] == "route_not_found"
    assert ("did you mean" in error["message"]) == ("did you mean" in says)


@pytest.mark.parametrize("content_type", ["multipart/form-data; boundary=x", "text/plain", "application/jsonx"])
async def test_a_body_of_another_type_is_refused(content_type: str, edge: RunningEdge) -> None:
    headers = {"Content-Type": content_type}
    async with http() as session, session.post(edge.url + CHAT, data=json.dumps(HELLO), headers=headers) as response:
        assert response.status == 415
        assert error_of(await response.read())["code"] == "unsupported_media_type"
    assert edge.sent == []


async def test_a_body_without_a_type_is_read_as_json(edge: RunningEdge) -> None:
    body = json.dumps(HELLO).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    async with edge.answering("fine"), connection(edge.port) as raw:
        raw.writer.write(head.encode() + body)
        status, _ = await raw.head()
        async with asyncio.timeout(20):
            answer = json.loads(await raw.reader.read())
    assert status == 200
    assert answer["choices"][0]["message"]["content"] == "fine"


async def test_load_counts_the_requests_that_are_open(edge: RunningEdge) -> None:
    async with http() as session:

        async def load() -> Any:
            async with session.get(edge.url + "/load") as response:
                return await response.json()

        assert await load() == {"server_load": 0}
        call = asyncio.create_task(edge.client.chat.completions.create(model="model", messages=HELLO["messages"]))  # type: ignore[arg-type]
        submit = await edge.submitted()
        assert await load() == {"server_load": 1}
        await edge.answer(submit, "fine")
        await call
        assert await load() == {"server_load": 0}


async def test_version_and_model_cards_have_their_fields(checkpoint: Path, tmp_path: Path) -> None:
    config = edge_config(checkpoint, model={"served_names": ("org/Qwen2-VL", "short")})
    async with running_edge(config, tmp_path) as edge, http() as session:
        async with session.get(edge.url + "/version") as response:
            assert await response.json() == {"version": "0.1.0", "protocol": PROTOCOL_VERSION, "fault_hooks": False}
        async with session.get(edge.url + "/v1/models") as response:
            listed = (await response.json())["data"]
        assert [card["id"] for card in listed] == ["org/Qwen2-VL", "short"]
        for card in listed:
            assert card | {"created": 0} == {
                "id": card["id"],
                "object": "model",
                "created": 0,
                "owned_by": "vlmrt",
                "root": "org/Qwen2-VL",
                "max_model_len": 2048,
            }
            async with session.get(f"{edge.url}/v1/models/{card['id']}") as response:
                assert await response.json() == card
        for wrong, says in (("org/qwen2-vl-", "did you mean 'org/Qwen2-VL'?"), ("gpt-9", "served here: org/Qwen2-VL")):
            async with session.get(f"{edge.url}/v1/models/{wrong}") as response:
                assert response.status == 404
                error = error_of(await response.read())
            assert says in error["message"]
            assert (error["code"], error["param"]) == ("model_not_found", "model")
