"""--log-requests: one line for each request, with ids, tokens and times, and nothing that a client wrote."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.actors.edge.raw import connection
from tests.actors.edge.running import RunningEdge, edge_config, http, running_edge
from vlmrt.runtime.config import ServerOptions
from vlmrt.runtime.errors import WireError
from vlmrt.runtime.logs import ACCESS_LOGGER, TextFormatter

CHAT = "/v1/chat/completions"
SAYING = "a very private question"
HELLO = {"model": "model", "messages": [{"role": "user", "content": SAYING}]}
LOGGED = ServerOptions(log_requests=True)


def lines(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == ACCESS_LOGGER]


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=ACCESS_LOGGER)


async def post(edge: RunningEdge, label: str, **fields: Any) -> tuple[int, bytes]:
    headers = {"x-request-id": label}
    async with http() as session, session.post(edge.url + CHAT, json={**HELLO, **fields}, headers=headers) as response:
        return response.status, await response.read()


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_is_a_line_with_ids_tokens_and_times(
    stream: bool, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_edge(edge_config(checkpoint, server=LOGGED), tmp_path) as edge, edge.answering("Hi there"):
        status, body = await post(edge, "mine-1", stream=stream)
    [record] = lines(caplog)
    fields: dict[str, Any] = record.fields  # type: ignore[attr-defined]
    assert status == 200
    assert record.request_id == "mine-1"  # type: ignore[attr-defined]
    assert fields["answer_id"].encode() in body
    assert (fields["method"], fields["path"], fields["status"]) == ("POST", CHAT, 200)
    assert fields["client"] == "127.0.0.1"
    assert fields["output_tokens"] == len(edge.ids("Hi there"))
    assert fields["prompt_tokens"] > 0
    assert 0 < fields["ttft_s"] <= fields["total_s"]
    assert "error" not in fields
    line = TextFormatter("edge:0", in_colour=False).format(record)
    assert f"edge:0: 127.0.0.1 POST {CHAT} 200 after " in line
    assert line.endswith(f"{fields['answer_id']} [mine-1]")
    assert "private" not in line + json.dumps(fields)


async def test_a_refused_request_is_a_line_with_its_error(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_edge(edge_config(checkpoint, server=LOGGED), tmp_path) as edge:
        status, _ = await post(edge, "mine-2", temperature=-1)
    [record] = lines(caplog)
    assert status == 400
    assert record.fields["status"] == 400  # type: ignore[attr-defined]
    assert record.fields["error"] == "invalid_value"  # type: ignore[attr-defined]
    assert "answer_id" not in record.fields  # type: ignore[attr-defined]


async def test_a_stream_that_breaks_is_a_line_with_its_error(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_edge(edge_config(checkpoint, server=LOGGED), tmp_path) as edge:
        asked = asyncio.create_task(post(edge, "mine-3", stream=True))
        submit = await edge.submitted()
        await edge.output(submit, edge.ids("Hi"))
        await edge.output(submit, error=WireError(message="lost", status=500, code="internal_error"))
        status, _ = await asked
    [record] = lines(caplog)
    assert status == 200
    assert (record.fields["status"], record.fields["error"]) == (200, "internal_error")  # type: ignore[attr-defined]


async def test_a_client_that_goes_is_a_line_with_499_and_its_own_id(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_edge(edge_config(checkpoint, server=LOGGED), tmp_path) as edge:
        body = json.dumps({**HELLO, "stream": True}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nx-request-id: gone\r\nContent-Length: {len(body)}\r\n\r\n"
        async with connection(edge.port) as raw:
            raw.writer.write(head.encode() + body)
            await edge.submitted()
        await edge.aborted()
    [record] = lines(caplog)
    assert record.fields["status"] == 499  # type: ignore[attr-defined]
    assert record.request_id == "gone"  # type: ignore[attr-defined]
    assert "ttft_s" not in record.fields  # type: ignore[attr-defined]


async def test_requests_of_one_connection_and_at_once_keep_their_ids_apart(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    labels = [f"request-{number}" for number in range(8)]
    async with running_edge(edge_config(checkpoint, server=LOGGED), tmp_path) as edge, edge.answering("Hi there"):
        answers = await asyncio.gather(*(post(edge, label) for label in labels))
        async with http() as session:  # one connection, kept
            for label in labels:
                async with session.get(edge.url + "/version", headers={"x-request-id": label}) as response:
                    await response.read()
    ids = {record.request_id: record.fields.get("answer_id") for record in lines(caplog)[:8]}  # type: ignore[attr-defined]
    assert ids == {label: json.loads(body)["id"] for label, (_, body) in zip(labels, answers, strict=True)}
    assert [record.request_id for record in lines(caplog)[8:]] == labels  # type: ignore[attr-defined]


async def test_no_line_break_of_a_path_reaches_the_log(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_edge(edge_config(checkpoint, server=LOGGED), tmp_path) as edge, http() as session:
        async with session.get(edge.url + "/x%0Aforged%20line?key=" + "k" * 9) as response:
            assert response.status == 404
        async with session.get(edge.url + "/" + "y" * 1000) as response:
            assert response.status == 404
    first, second = (record.getMessage() for record in lines(caplog))
    assert "GET /x%0Aforged%20line 404" in first
    assert "kkk" not in first
    assert len(second) < 300


async def test_probes_are_told_only_when_they_fail(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_edge(edge_config(checkpoint, server=LOGGED), tmp_path) as edge, http() as session:
        for path in ("/health", "/ping", "/metrics"):
            async with session.get(edge.url + path) as response:
                assert response.status == 200
        async with session.post(edge.url + "/health") as response:
            assert response.status == 405
    assert [record.fields["status"] for record in lines(caplog)] == [405]  # type: ignore[attr-defined]


async def test_without_the_option_there_is_no_line(edge: RunningEdge, caplog: pytest.LogCaptureFixture) -> None:
    async with edge.answering("Hi"):
        assert (await post(edge, "mine"))[0] == 200
    assert lines(caplog) == []


async def test_a_failure_of_ours_is_logged_with_the_request(
    edge: RunningEdge, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(edge.actor._link, "check_open", fail)
    assert (await post(edge, "mine-4"))[0] == 500
    [record] = [record for record in caplog.records if record.exc_info]
    assert record.request_id == "mine-4"  # type: ignore[attr-defined]
