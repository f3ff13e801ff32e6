"""POST /v1/responses with the real client: whole, streamed, with pictures, and wrong."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from openai.types.responses import Response

from tests.actors.edge.raw import connection
from tests.actors.edge.running import RunningEdge, http
from tests.pictures import picture
from vlmrt.runtime.errors import WireError
from vlmrt.runtime.messages import FinishReason, Submit

ROUTE = "/v1/responses"
TEXT = "There are two red discs."


def ask(edge: RunningEdge, **fields: Any) -> asyncio.Task[Any]:
    create: Any = edge.client.responses.create
    return asyncio.create_task(create(**{"model": "model", "input": "Hello", **fields}))


async def submit_of(edge: RunningEdge, **fields: Any) -> Submit:
    """What the scheduler is asked for such a request; it is answered then."""
    call = ask(edge, **fields)
    submit = await edge.submitted()
    await edge.answer(submit, "x")
    await call
    return submit


async def chat_submit_of(edge: RunningEdge, messages: list[Any], **fields: Any) -> Submit:
    create: Any = edge.client.chat.completions.create
    call = asyncio.create_task(create(model="model", messages=messages, **fields))
    submit = await edge.submitted()
    await edge.answer(submit, "x")
    await call
    return submit


async def whole(edge: RunningEdge, text: str, finish_reason: FinishReason = "stop", **fields: Any) -> Response:
    call = ask(edge, **fields)
    await edge.answer(await edge.submitted(), text, finish_reason)
    answer: Response = await call
    return answer


async def events_of(edge: RunningEdge, text: str, finish_reason: FinishReason = "stop", **fields: Any) -> list[Any]:
    async def read() -> list[Any]:
        stream = await ask(edge, stream=True, **fields)
        return [event async for event in stream]

    reading = asyncio.create_task(read())
    await edge.answer(await edge.submitted(), text, finish_reason)
    return await reading


async def test_an_answer_has_its_text_its_usage_and_what_was_asked(edge: RunningEdge) -> None:
    asked: dict[str, Any] = {
        "instructions": "Be short.",
        "max_output_tokens": 40,
        "temperature": 0.5,
        "top_p": 0.25,
        "metadata": {"a": "b"},
        "store": True,
        "user": "me",
    }
    answer = await whole(edge, TEXT, **asked)
    assert answer.output_text == TEXT
    assert (answer.object, answer.status, answer.model) == ("response", "completed", "test-model")
    assert answer.id.startswith("resp_")
    assert answer.error is None
    assert answer.incomplete_details is None
    assert [item.type for item in answer.output] == ["message"]
    assert answer.usage is not None
    assert answer.usage.output_tokens == len(edge.ids(TEXT))
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert (answer.instructions, answer.max_output_tokens) == ("Be short.", 40)
    assert (answer.temperature, answer.top_p, answer.metadata, answer.user) == (0.5, 0.25, {"a": "b"}, "me")
    Response.model_validate(answer.model_dump(), strict=True)


async def test_the_fields_reach_the_scheduler_as_those_of_a_chat(edge: RunningEdge) -> None:
    submit = await submit_of(
        edge,
        instructions="Be short.",
        max_output_tokens=40,
        temperature=0.5,
        top_p=0.25,
        extra_body={"top_k": 7, "seed": 5, "cache_salt": "s", "ignore_eos": True, "stop": ["!"], "min_tokens": 2},
    )
    chat = await chat_submit_of(
        edge,
        [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}],
        max_tokens=40,
        temperature=0.5,
        top_p=0.25,
        seed=5,
        stop=["!"],
        extra_body={"top_k": 7, "cache_salt": "s", "ignore_eos": True, "min_tokens": 2},
    )
    assert submit.prompt_token_ids == chat.prompt_token_ids
    assert (submit.sampling, submit.stop, submit.cache_salt) == (chat.sampling, chat.stop, chat.cache_salt)


async def test_items_make_the_prompt_of_the_same_conversation(edge: RunningEdge) -> None:
    image = picture(0).part["image_url"]["url"]
    submit = await submit_of(
        edge,
        input=[
            {"role": "developer", "content": "Look well."},
            {
                "type": "message",
                "role": "user",
                "content": [
                    {"type": "input_text", "text": "What is this?"},
                    {"type": "input_image", "image_url": image, "detail": "low"},
                ],
            },
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {
                "type": "message",
                "id": "msg_1",
                "role": "assistant",
                "status": "completed",
                "content": [{"type": "output_text", "text": "A disc.", "annotations": []}],
            },
            {"role": "user", "content": "Which color?"},
        ],
    )
    chat = await chat_submit_of(
        edge,
        [
            {"role": "developer", "content": "Look well."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is this?"},
                    {"type": "image_url", "image_url": {"url": image, "detail": "low"}},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "A disc."}]},
            {"role": "user", "content": "Which color?"},
        ],
    )
    assert submit.prompt_token_ids == chat.prompt_token_ids
    assert [item.mm_hash for item in submit.media] == [item.mm_hash for item in chat.media]


async def test_an_answers_output_is_the_next_requests_input(edge: RunningEdge) -> None:
    first = await whole(edge, TEXT)
    history: list[Any] = [{"role": "user", "content": "Hello"}, *(item.model_dump() for item in first.output)]
    submit = await submit_of(edge, input=[*history, {"role": "user", "content": "And?"}])
    chat = await chat_submit_of(
        edge,
        [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": TEXT},
            {"role": "user", "content": "And?"},
        ],
    )
    assert submit.prompt_token_ids == chat.prompt_token_ids


async def test_a_stream_has_every_event_in_its_place(edge: RunningEdge) -> None:
    events = await events_of(edge, TEXT)
    kinds = [event.type for event in events]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * len(deltas),
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert len(deltas) > 1
    assert "".join(deltas) == TEXT == events[-1].response.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert len({event.response.id for event in events if hasattr(event, "response")}) == 1
    items = {event.item.id for event in events if hasattr(event, "item")}
    assert {event.item_id for event in events if hasattr(event, "item_id")} == items
    assert len(items) == 1
    assert events[-1].response.usage.output_tokens == len(edge.ids(TEXT))
    for event in events:
        type(event).model_validate(event.model_dump(), strict=True)


async def test_the_last_event_holds_what_the_whole_answer_would(edge: RunningEdge) -> None:
    streamed = (await events_of(edge, TEXT))[-1].response.model_dump()
    answered = (await whole(edge, TEXT)).model_dump()
    for answer in (streamed, answered):
        answer["id"] = answer["output"][0]["id"] = ""
        answer["created_at"] = answer["completed_at"] = 0
    assert streamed == answered


async def test_an_answer_cut_by_its_limit_is_incomplete(edge: RunningEdge) -> None:
    answer = await whole(edge, TEXT, "length")
    assert (answer.status, answer.output_text) == ("incomplete", TEXT)
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert (await events_of(edge, TEXT, "length"))[-1].type == "response.incomplete"


async def test_an_answer_of_nothing_is_an_empty_message(edge: RunningEdge) -> None:
    call = ask(edge)
    submit = await edge.submitted()
    await edge.output(submit, [submit.stop.stop_token_ids[0]], "stop")
    answer = await call
    assert answer.output_text == ""
    assert [item.type for item in answer.output] == ["message"]


async def test_an_error_after_the_stream_began_is_an_event(edge: RunningEdge) -> None:
    async with connection(edge.port) as raw:
        await raw.post({"input": "Hello", "stream": True}, ROUTE)
        submit = await edge.submitted()
        await edge.output(submit, edge.ids("One"))
        status, headers = await raw.head()
        assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        await edge.output(submit, error=WireError(503, "lost", "service_unavailable"))
        body = (await raw.body()).decode()
    kinds = [line.removeprefix("event: ") for line in body.splitlines() if line.startswith("event: ")]
    assert kinds[-2:] == ["error", "response.failed"]
    assert body.endswith("data: [DONE]\n\n")
    last = json.loads(body.split("data: ")[-2])
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": "service_unavailable", "message": "lost"}


async def test_an_error_before_the_first_token_has_its_own_status(edge: RunningEdge) -> None:
    call = ask(edge, stream=True)
    await edge.output(await edge.submitted(), error=WireError(503, "lost", "service_unavailable"))
    with pytest.raises(openai.InternalServerError):
        await call


WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather of a town",
    "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
}
KOELN = '{"town": "Köln"}'
CALLS = (
    f'<tool_call>\n{{"name": "get_weather", "arguments": {KOELN}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "wait", "arguments": {}}\n</tool_call>'
)
WAIT = {"type": "function", "name": "wait", "parameters": None, "strict": None}


def as_chat(tool: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


async def test_calls_are_items_of_their_own(edge: RunningEdge) -> None:
    answer = await whole(edge, f"Let me see.\n{CALLS}", tools=[WEATHER, WAIT])
    text, *calls = (item.model_dump() for item in answer.output)
    assert answer.output_text == "Let me see."
    assert text["type"] == "message"
    assert [(call["type"], call["name"], json.loads(call["arguments"])) for call in calls] == [
        ("function_call", "get_weather", {"town": "Köln"}),
        ("function_call", "wait", {}),
    ]
    assert len({call["call_id"] for call in calls}) == 2
    assert answer.status == "completed"
    assert [tool.name for tool in answer.tools] == ["get_weather", "wait"]  # type: ignore[union-attr]
    Response.model_validate(answer.model_dump(), strict=True)


async def test_calls_are_streamed_as_items_of_their_own(edge: RunningEdge) -> None:
    events = await events_of(edge, f"Let me see.\n{CALLS}", tools=[WEATHER, WAIT])
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.type for item in done] == ["message", "function_call", "function_call"]
    assert [event.output_index for event in events if event.type == "response.output_item.added"] == [0, 1, 2]
    for item in done[1:]:
        deltas = [
            event.delta for event in events if event.type.endswith("arguments.delta") and event.item_id == item.id
        ]
        assert "".join(deltas) == item.arguments
        (end,) = [event for event in events if event.type.endswith("arguments.done") and event.item_id == item.id]
        assert (end.arguments, end.name) == (item.arguments, item.name)
    assert events[-1].type == "response.completed"
    assert [item.model_dump() for item in events[-1].response.output] == [item.model_dump() for item in done]
    assert [event.sequence_number for event in events] == list(range(len(events)))


async def test_calls_and_their_outputs_make_the_prompt_of_the_same_chat(edge: RunningEdge) -> None:
    answer = await whole(edge, f"Let me see.\n{CALLS}", tools=[WEATHER, WAIT])
    ids = [item.call_id for item in answer.output[1:]]  # type: ignore[union-attr]
    submit = await submit_of(
        edge,
        tools=[WEATHER, WAIT],
        parallel_tool_calls=False,
        input=[
            {"role": "user", "content": "Hello"},
            *(item.model_dump() for item in answer.output),
            {"type": "function_call_output", "call_id": ids[0], "output": "rain"},
            {"type": "function_call_output", "call_id": ids[1], "output": [{"type": "input_text", "text": "done"}]},
        ],
    )
    calls = [
        {"id": ids[0], "type": "function", "function": {"name": "get_weather", "arguments": KOELN}},
        {"id": ids[1], "type": "function", "function": {"name": "wait", "arguments": "{}"}},
    ]
    chat = await chat_submit_of(
        edge,
        [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Let me see.", "tool_calls": calls},
            {"role": "tool", "tool_call_id": ids[0], "content": "rain"},
            {"role": "tool", "tool_call_id": ids[1], "content": [{"type": "text", "text": "done"}]},
        ],
        tools=[as_chat(WEATHER), as_chat(WAIT)],
    )
    assert submit.prompt_token_ids == chat.prompt_token_ids


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("fields", "same"),
    [
        ({"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}),
        (
            {"text": {"format": {"type": "json_schema", "name": "s", "schema": SCHEMA, "strict": True}}},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}},
        ),
        (
            {"tools": [WEATHER, WAIT], "tool_choice": {"type": "function", "name": "wait"}},
            {
                "tools": [as_chat(WEATHER), as_chat(WAIT)],
                "tool_choice": {"type": "function", "function": {"name": "wait"}},
            },
        ),
        ({"tools": [WEATHER], "tool_choice": "required"}, {"tools": [as_chat(WEATHER)], "tool_choice": "required"}),
        (
            {
                "tools": [WEATHER, WAIT],
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "required",
                    "tools": [{"type": "function", "name": "wait"}],
                },
            },
            {
                "tools": [as_chat(WEATHER), as_chat(WAIT)],
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {
                        "mode": "required",
                        "tools": [{"type": "function", "function": {"name": "wait"}}],
                    },
                },
            },
        ),
    ],
)
async def test_formats_and_choices_are_the_grammar_of_the_same_chat(
    fields: dict[str, Any], same: dict[str, Any], edge: RunningEdge
) -> None:
    submit = await submit_of(edge, **fields)
    chat = await chat_submit_of(edge, [{"role": "user", "content": "Hello"}], **same)
    assert submit.sampling.grammar == chat.sampling.grammar != ""
    assert submit.prompt_token_ids == chat.prompt_token_ids


def items(*fields: dict[str, Any]) -> dict[str, Any]:
    return {"input": list(fields)}


def part(**fields: Any) -> dict[str, Any]:
    return items({"role": "user", "content": [fields]})


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({}, "input", "missing_field"),
    ({"input": []}, "input", "invalid_value"),
    ({"input": 5}, "input", "invalid_value"),
    ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id", "unsupported_value"),
    ({"input": "x", "conversation": "c"}, "conversation", "unsupported_value"),
    ({"input": "x", "prompt": {"id": "p"}}, "prompt", "unsupported_value"),
    ({"input": "x", "background": True}, "background", "unsupported_value"),
    ({"input": "x", "top_logprobs": 2}, "top_logprobs", "unsupported_value"),
    ({"input": "x", "n": 2}, "n", "invalid_value"),
    ({"input": "x", "max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
    ({"input": "x", "temperature": 3}, "temperature", "invalid_value"),
    ({"input": "x", "truncation": "middle"}, "truncation", "invalid_value"),
    ({"input": "x", "min_tokens": 9, "max_output_tokens": 3}, "min_tokens", "invalid_value"),
    ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0].type", "unsupported_value"),
    ({"input": "x", "tools": [{"type": "function"}]}, "tools[0].name", "missing_field"),
    ({"input": "x", "tool_choice": {"type": "file_search"}}, "tool_choice.type", "unsupported_value"),
    ({"input": "x", "text": {"format": {"type": "xml"}}}, "text.format.type", "unsupported_value"),
    ({"input": "x", "text": {"format": {"type": "json_schema"}}}, "text.format.name", "missing_field"),
    (items({"role": "wizard", "content": "x"}), "input[0].role", "invalid_value"),
    (items({"content": "x"}), "input[0].role", "missing_field"),
    (items({"role": "user"}), "input[0].content", "missing_field"),
    (items({"role": "user", "content": []}), "input[0].content", "invalid_value"),
    (items({"type": "item_reference", "id": "msg_1"}), "input[0].type", "unsupported_value"),
    (items({"type": "function_call", "call_id": "c"}), "input[0].name", "missing_field"),
    (items({"type": "function_call_output", "output": "x"}), "input[0].call_id", "missing_field"),
    (
        items({"type": "function_call", "call_id": "c", "name": "f", "arguments": "["}),
        "input[0].arguments",
        "invalid_value",
    ),
    ({"input": "x", "tools": [{"type": "function", "name": "a b"}]}, "tools[0].name", "invalid_value"),
    (
        {"input": "x", "tools": [WEATHER], "tool_choice": {"type": "function", "name": "f"}},
        "tool_choice.name",
        "invalid_value",
    ),
    ({"input": "x", "tool_choice": "required"}, "tool_choice", "invalid_value"),
    (part(type="input_file"), "input[0].content[0].type", "unsupported_part"),
    (part(type="input_text"), "input[0].content[0].text", "missing_field"),
    (part(type="input_image"), "input[0].content[0].image_url", "missing_field"),
    (part(type="input_image", file_id="f"), "input[0].content[0].file_id", "unsupported_value"),
    (part(type="input_image", image_url="cat.png"), "input[0].content[0].image_url", "invalid_image_url"),
    ({"input": "a b " * 5000}, "input", "context_length_exceeded"),
]


@pytest.mark.parametrize(
    ("body", "param", "code"), WRONG, ids=[f"{param} {n}" for n, (_, param, _) in enumerate(WRONG)]
)
async def test_a_wrong_request_names_its_own_field_and_reaches_nobody(
    body: dict[str, Any], param: str, code: str, edge: RunningEdge
) -> None:
    async with http() as session, session.post(edge.url + ROUTE, json=body) as response:
        answer = await response.json()
    assert response.status == 400
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert (answer["error"]["param"], answer["error"]["code"]) == (param, code), answer
    assert "messages[" not in answer["error"]["message"]
    assert param in answer["error"]["message"] or code == "context_length_exceeded"
    assert edge.sent == []


async def test_an_unknown_model_is_404(edge: RunningEdge) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        await ask(edge, model="gpt-9")
    assert refused.value.code == "model_not_found"


async def test_what_has_no_effect_is_accepted(edge: RunningEdge) -> None:
    await submit_of(
        edge,
        include=["reasoning.encrypted_content"],
        reasoning={"effort": "low"},
        truncation="auto",
        parallel_tool_calls=True,
        tool_choice="auto",
        text={"format": {"type": "text"}, "verbosity": "low"},
        service_tier="auto",
        max_tool_calls=3,
        prompt_cache_key="k",
        stream_options={"include_obfuscation": False},
    )
