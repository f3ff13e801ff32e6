"""The stream to the byte, and the fields that clients rely on."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest

from tests.actors.edge.raw import connection
from tests.actors.edge.running import MODEL, RunningEdge, http
from vlmrt.runtime.errors import WireError
from vlmrt.runtime.messages import Sampling

HELLO = [{"role": "user", "content": "Hello"}]
BODY = {"model": MODEL, "messages": HELLO, "stream": True}

START = (
    '{"id":"ID","object":"chat.completion.chunk","created":CREATED,"model":"test-model",'
    '"system_fingerprint":"FINGERPRINT","choices":['
)
GOLDEN = f"""\
data: {START}{{"index":0,"delta":{{"role":"assistant","content":""}},"logprobs":null,"finish_reason":null}}]}}

data: {START}{{"index":0,"delta":{{"content":"He said \\"漢🙂\\"\\n"}},"logprobs":null,"finish_reason":null}}]}}

data: {START}{{"index":0,"delta":{{"content":"bye"}},"logprobs":null,"finish_reason":null}}]}}

data: {START}{{"index":0,"delta":{{}},"logprobs":null,"finish_reason":"length","stop_reason":null}}]}}

data: [DONE]

"""


async def test_the_stream_is_the_golden_one_to_the_byte(edge: RunningEdge) -> None:
    async with connection(edge.port) as raw:
        await raw.post(BODY, x_request_id="mine-1")
        submit = await edge.submitted()
        await edge.output(submit, edge.ids('He said "漢🙂"\n'))
        status, headers = await raw.head()
        events = raw.events()
        received = await anext(events)
        await edge.output(submit, edge.ids("bye"), "length")
        async for piece in events:
            received += piece
    assert status == 200
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no"
    assert headers["x-request-id"] == "mine-1"
    assert int(headers["openai-processing-ms"]) >= 0
    first = json.loads(received.split(b"\n")[0].removeprefix(b"data: "))
    assert first["id"] == submit.request_id
    expected = GOLDEN.replace("ID", submit.request_id).replace("CREATED", str(first["created"]))
    expected = expected.replace("FINGERPRINT", first["system_fingerprint"])
    assert received.decode() == expected


async def chunks(edge: RunningEdge, text: str, **body: Any) -> list[dict[str, Any]]:
    async with (
        edge.answering(text),
        http() as session,
        session.post(edge.url + "/v1/chat/completions", json={**BODY, **body}) as response,
    ):
        lines = (await response.read()).decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


async def test_usage_comes_in_a_chunk_of_its_own_where_asked_for(edge: RunningEdge) -> None:
    got = await chunks(edge, "one two three", stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in got[:-1])
    assert got[-1]["choices"] == []
    usage = got[-1]["usage"]
    assert usage["completion_tokens"] == len(edge.ids("one two three"))
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    details = usage["prompt_tokens_details"]
    assert details["image_tokens"] + details["text_tokens"] == usage["prompt_tokens"]
    plain = await chunks(edge, "one two three")
    assert all("usage" not in chunk for chunk in plain)


async def test_continuous_usage_grows_to_the_total(edge: RunningEdge) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    got = await chunks(edge, "one two three", stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in got]
    assert counts == sorted(counts)
    assert counts[-1] == len(edge.ids("one two three"))
    assert {(chunk["id"], chunk["created"], chunk["model"]) for chunk in got} == {
        (got[0]["id"], got[0]["created"], MODEL)
    }


async def test_tokens_that_wait_are_written_together(edge: RunningEdge) -> None:
    async with connection(edge.port) as raw:
        await raw.post(BODY)
        submit = await edge.submitted()
        for count, token_id in enumerate(edge.ids("a b c d e"), 1):
            await edge.output(submit, [token_id], num_output_tokens=count)
        await edge.output(submit, [], "stop")
        await raw.head()
        contents = [
            choice["delta"].get("content")
            for line in (await raw.body()).decode().split("\n\n")[:-2]
            for choice in json.loads(line.removeprefix("data: "))["choices"]
        ]
    assert contents == ["", "a b c d e", None]


async def test_nothing_is_sent_before_the_first_token(edge: RunningEdge) -> None:
    async with connection(edge.port) as raw:
        await raw.post(BODY)
        submit = await edge.submitted()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await raw.reader.read(1)
        await edge.answer(submit, "now")
        assert (await raw.head())[0] == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_before_the_first_token_keeps_its_status(stream: bool, edge: RunningEdge) -> None:
    call = asyncio.create_task(_create(edge, stream=stream))
    submit = await edge.submitted()
    await edge.output(submit, error=WireError(400, "the image is broken", "invalid_image", "messages"))
    with pytest.raises(openai.BadRequestError) as refused:
        await call
    assert refused.value.code == "invalid_image"
    assert refused.value.param == "messages"
    assert edge.sent == []


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, openai.BadRequestError), (429, openai.RateLimitError), (500, openai.InternalServerError)],
)
async def test_errors_raise_the_clients_exception_of_their_status(
    status: int, kind: type[openai.APIStatusError], edge: RunningEdge
) -> None:
    call = asyncio.create_task(_create(edge))
    submit = await edge.submitted()
    await edge.output(submit, error=WireError(status, "no", "code", None, 3))
    with pytest.raises(kind) as refused:
        await call
    assert refused.value.response.headers["retry-after"] == "3"


async def test_an_error_after_the_first_token_ends_the_stream_in_its_own_event(edge: RunningEdge) -> None:
    async with connection(edge.port) as raw:
        await raw.post(BODY)
        submit = await edge.submitted()
        await edge.output(submit, edge.ids("some"))
        await raw.head()
        await edge.output(submit, error=WireError(500, "a rank died", "internal_error"))
        body = await raw.body()
    error = b'{"error":{"message":"a rank died","type":"server_error","param":null,"code":"internal_error"}}'
    assert body.endswith(b"\n\ndata: " + error + b"\n\ndata: [DONE]\n\n")
    assert edge.sent == []


async def test_clients_raise_on_an_error_within_the_stream(edge: RunningEdge) -> None:
    stream_call = asyncio.create_task(edge.client.chat.completions.create(**BODY))  # type: ignore[call-overload]
    submit = await edge.submitted()
    await edge.output(submit, edge.ids("some"))
    stream = await stream_call
    await edge.output(submit, error=WireError(500, "a rank died", "internal_error"))
    with pytest.raises(openai.APIError, match="a rank died"):
        async for _ in stream:
            pass


async def _create(edge: RunningEdge, **fields: Any) -> Any:
    return await edge.client.chat.completions.create(model=MODEL, messages=HELLO, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_answer_and_aborts_the_rest(stream: bool, edge: RunningEdge) -> None:
    call = asyncio.create_task(_create(edge, stream=stream, stop=["STOP", "never"]))
    submit = await edge.submitted()
    for count, token_id in enumerate(edge.ids("before STOP after"), 1):
        await edge.output(submit, [token_id], num_output_tokens=count)
    done = await call
    if stream:
        parts = [chunk async for chunk in done]
        text = "".join(part.choices[0].delta.content or "" for part in parts)
        reason = parts[-1].choices[0].finish_reason
    else:
        text, reason = done.choices[0].message.content, done.choices[0].finish_reason
    assert (text, reason) == ("before ", "stop")
    assert (await edge.aborted()).request_id == submit.request_id
    assert edge.sent == []


async def test_the_stop_token_itself_is_not_shown(edge: RunningEdge) -> None:
    ids = edge.ids("a b")
    call = asyncio.create_task(_create(edge, extra_body={"stop_token_ids": [ids[-1]]}))
    submit = await edge.submitted()
    assert ids[-1] in submit.stop.stop_token_ids
    await edge.output(submit, ids, "stop")
    text = (await call).choices[0].message.content
    assert text == edge.tokenizer.decode(ids[:-1])


async def test_harmless_and_unknown_fields(edge: RunningEdge) -> None:
    harmless = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "reasoning_effort": "low",
        "verbosity": "low",
        "modalities": ["text"],
        "prediction": None,
        "logit_bias": {},
        "tools": [],
        "tool_choice": "none",
        "stop": None,
        "max_tokens": None,
        "n": 1,
        "logprobs": False,
        "response_format": {"type": "text"},
        "stream_options": None,
        "cache_salt": "tenant",
        "priority": 3,
    }
    body = {"messages": HELLO, **harmless, "frobnicate": 1, "weird\nname": 2}
    async with http() as session:
        call = asyncio.create_task(session.post(edge.url + "/v1/chat/completions", json=body))
        submit = await edge.submitted()
        assert (submit.cache_salt, submit.priority) == ("tenant", 3)
        await edge.answer(submit, "ok")
        async with await call as response:
            assert response.status == 200
            assert response.headers["x-vlmrt-ignored"] == "frobnicate,?"


@pytest.mark.parametrize(
    ("label", "echoed"), [("abc-123", True), ("a" * 129, False), ("evil id", False), ("é", False), ("", False)]
)
async def test_a_request_id_is_echoed_where_it_is_plain(label: str, echoed: bool, edge: RunningEdge) -> None:
    async with http() as session, session.get(edge.url + "/ping", headers={"x-request-id": label}) as response:
        got = response.headers["x-request-id"]
    assert (got == label) == echoed
    assert got


async def test_one_request_id_twice_at_once_is_two_requests(edge: RunningEdge) -> None:
    headers = {"x-request-id": "same"}
    calls = [asyncio.create_task(_create(edge, extra_headers=headers)) for _ in range(2)]
    first, second = await edge.submitted(), await edge.submitted()
    assert first.request_id != second.request_id
    await edge.answer(second, "two")
    await edge.answer(first, "one")
    texts = [call.choices[0].message.content for call in await asyncio.gather(*calls)]
    assert sorted(texts) == ["one", "two"]


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({}, None),
        ({"max_tokens": 7}, 7),
        ({"max_completion_tokens": 5}, 5),
        ({"max_tokens": 7, "max_completion_tokens": 5}, 5),
        ({"max_tokens": 10**6}, None),
    ],
)
async def test_the_output_limit_is_the_newer_names_or_what_the_context_holds(
    fields: dict[str, int], limit: int | None, edge: RunningEdge
) -> None:
    call = asyncio.create_task(_create(edge, extra_body=fields))
    submit = await edge.submitted()
    assert submit.stop.max_tokens == (limit or 2048 - len(submit.prompt_token_ids))
    await edge.answer(submit, "x")
    await call


async def test_sampling_fields_arrive_and_the_rest_has_defaults(edge: RunningEdge) -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1, "seed": -5}
    call = asyncio.create_task(_create(edge, frequency_penalty=0.2, presence_penalty=0.3, extra_body=fields))
    submit = await edge.submitted()
    assert submit.sampling == Sampling(0.5, 0.9, 7, 0.1, 1.1, 0.2, 0.3, -5)
    await edge.answer(submit, "x")
    await call
    seeds = set()
    for _ in range(2):
        call = asyncio.create_task(_create(edge))
        submit = await edge.submitted()
        seeds.add(submit.sampling.seed)
        assert 0 <= submit.sampling.seed < 2**63
        await edge.answer(submit, "x")
        await call
    assert len(seeds) == 2


async def test_ignore_eos_leaves_the_clients_stop_tokens_only(edge: RunningEdge) -> None:
    call = asyncio.create_task(_create(edge, extra_body={"ignore_eos": True, "stop_token_ids": [5], "min_tokens": 2}))
    submit = await edge.submitted()
    assert submit.stop.stop_token_ids == (5,)
    assert submit.stop.min_tokens == 2
    await edge.answer(submit, "x")
    await call


async def test_token_ids_are_returned_where_asked_for(edge: RunningEdge) -> None:
    call = asyncio.create_task(_create(edge, extra_body={"return_token_ids": True}))
    submit = await edge.submitted()
    await edge.answer(submit, "some words")
    done = (await call).model_dump()
    assert done["prompt_token_ids"] == list(submit.prompt_token_ids)
    assert done["choices"][0]["token_ids"] == edge.ids("some words")
    call = asyncio.create_task(_create(edge))
    await edge.answer(await edge.submitted(), "some words")
    assert "token_ids" not in (await call).model_dump()["choices"][0]


async def test_token_ids_are_streamed_once_each(edge: RunningEdge) -> None:
    got = await chunks(edge, "some words 漢🙂", return_token_ids=True)
    assert got[0]["prompt_token_ids"]
    assert all("prompt_token_ids" not in chunk for chunk in got[1:])
    token_ids = [id for chunk in got for choice in chunk["choices"] for id in choice.get("token_ids", ())]
    assert token_ids == edge.ids("some words 漢🙂")
