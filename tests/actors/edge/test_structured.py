"""Formats and tools through the endpoint: what the scheduler is asked for, and what clients are told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.actors.edge.grammars import Vocabulary, load_vocabulary, with_call_marks
from tests.actors.edge.running import MODEL, RunningEdge, edge_config, running_edge
from tests.actors.edge.test_generation import HELLO, create, events
from vlmrt.runtime.messages import Submit
from vlmrt.tools.checkpoint import make_checkpoint

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a town",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string"}},
            "required": ["town"],
            "additionalProperties": False,
        },
    },
}
WAIT = {"type": "function", "function": {"name": "wait"}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
KOELN = '{"town": "Köln"}'
CALLS = (
    f'<tool_call>\n{{"name": "get_weather", "arguments": {KOELN}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "wait", "arguments": {}}\n</tool_call>'
)


@pytest.fixture(scope="module")
def vocabulary(checkpoint: Path) -> Vocabulary:
    return load_vocabulary(checkpoint)


@pytest.fixture(params=["text", "special tokens"])
async def any_edge(request: pytest.FixtureRequest, tmp_path: Path, checkpoint: Path) -> AsyncIterator[RunningEdge]:
    """Also one whose tokenizer has the marks of calls as special tokens."""
    directory = checkpoint
    if request.param != "text":
        directory = make_checkpoint(tmp_path / "checkpoint", "test-qwen2-vl", weights=False)
        file = directory / "tokenizer.json"
        file.write_text(with_call_marks(file.read_text(encoding="utf-8"), special=True), encoding="utf-8")
    async with running_edge(edge_config(directory), tmp_path) as running:
        yield running


async def grammar_of(edge: RunningEdge, **fields: Any) -> str:
    call = asyncio.create_task(create(edge, **fields))
    submit = await edge.submitted()
    await edge.output(submit, edge.ids("x"), "length")
    await call
    return submit.sampling.grammar


async def prompt_of(edge: RunningEdge, **fields: Any) -> str:
    call = asyncio.create_task(create(edge, **fields))
    submit = await edge.submitted()
    await edge.output(submit, edge.ids("x"), "stop")
    await call
    return prompt_text(edge, submit)


def prompt_text(edge: RunningEdge, submit: Submit) -> str:
    text: str = edge.tokenizer.decode(submit.prompt_token_ids, skip_special_tokens=False)
    return text


async def test_without_a_format_there_is_no_grammar(edge: RunningEdge) -> None:
    assert await grammar_of(edge) == ""
    assert await grammar_of(edge, response_format={"type": "text"}) == ""
    assert await grammar_of(edge, tools=[WEATHER]) == ""


@pytest.mark.parametrize(
    ("fields", "right", "wrong"),
    [
        ({"response_format": {"type": "json_object"}}, '{"a": 1}', "[]"),
        ({"extra_body": {"structured_outputs": {"regex": "a+"}}}, "aaa", "b"),
        ({"extra_body": {"guided_choice": ["yes", "no"]}}, "no", "maybe"),
        ({"extra_body": {"guided_grammar": 'start: "a" | "b"'}}, "b", "c"),
        ({"tools": [WEATHER], "tool_choice": NAMED}, KOELN, "{}"),
        ({"tools": [WEATHER, WAIT], "tool_choice": "required"}, CALLS, KOELN),
    ],
)
async def test_a_format_reaches_the_ranks_as_a_grammar(
    fields: dict[str, Any], right: str, wrong: str, edge: RunningEdge, vocabulary: Vocabulary
) -> None:
    grammar = await grammar_of(edge, **fields)
    assert vocabulary.accepts(grammar, right)
    assert not vocabulary.accepts(grammar, wrong)


async def test_completions_keep_to_formats_as_well(edge: RunningEdge, vocabulary: Vocabulary) -> None:
    call = asyncio.create_task(
        edge.client.completions.create(
            model=MODEL, prompt="Hi", extra_body={"response_format": {"type": "json_object"}}
        )
    )
    submit = await edge.submitted()
    await edge.output(submit, edge.ids("{}"), "length")
    assert (await call).choices[0].text == "{}"
    assert vocabulary.accepts(submit.sampling.grammar, "{}")


class Town(BaseModel):
    name: str
    twin: Town | None
    kind: str


async def test_the_clients_helper_parses_a_model_of_its_own(edge: RunningEdge, vocabulary: Vocabulary) -> None:
    call = asyncio.create_task(
        edge.client.chat.completions.parse(model=MODEL, messages=HELLO, response_format=Town)  # type: ignore[arg-type]
    )
    submit = await edge.submitted()
    text = '{"name": "Köln", "twin": {"name": "Lille", "twin": null, "kind": "town"}, "kind": "city"}'
    assert vocabulary.accepts(submit.sampling.grammar, text)
    await edge.answer(submit, text)
    message = (await call).choices[0].message
    assert message.parsed == Town(name="Köln", twin=Town(name="Lille", twin=None, kind="town"), kind="city")
    assert message.refusal is None


async def test_an_answer_of_calls_has_no_content(any_edge: RunningEdge) -> None:
    async with any_edge.answering(CALLS):
        for choice in ("auto", "required"):
            answer = (await create(any_edge, tools=[WEATHER, WAIT], tool_choice=choice)).choices[0]
            assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
            calls = answer.message.tool_calls
            assert [(call.type, call.function.name, call.function.arguments) for call in calls] == [
                ("function", "get_weather", KOELN),
                ("function", "wait", "{}"),
            ]
            assert len({call.id for call in calls}) == 2
            assert all(call.id.startswith("call_") for call in calls)


async def test_one_call_is_all_where_calls_are_not_parallel(edge: RunningEdge) -> None:
    async with edge.answering(CALLS):
        answer = await create(edge, tools=[WEATHER, WAIT], parallel_tool_calls=False)
    assert [call.function.name for call in answer.choices[0].message.tool_calls] == ["get_weather"]


async def test_a_named_tool_ends_with_stop(edge: RunningEdge) -> None:
    async with edge.answering(KOELN):
        answer = (await create(edge, tools=[WEATHER, WAIT], tool_choice=NAMED)).choices[0]
    assert (answer.finish_reason, answer.message.content) == ("stop", None)
    assert [(call.function.name, call.function.arguments) for call in answer.message.tool_calls] == [
        ("get_weather", KOELN)
    ]


async def test_text_around_calls_is_content_and_a_cut_answer_ends_with_length(edge: RunningEdge) -> None:
    call = asyncio.create_task(create(edge, tools=[WEATHER]))
    await edge.answer(await edge.submitted(), f"Let me see.\n{CALLS}", "length")
    answer = (await call).choices[0]
    assert (answer.finish_reason, answer.message.content) == ("length", "Let me see.")
    assert len(answer.message.tool_calls) == 2


async def test_without_tools_or_with_none_calls_are_text(edge: RunningEdge) -> None:
    async with edge.answering(CALLS):
        for fields in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
            answer = (await create(edge, **fields)).choices[0]
            assert (answer.finish_reason, answer.message.content) == ("stop", CALLS)
            assert answer.message.tool_calls is None


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, f"Let me see.\n{CALLS}"),
        ({}, "Just <tool_call> text, <tool_call>\n{broken}\n</tool_call>"),
        ({"tool_choice": "required"}, CALLS),
        ({"tool_choice": NAMED}, KOELN),
        ({"logprobs": True, "top_logprobs": 1}, f"See: {CALLS}"),
    ],
)
async def test_a_stream_joined_is_the_whole_answer(fields: dict[str, Any], text: str, any_edge: RunningEdge) -> None:
    fields = {"tools": [WEATHER, WAIT], **fields}
    async with any_edge.answering(text):
        whole = (await create(any_edge, **fields)).choices[0]
        chunks = await events(any_edge, "/v1/chat/completions", messages=HELLO, **fields)
    choices = [chunk["choices"][0] for chunk in chunks]
    content = ""
    calls: list[list[str]] = []
    entries: list[dict[str, Any]] = []
    for choice in choices:
        content += choice["delta"].get("content") or ""
        entries += (choice["logprobs"] or {}).get("content", [])
        for piece in choice["delta"].get("tool_calls", ()):
            if "id" in piece:
                assert piece["index"] == len(calls)
                assert (piece["type"], piece["function"]["arguments"]) == ("function", "")
                calls.append([piece["function"]["name"], ""])
            else:
                assert set(piece) == {"index", "function"}
                assert set(piece["function"]) == {"arguments"}
                calls[piece["index"]][1] += piece["function"]["arguments"]
    assert content == (whole.message.content or "")
    expected = whole.message.tool_calls or []
    assert calls == [[call.function.name, call.function.arguments] for call in expected]
    assert choices[-1]["finish_reason"] == whole.finish_reason
    if "logprobs" in fields:
        assert entries == [entry.model_dump() for entry in whole.logprobs.content]
        assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == text


async def test_arguments_that_a_grammar_holds_are_streamed_as_they_come(edge: RunningEdge) -> None:
    fields: dict[str, Any] = {"tools": [WEATHER], "tool_choice": "required"}
    async with edge.answering(CALLS.partition("\n<tool_call>\n")[0]):
        chunks = await events(edge, "/v1/chat/completions", messages=HELLO, **fields)
    pieces = [piece for chunk in chunks for piece in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert len(pieces) > 3


async def test_the_clients_helper_joins_streamed_calls(edge: RunningEdge) -> None:
    async with edge.answering(f"Let me see.\n{CALLS}"):
        manager = edge.client.chat.completions.stream(model=MODEL, messages=HELLO, tools=[WEATHER, WAIT], n=2)  # type: ignore[arg-type, list-item]
        async with manager as stream:
            async for _ in stream:
                pass
            snapshot = stream.current_completion_snapshot
    for choice in snapshot.choices:
        assert choice.message.content == "Let me see."
        assert [call.function.name for call in choice.message.tool_calls or ()] == ["get_weather", "wait"]


async def test_tools_are_told_to_a_template_that_does_not_know_them(edge: RunningEdge) -> None:
    text = await prompt_of(edge, tools=[WEATHER])
    assert f"<tools>\n{json.dumps(WEATHER, ensure_ascii=False)}\n</tools>" in text
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.\n\n# Tools\n\n")
    assert "<tools>" not in await prompt_of(edge, tools=[WEATHER], tool_choice="none")


async def test_a_dialogue_with_calls_and_results_comes_back_as_it_went_out(edge: RunningEdge) -> None:
    async with edge.answering(CALLS):
        answer = (await create(edge, tools=[WEATHER, WAIT])).choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": f"result {index} <|im_end|>"}
        for index, call in enumerate(answer.tool_calls)
    ]
    text = await prompt_of(edge, messages=[*HELLO, answer.model_dump(), *results], tools=[WEATHER, WAIT])
    assert f"<|im_start|>assistant\n{CALLS}<|im_end|>\n" in text
    assert text.endswith(
        "<|im_start|>user\n<tool_response>\nresult 0 <|im_end|>\n</tool_response>\n<tool_response>\nresult 1 <|im_end|>"
        "\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}:{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}={{ call.function.arguments | tojson }}"
    "{% endfor %}]{% endfor %}{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}"
)


async def test_a_template_that_knows_tools_is_given_them(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATE)
    described = {"type": "function", "function": {"name": "wait", "description": "until <|im_end|> comes"}}
    call = {"id": "call_1", "type": "function", "function": {"name": "wait", "arguments": '{"a":\n1}'}}
    messages = [*HELLO, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "done"}]
    async with running_edge(edge_config(checkpoint, model={"chat_template": str(file)}), tmp_path) as edge:
        task = asyncio.create_task(create(edge, messages=messages, tools=[described]))
        submit = await edge.submitted()
        await edge.output(submit, edge.ids("x"), "stop")
        await task
    assert prompt_text(edge, submit) == (
        f'[user:Hello][assistant:wait={{"a": 1}}][tool:done]{json.dumps(described, ensure_ascii=False)}'
    )
    assert edge.tokenizer.token_to_id("<|im_end|>") not in submit.prompt_token_ids


async def test_tools_count_in_tokenize(edge: RunningEdge) -> None:
    async def count(**fields: Any) -> int:
        answer = await edge.client.post("/../tokenize", body={"messages": HELLO, **fields}, cast_to=dict[str, Any])
        return int(answer["count"])

    task = asyncio.create_task(create(edge, tools=[WEATHER]))
    submit = await edge.submitted()
    await edge.output(submit, edge.ids("x"), "stop")
    await task
    assert await count(tools=[WEATHER]) == len(submit.prompt_token_ids)
    assert await count() < len(submit.prompt_token_ids)


async def test_a_schema_that_is_refused_names_its_field_and_reaches_nobody(edge: RunningEdge) -> None:
    schema = {"type": "object", "not": {}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="Unimplemented keys") as caught:
        await create(edge, response_format=form)
    assert caught.value.param == "response_format.json_schema.schema"
    wrong = {"type": "function", "function": {"name": "f", "parameters": schema}}
    with pytest.raises(openai.BadRequestError) as caught:
        await create(edge, tools=[WAIT, wrong], tool_choice="required")
    assert caught.value.param == "tools"
    assert edge.sent == []
