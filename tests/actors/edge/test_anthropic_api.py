"""POST /v1/messages and count_tokens: answers, events and errors in the form that Anthropic's clients read."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import pytest

from tests.actors.edge.raw import connection
from tests.actors.edge.running import RunningEdge, edge_config, http, running_edge
from tests.pictures import picture
from vlmrt.runtime.config import ApiKey, ServerOptions
from vlmrt.runtime.errors import WireError
from vlmrt.runtime.messages import FinishReason, Submit

ROUTE = "/v1/messages"
TEXT = "There are two red discs."
HELLO = [{"role": "user", "content": "Hello"}]
URL = picture(0).part["image_url"]["url"]
DATA = URL.partition(",")[2]


async def post(edge: RunningEdge, route: str = ROUTE, **fields: Any) -> tuple[int, dict[str, Any]]:
    body = {"model": "model", "messages": HELLO, "max_tokens": 50, **fields}
    async with http() as session, session.post(edge.url + route, json=body) as response:
        return response.status, await response.json()


async def message(edge: RunningEdge, text: str = TEXT, finish_reason: FinishReason = "stop", **fields: Any) -> Any:
    """The whole answer to such a request."""
    call = asyncio.create_task(post(edge, **fields))
    await edge.answer(await edge.submitted(), text, finish_reason)
    status, answer = await call
    assert status == 200, answer
    return answer


async def submit_of(edge: RunningEdge, **fields: Any) -> Submit:
    call = asyncio.create_task(post(edge, **fields))
    submit = await edge.submitted()
    await edge.answer(submit, "x")
    assert (await call)[0] == 200
    return submit


async def chat_submit_of(edge: RunningEdge, messages: list[Any], **fields: Any) -> Submit:
    create: Any = edge.client.chat.completions.create
    call = asyncio.create_task(create(model="model", messages=messages, **fields))
    submit = await edge.submitted()
    await edge.answer(submit, "x")
    await call
    return submit


async def events_of(
    edge: RunningEdge, text: str = TEXT, finish_reason: FinishReason = "stop", **fields: Any
) -> list[Any]:
    """(event, data) of a stream; each event's name is its data's type."""
    async with connection(edge.port) as raw:
        await raw.post({"messages": HELLO, "max_tokens": 50, "stream": True, **fields}, ROUTE)
        await edge.answer(await edge.submitted(), text, finish_reason)
        status, headers = await raw.head()
        assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        return parsed(await raw.body())


def parsed(body: bytes) -> list[Any]:
    events = []
    for block in body.decode().removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


def text_block(text: str) -> dict[str, Any]:
    """As answers have it."""
    return {"type": "text", "text": text, "citations": None}


async def test_an_answer_has_its_blocks_its_reason_and_its_usage(edge: RunningEdge) -> None:
    answer = await message(edge)
    usage = answer.pop("usage")
    assert answer.pop("id").startswith("msg_")
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": "test-model",
        "content": [text_block(TEXT)],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "stop_details": None,
        "container": None,
    }
    assert usage["output_tokens"] == len(edge.ids(TEXT))
    assert usage["input_tokens"] > 0
    assert (usage["cache_read_input_tokens"], usage["cache_creation_input_tokens"]) == (0, 0)


async def test_cached_tokens_are_counted_apart(edge: RunningEdge) -> None:
    call = asyncio.create_task(post(edge))
    submit = await edge.submitted()
    await edge.output(submit, edge.ids("x"), "stop", num_cached_tokens=3)
    usage = (await call)[1]["usage"]
    assert usage["cache_read_input_tokens"] == 3
    assert usage["input_tokens"] == len(submit.prompt_token_ids) - 3


async def test_the_reasons_of_an_end_are_told_apart(edge: RunningEdge) -> None:
    assert (await message(edge, finish_reason="length"))["stop_reason"] == "max_tokens"
    stopped = await message(edge, stop_sequences=["never", " red"])
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", " red")
    assert stopped["content"] == [text_block("There are two")]


async def test_an_answer_of_nothing_has_no_blocks(edge: RunningEdge) -> None:
    call = asyncio.create_task(post(edge))
    submit = await edge.submitted()
    await edge.output(submit, [submit.stop.stop_token_ids[0]], "stop")
    answer = (await call)[1]
    assert (answer["content"], answer["stop_reason"]) == ([], "end_turn")


async def test_a_stream_has_every_event_in_its_place(edge: RunningEdge) -> None:
    events = await events_of(edge)
    deltas = [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"]
    assert [event["type"] for event in events] == [
        "message_start",
        "ping",
        "content_block_start",
        *["content_block_delta"] * len(deltas),
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert len(deltas) > 1
    assert "".join(deltas) == TEXT
    start, end = events[0]["message"], events[-2]
    assert (start["content"], start["stop_reason"], start["usage"]["output_tokens"]) == ([], None, 1)
    assert events[2] == {"type": "content_block_start", "index": 0, "content_block": text_block("")}
    assert end["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert end["usage"]["output_tokens"] == len(edge.ids(TEXT))


async def test_an_error_after_the_stream_began_is_its_last_event(edge: RunningEdge) -> None:
    async with connection(edge.port) as raw:
        await raw.post({"messages": HELLO, "max_tokens": 50, "stream": True}, ROUTE, x_request_id="mine")
        submit = await edge.submitted()
        await edge.output(submit, edge.ids("One"))
        assert (await raw.head())[0] == 200
        await edge.output(submit, error=WireError(503, "lost", "service_unavailable"))
        events = parsed(await raw.body())
    assert events[-1] == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "lost", "param": None, "code": "service_unavailable"},
        "request_id": "mine",
    }


async def test_the_fields_reach_the_scheduler_as_those_of_a_chat(edge: RunningEdge) -> None:
    submit = await submit_of(
        edge,
        system=[{"type": "text", "text": "Be short.", "cache_control": {"type": "ephemeral"}}],
        max_tokens=40,
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        stop_sequences=["!"],
        metadata={"user_id": "me"},
        thinking={"type": "disabled"},
        seed=5,
        cache_salt="s",
    )
    chat = await chat_submit_of(
        edge,
        [{"role": "system", "content": [{"type": "text", "text": "Be short."}]}, *HELLO],
        max_tokens=40,
        temperature=0.5,
        top_p=0.25,
        seed=5,
        stop=["!"],
        extra_body={"top_k": 7, "cache_salt": "s"},
    )
    assert submit.prompt_token_ids == chat.prompt_token_ids
    assert (submit.sampling, submit.stop, submit.cache_salt) == (chat.sampling, chat.stop, chat.cache_salt)


async def test_blocks_make_the_prompt_of_the_same_conversation(edge: RunningEdge) -> None:
    submit = await submit_of(
        edge,
        system="Look well.",
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": DATA}},
                    {"type": "text", "text": "What is this?"},
                    {"type": "image", "source": {"type": "url", "url": URL}},
                ],
            },
            {
                "role": "assistant",
                "content": [{"type": "thinking", "thinking": "...", "signature": ""}, {"type": "text", "text": "A."}],
            },
            {"role": "user", "content": "And?"},
        ],
    )
    image = {"type": "image_url", "image_url": {"url": URL}}
    chat = await chat_submit_of(
        edge,
        [
            {"role": "system", "content": "Look well."},
            {"role": "user", "content": [image, {"type": "text", "text": "What is this?"}, image]},
            {"role": "assistant", "content": [{"type": "text", "text": "A."}]},
            {"role": "user", "content": "And?"},
        ],
    )
    assert submit.prompt_token_ids == chat.prompt_token_ids
    assert [item.mm_hash for item in submit.media] == [item.mm_hash for item in chat.media]
    assert len(submit.media) == 2


async def test_a_last_message_of_the_assistant_is_continued(edge: RunningEdge) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "It is a"}]
    submit = await submit_of(edge, messages=messages)
    begun = edge.ids("It is a")
    assert list(submit.prompt_token_ids[-len(begun) :]) == begun


async def test_tokens_are_counted_without_the_scheduler(edge: RunningEdge) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": DATA}
    messages = [{"role": "user", "content": [{"type": "image", "source": source}, {"type": "text", "text": "What?"}]}]
    async with http() as session:
        body = {"messages": messages, "system": "Be short."}
        async with session.post(edge.url + ROUTE + "/count_tokens", json=body) as response:
            assert response.status == 200
            answer = await response.json()
    assert edge.sent == []
    submit = await submit_of(edge, messages=messages, system="Be short.")
    assert answer == {"input_tokens": len(submit.prompt_token_ids)}


WEATHER = {
    "name": "get_weather",
    "description": "Weather of a town",
    "input_schema": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
}
KOELN = '{"town": "Köln"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {KOELN}}}\n</tool_call>'
CHAT_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a town",
        "parameters": WEATHER["input_schema"],
    },
}


async def test_calls_are_blocks_of_their_own(edge: RunningEdge) -> None:
    answer = await message(edge, f"Let me see.\n{CALL}\n{CALL}", tools=[WEATHER])
    text, first, second = answer["content"]
    assert text == text_block("Let me see.")
    assert first.pop("id") != second.pop("id")
    called = {"type": "tool_use", "name": "get_weather", "input": {"town": "Köln"}, "caller": {"type": "direct"}}
    assert first == second == called
    assert answer["stop_reason"] == "tool_use"


async def test_calls_are_streamed_as_blocks_of_their_own(edge: RunningEdge) -> None:
    events = await events_of(edge, f"Let me see.\n{CALL}", tools=[WEATHER])
    starts = [event for event in events if event["type"] == "content_block_start"]
    assert [(event["index"], event["content_block"]["type"]) for event in starts] == [(0, "text"), (1, "tool_use")]
    assert starts[1]["content_block"]["input"] == {}
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta" and event["index"] == 1]
    assert {delta["type"] for delta in deltas} == {"input_json_delta"}
    assert json.loads("".join(delta["partial_json"] for delta in deltas)) == {"town": "Köln"}
    assert [event["index"] for event in events if event["type"] == "content_block_stop"] == [0, 1]
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


async def test_a_call_that_was_cut_has_no_input_yet_the_body_is_json(edge: RunningEdge) -> None:
    choice = {"type": "tool", "name": "get_weather"}
    answer = await message(edge, '{"town": "Kö', "length", tools=[WEATHER], tool_choice=choice)
    assert answer["stop_reason"] == "max_tokens"
    assert [block["input"] for block in answer["content"]] == [{}]


async def test_calls_and_their_results_make_the_prompt_of_the_same_chat(edge: RunningEdge) -> None:
    messages = [
        *HELLO,
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"town": "Köln"}},
                {"type": "tool_use", "id": "t2", "name": "get_weather", "input": {"town": "Bonn"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "rain"},
                {"type": "tool_result", "tool_use_id": "t2", "content": [{"type": "text", "text": "sun"}]},
                {"type": "text", "text": "And?"},
            ],
        },
    ]
    submit = await submit_of(edge, tools=[WEATHER], messages=messages)

    def call(call_id: str, town: str) -> dict[str, Any]:
        function = {"name": "get_weather", "arguments": json.dumps({"town": town})}
        return {"id": call_id, "type": "function", "function": function}

    chat = await chat_submit_of(
        edge,
        [
            *HELLO,
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "Let me see."}],
                "tool_calls": [call("t1", "Köln"), call("t2", "Bonn")],
            },
            {"role": "tool", "tool_call_id": "t1", "content": "rain"},
            {"role": "tool", "tool_call_id": "t2", "content": [{"type": "text", "text": "sun"}]},
            {"role": "user", "content": [{"type": "text", "text": "And?"}]},
        ],
        tools=[CHAT_WEATHER],
    )
    assert submit.prompt_token_ids == chat.prompt_token_ids
    async with http() as session:
        body = {"messages": messages, "tools": [WEATHER]}
        async with session.post(edge.url + ROUTE + "/count_tokens", json=body) as response:
            assert await response.json() == {"input_tokens": len(submit.prompt_token_ids)}


@pytest.mark.parametrize(
    ("choice", "same"),
    [
        ({"type": "any"}, {"tool_choice": "required"}),
        ({"type": "any", "disable_parallel_tool_use": True}, {"tool_choice": "required", "parallel_tool_calls": False}),
        (
            {"type": "tool", "name": "get_weather"},
            {"tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
        ),
        ({"type": "auto"}, {"tool_choice": "auto"}),
        ({"type": "none"}, {"tool_choice": "none"}),
    ],
)
async def test_choices_of_tools_are_those_of_a_chat(
    choice: dict[str, Any], same: dict[str, Any], edge: RunningEdge
) -> None:
    submit = await submit_of(edge, tools=[WEATHER], tool_choice=choice)
    chat = await chat_submit_of(edge, HELLO, tools=[CHAT_WEATHER], **same)
    assert submit.sampling.grammar == chat.sampling.grammar
    assert bool(submit.sampling.grammar) == (choice["type"] in ("any", "tool"))
    assert submit.prompt_token_ids == chat.prompt_token_ids


def said(*blocks: dict[str, Any], role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(blocks)}]}


BLOCK = "messages[0].content[0]"
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"max_tokens": None}, "max_tokens", "missing_field"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"messages": None}, "messages", "invalid_value"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_field"),
    (said(), "messages[0].content", "invalid_value"),
    (said({"text": "x"}), f"{BLOCK}.type", "missing_field"),
    (said({"type": "document", "source": {"type": "text"}}), f"{BLOCK}.type", "unsupported_part"),
    (said({"type": "text"}), f"{BLOCK}.text", "missing_field"),
    (said({"type": "image"}), f"{BLOCK}.source", "missing_field"),
    (said({"type": "image", "source": {"type": "file", "file_id": "f"}}), f"{BLOCK}.source.type", "unsupported_value"),
    (
        said({"type": "image", "source": {"type": "base64", "data": "AA"}}),
        f"{BLOCK}.source.media_type",
        "missing_field",
    ),
    (
        said({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "!"}}),
        f"{BLOCK}.source.data",
        "invalid_image_url",
    ),
    (said({"type": "image", "source": {"type": "url", "url": "x"}}), f"{BLOCK}.source.url", "invalid_image_url"),
    (said({"type": "tool_use", "id": "t", "name": "f", "input": {}}), f"{BLOCK}.type", "invalid_value"),
    (said({"type": "tool_use", "name": "f"}, role="assistant"), f"{BLOCK}.id", "missing_field"),
    (
        said({"type": "tool_use", "id": "t", "name": "f", "input": 5}, role="assistant"),
        f"{BLOCK}.input",
        "invalid_value",
    ),
    (said({"type": "tool_result"}), f"{BLOCK}.tool_use_id", "missing_field"),
    ({"system": [{"type": "image"}]}, "system[0].source", "missing_field"),
    ({"stop_sequences": [""]}, "stop_sequences", "invalid_value"),
    ({"temperature": 5}, "temperature", "invalid_value"),
    ({"n": 2}, "n", "invalid_value"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema", "missing_field"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type", "unsupported_value"),
    ({"tool_choice": {"type": "tool"}}, "tool_choice.name", "missing_field"),
    ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "f"}}, "tool_choice.name", "invalid_value"),
    ({"tools": [{**WEATHER, "input_schema": [1]}]}, "tools[0].input_schema", "invalid_value"),
    ({"messages": [{"role": "user", "content": "a b " * 5000}]}, "messages", "context_length_exceeded"),
]


@pytest.mark.parametrize(("fields", "param", "code"), WRONG, ids=[f"{w[1]} {n}" for n, w in enumerate(WRONG)])
async def test_a_wrong_request_names_its_own_field_and_reaches_nobody(
    fields: dict[str, Any], param: str, code: str, edge: RunningEdge
) -> None:
    status, answer = await post(edge, **fields)
    assert status == 400
    assert set(answer) == {"type", "error", "request_id"}
    assert answer["type"] == "error"
    error = answer["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code), error
    assert param in error["message"] or code == "context_length_exceeded"
    assert edge.sent == []


async def test_every_error_of_the_route_has_its_form(checkpoint: Path, tmp_path: Path) -> None:
    config = edge_config(checkpoint, server=ServerOptions(api_keys=(ApiKey.of("k"),)))
    key = {"x-api-key": "k"}
    cases: list[tuple[str, str, dict[str, Any], int, str]] = [
        ("POST", ROUTE, {"json": {}}, 401, "authentication_error"),
        ("GET", ROUTE, {"headers": key}, 405, "invalid_request_error"),
        ("POST", ROUTE + "/batches", {"headers": key, "json": {}}, 404, "not_found_error"),
        ("POST", ROUTE, {"headers": key, "data": b"x"}, 415, "invalid_request_error"),
        (
            "POST",
            ROUTE,
            {"headers": {**key, "Content-Type": "application/json"}, "data": b"{"},
            400,
            "invalid_request_error",
        ),
        (
            "POST",
            ROUTE,
            {"headers": key, "json": {"model": "gpt-9", "messages": HELLO, "max_tokens": 1}},
            404,
            "not_found_error",
        ),
        ("POST", ROUTE + "/count_tokens", {"headers": key, "json": {}}, 400, "invalid_request_error"),
        ("POST", ROUTE, {"headers": {**key, "Host": "evil.example"}, "json": {}}, 403, "permission_error"),
    ]
    async with running_edge(config, tmp_path) as edge, http() as session:
        for method, path, options, status, kind in cases:
            async with session.request(method, edge.url + path, **options) as response:
                answer = await response.json()
                assert (response.status, answer["error"]["type"]) == (status, kind), (path, options)
                assert answer["type"] == "error"
                assert answer["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
        assert edge.sent == []


async def test_base64_of_the_wrong_bytes_is_the_clients_error(edge: RunningEdge) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(b"hello").decode()}
    status, answer = await post(edge, **said({"type": "image", "source": source}))
    assert status == 400
    assert (answer["error"]["code"], answer["error"]["param"]) == ("invalid_image", f"{BLOCK}.source.data")
