"""Several choices of one answer: submitted after the first's token, told in order, counted once, ended together."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.actors.edge.raw import connection
from tests.actors.edge.running import MODEL, RunningEdge, edge_config, http, running_edge
from tests.pictures import picture
from vlmrt.actors.edge.responses import encode_json
from vlmrt.runtime.config import SchedulingOptions
from vlmrt.runtime.errors import WireError
from vlmrt.runtime.messages import (
    ActorName,
    Decode,
    Epoch,
    KnownMedia,
    LogitBias,
    LookUpMedia,
    MediaFound,
    MmHash,
    NeedMedia,
)

SCHEDULER = ActorName("scheduler:0")
HELLO = [{"role": "user", "content": "Hello"}]
NUM_PROMPTS = 40


async def create(edge: RunningEdge, **fields: Any) -> Any:
    return await edge.client.chat.completions.create(**{"model": MODEL, "messages": HELLO, **fields})


async def post(edge: RunningEdge, path: str, **body: Any) -> dict[str, Any]:
    async with http() as session, session.post(edge.url + path, json=body) as response:
        answer: dict[str, Any] = await response.json()
        return answer


async def events(edge: RunningEdge, path: str, **body: Any) -> list[dict[str, Any]]:
    """The chunks of a stream, which is well formed to its end."""
    async with http() as session, session.post(edge.url + path, json={**body, "stream": True}) as response:
        lines = (await response.read()).decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""], lines
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


async def test_choices_follow_the_first_token_with_seeds_of_their_own(edge: RunningEdge) -> None:
    call = asyncio.create_task(create(edge, n=3, seed=2**63 - 2))
    first = await edge.submitted()
    await asyncio.sleep(0.02)
    assert edge.sent == []
    await edge.output(first, edge.ids("one")[:1], num_output_tokens=1)
    second, third = await edge.submitted(), await edge.submitted()
    assert [submit.sampling.seed for submit in (first, second, third)] == [2**63 - 2, 2**63 - 1, -(2**63)]
    assert len({submit.request_id for submit in (first, second, third)}) == 3
    assert first.prompt_token_ids == second.prompt_token_ids == third.prompt_token_ids
    await edge.output(third, edge.ids("three"), "stop")
    await edge.output(first, edge.ids("one")[1:], "length")
    await edge.output(second, edge.ids("two"), "stop")
    done = await call
    assert [choice.message.content for choice in done.choices] == ["one", "two", "three"]
    assert [choice.finish_reason for choice in done.choices] == ["length", "stop", "stop"]
    assert [choice.index for choice in done.choices] == [0, 1, 2]
    assert done.id == first.request_id
    assert done.usage.prompt_tokens == len(first.prompt_token_ids)
    assert done.usage.completion_tokens == sum(len(edge.ids(text)) for text in ("one", "two", "three"))
    assert edge.actor.num_open_requests == 0


async def test_the_roles_of_all_choices_come_first_and_in_order(edge: RunningEdge) -> None:
    async with edge.rambling():
        chunks = await events(edge, "/v1/chat/completions", messages=HELLO, n=4, stream_options={"include_usage": True})
    choices = [chunk["choices"][0] for chunk in chunks[:-1]]
    assert [choice["index"] for choice in choices[:4]] == [0, 1, 2, 3]
    assert all(choice["delta"] == {"role": "assistant", "content": ""} for choice in choices[:4])
    assert not any("role" in choice["delta"] for choice in choices[4:])
    ends = [choice for choice in choices if choice["finish_reason"] is not None]
    assert sorted(choice["index"] for choice in ends) == [0, 1, 2, 3]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] > 4


async def test_the_clients_helper_joins_several_streams(edge: RunningEdge) -> None:
    async with edge.rambling():
        whole = await create(edge, n=3, seed=5)
        async with edge.client.chat.completions.stream(model=MODEL, messages=HELLO, n=3, seed=5) as stream:  # type: ignore[arg-type]
            async for _ in stream:
                pass
            joined = stream.current_completion_snapshot
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.message.content for choice in joined.choices] == texts
    assert len(set(texts)) == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_one_choice_that_fails_fails_all(stream: bool, edge: RunningEdge) -> None:
    call = asyncio.create_task(create(edge, n=3, stream=stream))
    first = await edge.submitted()
    await edge.output(first, edge.ids("one")[:1])
    others = [await edge.submitted(), await edge.submitted()]
    await edge.output(others[0], error=WireError(429, "no room", "too_many_requests", None, 1))
    with pytest.raises(openai.APIError, match="no room"):
        async for _ in await call:
            pass
    aborted = {(await edge.aborted()).request_id for _ in range(2)}
    assert aborted == {first.request_id, others[1].request_id}
    assert edge.sent == []


async def test_a_choice_stopped_by_a_string_is_aborted_while_the_others_go_on(edge: RunningEdge) -> None:
    call = asyncio.create_task(create(edge, n=2, stop="STOP"))
    first = await edge.submitted()
    await edge.output(first, edge.ids("one STOP two"))
    assert (await edge.aborted()).request_id == first.request_id
    second = await edge.submitted()
    assert not call.done()
    await edge.output(first, edge.ids("late"))
    await edge.output(second, edge.ids("other"), "stop")
    done = await call
    assert [choice.message.content for choice in done.choices] == ["one ", "other"]
    assert [choice.model_dump()["stop_reason"] for choice in done.choices] == ["STOP", None]
    assert edge.sent == []


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_ends_all_choices(stream: bool, edge: RunningEdge) -> None:
    async with connection(edge.port) as raw:
        await raw.post({"messages": HELLO, "n": 3, "stream": stream})
        first = await edge.submitted()
        await edge.output(first, edge.ids("one"))
        others = [await edge.submitted(), await edge.submitted()]
        await edge.output(others[0], edge.ids("two"), "stop")
        raw.close()
        aborted = {(await edge.aborted()).request_id for _ in range(2)}
    assert aborted == {first.request_id, others[1].request_id}
    async with asyncio.timeout(10):
        while edge.actor.num_open_requests:  # noqa: ASYNC110  nothing announces it
            await asyncio.sleep(0.005)
    assert edge.sent == []


async def test_a_full_queue_refuses_all_choices_before_any_begins(checkpoint: Path, tmp_path: Path) -> None:
    config = edge_config(checkpoint, scheduling=SchedulingOptions(max_num_seqs=3, max_waiting=2))
    async with running_edge(config, tmp_path) as edge:
        with pytest.raises(openai.BadRequestError, match="5"):
            await create(edge, n=6)
        waiting = asyncio.create_task(create(edge))
        submit = await edge.submitted()
        with pytest.raises(openai.RateLimitError) as refused:
            await create(edge, n=5)
        assert refused.value.code == "too_many_requests"
        assert refused.value.response.headers["retry-after"] == "1"
        assert edge.sent == []
        await edge.answer(submit, "x")
        await waiting
        async with edge.rambling() as submits:
            await create(edge, n=5)
        assert len(submits) == 5


async def test_an_edge_that_stops_lets_the_choices_of_an_open_answer_begin(checkpoint: Path, tmp_path: Path) -> None:
    async with running_edge(edge_config(checkpoint), tmp_path) as edge:
        call = asyncio.create_task(create(edge, n=2))
        first = await edge.submitted()
        stopping = asyncio.create_task(edge.actor.stop(5.0))
        await asyncio.sleep(0.01)
        await edge.output(first, edge.ids("one"), "stop")
        await edge.output(await edge.submitted(), edge.ids("two"), "stop")
        assert [choice.message.content for choice in (await call).choices] == ["one", "two"]
        await stopping


async def test_every_choice_can_have_the_picture_and_what_was_looked_up_stays_for_the_last(edge: RunningEdge) -> None:
    content = [picture(0).part, {"type": "image_url", "uuid": "known"}]
    call = asyncio.create_task(create(edge, n=2, messages=[{"role": "user", "content": content}]))
    lookup = (await edge.context.outbox.next()).message
    assert isinstance(lookup, LookUpMedia)
    known = KnownMedia(MmHash("k" * 64), 4, (1, 4, 4))
    await edge.actor.handle(MediaFound(lookup.lookup_id, (known,)), SCHEDULER)
    first = await edge.submitted()
    assert first.lookup_id == 0
    await edge.output(first, edge.ids("one"), "stop")
    second = await edge.submitted()
    assert second.lookup_id == lookup.lookup_id
    need = NeedMedia(second.request_id, second.media[0].mm_hash, ActorName("media:0"), Epoch(1))
    await edge.actor.handle(need, SCHEDULER)
    assert isinstance((await edge.context.outbox.next()).message, Decode)
    await edge.output(second, edge.ids("two"), "stop")
    await call
    assert edge.sent == []


async def test_no_end_token_can_come_before_min_tokens(edge: RunningEdge) -> None:
    body = {"min_tokens": 3, "stop_token_ids": [7], "logit_bias": {"5": 2, "9": -100}}
    call = asyncio.create_task(create(edge, extra_body=body))
    submit = await edge.submitted()
    assert submit.stop.min_tokens == 3
    ends = submit.stop.stop_token_ids
    assert 7 in ends
    assert len(ends) > 1
    banned = tuple(LogitBias(token_id, float("-inf"), 3) for token_id in ends)
    assert submit.sampling.logit_bias == (LogitBias(5, 2.0), LogitBias(9, -100.0), *banned)
    await edge.answer(submit, "x")
    await call


def joined_stream(chunks: list[dict[str, Any]], num_choices: int, text: str) -> list[dict[str, Any]]:
    """What a whole answer says of each choice, from chunks."""
    choices: list[dict[str, Any]] = [
        {"text": "", "logprobs": None, "token_ids": [], "finish_reason": None} for _ in range(num_choices)
    ]
    for chunk in chunks:
        for part in chunk["choices"]:
            choice = choices[part["index"]]
            assert choice["finish_reason"] is None
            choice["text"] += part["text"] if text == "text" else part["delta"].get("content", "")
            choice["token_ids"] += part.get("token_ids", [])
            choice["finish_reason"] = part["finish_reason"]
            choice["stop_reason"] = part.get("stop_reason")
            for name, entries in (part["logprobs"] or {}).items():
                if entries is not None:
                    choice["logprobs"] = choice["logprobs"] or {}
                    choice["logprobs"].setdefault(name, []).extend(entries)
    return choices


def fields_of(number: int) -> dict[str, Any]:
    """Sampling fields that differ from prompt to prompt."""
    fields: dict[str, Any] = {
        "n": 1 + number % 3,
        "seed": number,
        "max_tokens": 10 + number,
        "return_token_ids": True,
        "min_tokens": number % 4,
        "skip_special_tokens": number % 5 != 0,
        "include_stop_str_in_output": number % 7 == 0,
    }
    if number % 2:
        fields["stop"] = ["e", "\ufffd\ufffd\ufffd", "th"]
    if number % 3 == 0:
        fields["stop_token_ids"] = list(range(number, number + 40))
    return fields


@pytest.mark.parametrize("group", [1, 5])
async def test_streams_join_to_the_whole_chat_completion(group: int, edge: RunningEdge) -> None:
    for number in range(NUM_PROMPTS):
        body = fields_of(number) | {"messages": [{"role": "user", "content": f"question {number}"}]}
        if number % 4:
            body |= {"logprobs": True, "top_logprobs": number % 3}
        async with edge.rambling():
            whole = await post(edge, "/v1/chat/completions", **body)
        async with edge.rambling(group):
            options = {"include_usage": True, "continuous_usage_stats": bool(number % 2)}
            chunks = await events(edge, "/v1/chat/completions", **body, stream_options=options)
        assert chunks[-1]["usage"] == whole["usage"]
        assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
        for choice, joined in zip(
            whole["choices"], joined_stream(chunks, len(whole["choices"]), "content"), strict=True
        ):
            assert joined["text"] == choice["message"]["content"]
            assert joined["finish_reason"] == choice["finish_reason"]
            assert joined["stop_reason"] == choice["stop_reason"]
            assert joined["token_ids"] == choice["token_ids"]
            entries = (choice["logprobs"] or {"content": []})["content"]
            assert (joined["logprobs"] or {"content": []})["content"] == entries
            if number % 4:
                text_bytes = bytes(byte for entry in entries for byte in entry["bytes"])
                assert text_bytes.decode(errors="replace") == joined["text"]
                assert all(len(entry["top_logprobs"]) == number % 3 for entry in entries)
        usage = whole["usage"]["completion_tokens"]
        assert usage == sum(len(choice["token_ids"]) for choice in whole["choices"])


@pytest.mark.parametrize("group", [1, 5])
async def test_streams_join_to_the_whole_text_completion(group: int, edge: RunningEdge) -> None:
    for number in range(NUM_PROMPTS):
        prompts = [f"prompt {number}", f"another {number}"][: 1 + number % 2]
        body = fields_of(number) | {"prompt": prompts}
        if number % 4:
            body["logprobs"] = number % 3
        else:
            body["echo"] = number % 8 == 0
        async with edge.rambling():
            whole = await post(edge, "/v1/completions", **body)
        async with edge.rambling(group):
            chunks = await events(edge, "/v1/completions", **body, stream_options={"include_usage": True})
        assert chunks[-1]["usage"] == whole["usage"]
        assert len(whole["choices"]) == len(prompts) * body["n"]
        for choice, joined in zip(whole["choices"], joined_stream(chunks, len(whole["choices"]), "text"), strict=True):
            for name in ("text", "finish_reason", "stop_reason", "token_ids"):
                assert joined[name] == choice[name], name
            assert (joined["logprobs"] or {"tokens": []})["tokens"] == (choice["logprobs"] or {"tokens": []})["tokens"]
            if joined["logprobs"]:
                assert joined["logprobs"] == choice["logprobs"]


async def test_the_fingerprint_tells_configurations_apart(edge: RunningEdge, checkpoint: Path, tmp_path: Path) -> None:
    async def fingerprint(of: RunningEdge) -> str:
        async with of.answering("x"):
            found: str = (await create(of)).system_fingerprint
        return found

    same = await fingerprint(edge)
    async with running_edge(edge_config(checkpoint, model={"served_names": ("other",)}), tmp_path) as again:
        assert await fingerprint_as(again, "other") == same
    for options in ({"revision": "2"}, {"generation_config": "none"}, {"max_model_len": 1024}):
        async with running_edge(edge_config(checkpoint, model=options), tmp_path) as changed:
            assert await fingerprint(changed) != same, options
    assert encode_json(same).decode().startswith('"fp_')


async def fingerprint_as(edge: RunningEdge, model: str) -> str:
    async with edge.answering("x"):
        found: str = (await create(edge, model=model)).system_fingerprint
    return found
