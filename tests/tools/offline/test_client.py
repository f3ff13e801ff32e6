"""The client: bounded, in order of arrival, tried again where that helps, pictures by name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.pictures import noise
from vlmrt.runtime.errors import RequestError
from vlmrt.tools.offline import client as client_module
from vlmrt.tools.offline.client import CHAT_PATH, Answered, Client, Gate, Request, Result
from vlmrt.tools.offline.messages import PictureStore

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serving(path: str, handler: Handler, max_choices: int = 4) -> AsyncIterator[Client]:
    app = web.Application(client_max_size=1 << 24)
    app.add_routes([web.post(CHAT_PATH, handler)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.UnixSite(runner, path).start()
    with ThreadPoolExecutor(1) as executor:
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(path, limit=0)) as session:
            yield Client(session, executor, max_choices)
    await runner.cleanup()


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("c") / "s")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_LOST_PAUSE_S", 0.0)
    monkeypatch.setattr(client_module, "_MAX_PAUSE_S", 0.0)


def request(content: object = "hello", num_choices: int = 1) -> Request:
    return Request(CHAT_PATH, {"messages": [{"role": "user", "content": content}]}, num_choices)


async def content_of(request: web.Request) -> Any:
    return (await request.json())["messages"][-1]["content"]


def refusal(status: int, code: str, **headers: str) -> web.Response:
    error = {"message": code, "type": "t", "param": None, "code": code}
    return web.json_response({"error": error}, status=status, headers=headers)


async def each(*requests: Request | RequestError) -> AsyncIterator[Request | RequestError]:
    for one in requests:
        yield one


@pytest.mark.parametrize("status", [429, 503])
async def test_a_busy_service_is_asked_again(status: int, path: str) -> None:
    answers = iter([refusal(status, "busy", **{"Retry-After": "1"}) for _ in range(5)])

    async def handler(request: web.Request) -> web.StreamResponse:
        return next(answers, web.Response(body=b"{}", headers={client_module.IGNORED_FIELDS: "colour"}))

    async with serving(path, handler) as client:
        assert await client.answer(request()) == Answered(b"{}", "colour")


@pytest.mark.parametrize("status", [400, 404, 413, 500, 503, 504])
async def test_what_fails_for_good_is_asked_once(status: int, path: str) -> None:
    asked = []

    async def handler(request: web.Request) -> web.StreamResponse:
        asked.append(1)
        return refusal(status, "bad") if status != 500 else web.Response(text="no JSON", status=500)

    async with serving(path, handler) as client:
        error = await client.answer(request())
    assert isinstance(error, RequestError)
    assert error.status == status
    assert error.message == ("bad" if status != 500 else "status 500: no JSON")
    assert len(asked) == 1


@pytest.mark.parametrize("num_lost", [2, 3])
async def test_a_lost_connection_is_tried_three_times(num_lost: int, path: str) -> None:
    lost = iter(range(num_lost))

    async def handler(request: web.Request) -> web.StreamResponse:
        if next(lost, None) is not None:
            assert request.transport is not None
            request.transport.abort()
        return web.Response(body=b"{}")

    async with serving(path, handler) as client:
        result = await client.answer(request())
    if num_lost == 2:
        assert result == Answered(b"{}")
    else:
        assert isinstance(result, RequestError)
        assert result.code == "connection_lost"


async def test_no_more_answers_are_asked_for_at_once_than_allowed(path: str) -> None:
    running, most = 0, 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal running, most
        running += 1 if await content_of(request) == "one" else 3
        most = max(most, running)
        await asyncio.sleep(0.005)
        running -= 1 if await content_of(request) == "one" else 3
        return web.Response(body=b"{}")

    results: dict[int, Result] = {}
    asked = [request("one") if index % 2 else request("three", 3) for index in range(20)]
    async with serving(path, handler, max_choices=4) as client:
        await client.answer_all(each(*asked), results.__setitem__)
    assert sorted(results) == list(range(20))
    assert most == 4


@pytest.mark.parametrize("messages", [5, None, "text", {"role": "user"}, [5], [{"role": "user", "content": 5}]])
async def test_what_are_no_messages_is_for_the_service_to_say(messages: object, path: str) -> None:
    asked: list[object] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        asked.append((await request.json())["messages"])
        return refusal(400, "invalid_value")

    async with serving(path, handler) as client:
        result = await client.answer(Request(CHAT_PATH, {"messages": messages}))
    assert isinstance(result, RequestError)
    assert (result.code, asked) == ("invalid_value", [messages])


async def test_an_error_among_the_requests_is_its_own_result(path: str) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(body=b"{}")

    error = RequestError("no JSON")
    results: dict[int, Result] = {}
    async with serving(path, handler) as client:
        await client.answer_all(each(request(), error, request()), results.__setitem__)
    assert results == {0: Answered(b"{}"), 1: error, 2: Answered(b"{}")}


async def test_an_output_that_cannot_be_written_ends_the_batch(path: str) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(body=b"{}")

    def deliver(index: int, result: Result) -> None:
        raise OSError("disk full")

    async with serving(path, handler) as client:
        with pytest.raises(OSError, match="disk full"):
            await client.answer_all(each(request(), request()), deliver)


async def test_a_value_that_cannot_be_sent_fails_alone(path: str) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(body=b"{}")

    async with serving(path, handler) as client:
        result = await client.answer(Request(CHAT_PATH, {"messages": [], "tools": object()}))
    assert isinstance(result, RequestError)
    assert "a object cannot be sent" in result.message


async def test_a_file_that_is_no_picture_any_more_fails_alone(path: str, tmp_path: Any) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"x")
    messages = PictureStore().messages([{"role": "user", "content": [{"type": "image", "image": file}]}], "m")
    file.unlink()

    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(body=b"{}")

    async with serving(path, handler) as client:
        result = await client.answer(Request(CHAT_PATH, {"messages": messages}))
    assert isinstance(result, RequestError)
    assert str(file) in result.message


async def test_a_picture_goes_by_name_once_it_was_answered_and_again_in_full_when_forgotten(path: str) -> None:
    sent: list[str] = []
    forgets = True

    async def handler(request: web.Request) -> web.StreamResponse:
        (part,) = await content_of(request)
        sent.append("bytes" if "image_url" in part else "name")
        assert len(part["uuid"]) <= 128
        if forgets and len(sent) == 3:
            return refusal(400, "media_not_cached")
        return web.Response(body=b"{}")

    image = noise(300, 200, 1)
    async with serving(path, handler) as client:
        for _ in range(3):
            store = PictureStore()
            for _ in range(2):
                messages = store.messages([{"role": "user", "content": [{"type": "image", "image": image}]}], "m")
                result = await client.answer(Request(CHAT_PATH, {"messages": messages}))
                assert result == Answered(b"{}")
    assert sent == ["bytes", "name", "name", "bytes", "name", "name", "name"]


async def test_a_gate_lets_in_by_order_of_arrival_and_forgets_who_gave_up() -> None:
    gate = Gate(4)
    entered = []

    async def enter(name: str, weight: int) -> None:
        await gate.enter(weight)
        entered.append(name)

    async with asyncio.timeout(5):
        await enter("a", 3)
        large = asyncio.create_task(enter("large", 4))
        small = asyncio.create_task(enter("small", 1))
        await asyncio.wait({large, small}, timeout=0.01)
        assert entered == ["a"]  # the small one would fit, but the large one came before it
        large.cancel()
        await small
        gate.leave(3)
        gate.leave(1)
        async with gate.passing(9):  # more than the whole: alone
            assert entered == ["a", "small"]
        await enter("all", 4)
