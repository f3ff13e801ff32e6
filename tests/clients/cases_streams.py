"""Streams read chunk by chunk: order, ends, usage, closing early."""

from __future__ import annotations

from typing import Any

from tests.clients.api import Api, about_a_red_disc, joined
from tests.clients.cases import each


def _chunks(api: Api, content: Any = "What can you do?", **fields: Any) -> list[Any]:
    return list(api.chat(content, stream=True, **fields))


@each(fields=[{}, {"max_tokens": 3}, {"stop": "shapes"}, {"seed": 3, "temperature": 1.5}])
def a_stream_says_what_the_whole_answer_says(api: Api, fields: dict[str, Any]) -> None:
    whole = api.chat("What can you do?", **fields).choices[0]
    chunks = _chunks(api, **fields)
    assert joined(chunks) == whole.message.content
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason


def the_first_chunk_has_the_role_and_no_other_has(api: Api) -> None:
    first, *others = _chunks(api)
    assert first.choices[0].delta.role == "assistant"
    assert first.choices[0].delta.content == ""
    assert all(chunk.choices[0].delta.role is None for chunk in others)


def chunks_share_id_time_and_model(api: Api) -> None:
    chunks = _chunks(api)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert chunks[0].id.startswith("chatcmpl-")


def the_reason_comes_once_and_last(api: Api) -> None:
    *others, last = _chunks(api)
    assert all(chunk.choices[0].finish_reason is None for chunk in others)
    assert last.choices[0].finish_reason == "stop"
    assert not last.choices[0].delta.content


def usage_comes_only_where_asked_for(api: Api) -> None:
    assert all(chunk.usage is None for chunk in _chunks(api))
    assert all(chunk.usage is None for chunk in _chunks(api, stream_options={"include_usage": False}))


@each(fields=[{}, {"max_tokens": 2}, {"n": 2}])
def usage_is_a_last_chunk_without_choices(api: Api, fields: dict[str, Any]) -> None:
    *others, last = _chunks(api, stream_options={"include_usage": True}, **fields)
    assert last.choices == []
    assert all(chunk.usage is None for chunk in others)
    whole = api.chat("What can you do?", **fields).usage
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (whole.prompt_tokens, whole.completion_tokens)
    assert last.usage.total_tokens == whole.total_tokens


def usage_may_come_with_every_chunk(api: Api) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [chunk.usage.completion_tokens for chunk in _chunks(api, stream_options=options)]
    assert counts == sorted(counts)
    assert counts[-1] == api.chat("What can you do?").usage.completion_tokens


def three_choices_start_in_order(api: Api) -> None:
    chunks = _chunks(api, n=3)
    order = list(dict.fromkeys(choice.index for chunk in chunks for choice in chunk.choices))
    assert order == [0, 1, 2]
    roles = [choice.index for chunk in chunks for choice in chunk.choices if choice.delta.role]
    assert roles == [0, 1, 2]
    whole = api.chat("What can you do?").choices[0].message.content
    assert {joined(chunks, index) for index in range(3)} == {whole}
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert reasons == ["stop"] * 3


@each(count=[None, 3])
def logprobs_come_with_their_text(api: Api, count: int | None) -> None:
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": count}
    whole = api.chat("What can you do?", **fields).choices[0].logprobs.content
    chunks = _chunks(api, **fields)
    entries = [
        entry
        for chunk in chunks
        for choice in chunk.choices
        if choice.logprobs is not None
        for entry in choice.logprobs.content
    ]
    assert [entry.token for entry in entries] == [entry.token for entry in whole]
    assert all(abs(one.logprob - other.logprob) < 1e-3 for one, other in zip(entries, whole, strict=True))
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == joined(chunks)


def characters_of_many_bytes_are_never_cut(api: Api) -> None:
    fields: dict[str, Any] = {"temperature": 2.0, "max_tokens": 200, "extra_body": {"ignore_eos": True}}
    for seed in range(3):
        whole = api.chat("🙂", seed=seed, **fields).choices[0].message.content
        assert joined(_chunks(api, "🙂", seed=seed, **fields)) == whole


def a_picture_is_streamed_about(api: Api) -> None:
    assert joined(_chunks(api, about_a_red_disc())) == "Red."


@each(way=["close", "with", "break"])
def a_stream_left_early_ends_the_work(api: Api, way: str) -> None:
    stream = api.chat(stream=True, max_tokens=3000, extra_body={"ignore_eos": True})
    next(stream)
    if way == "with":
        with stream:
            next(stream)
    elif way == "close":
        stream.close()
    else:
        for _ in stream:
            break
        stream.response.close()
    api.wait_until_idle()
    assert api.chat(max_tokens=2).choices


def the_raw_lines_end_as_clients_expect(api: Api) -> None:
    with api.client.chat.completions.with_streaming_response.create(
        model="model", messages=[{"role": "user", "content": "Hello"}], stream=True
    ) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = list(response.iter_lines())
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line == "" or line.startswith("data: {") for line in lines[:-2])
