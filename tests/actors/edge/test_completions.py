"""POST /v1/completions: prompts of every kind, the legacy logprobs, and what it refuses."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.actors.edge.running import MODEL, RunningEdge, fake_logprobs, http
from tests.actors.edge.test_generation import events, post
from tests.actors.edge.test_wrong_requests import LONG, Wrong, check_refused
from vlmrt.runtime.errors import WireError
from vlmrt.runtime.messages import RequestId

ROUTE = "/v1/completions"


async def create(edge: RunningEdge, **fields: Any) -> Any:
    return await edge.client.completions.create(**{"model": MODEL, **fields})


async def test_a_completion_has_the_shape_that_clients_know(edge: RunningEdge) -> None:
    call = asyncio.create_task(create(edge, prompt="Once upon"))
    submit = await edge.submitted()
    assert list(submit.prompt_token_ids) == edge.ids("Once upon")
    assert submit.stop.max_tokens == 16
    assert submit.media == ()
    assert submit.rope_delta == 0
    await edge.answer(submit, " a time 漢🙂")
    done = await call
    assert done.object == "text_completion"
    assert done.id.startswith("cmpl-")
    assert RequestId(done.id) == submit.request_id
    assert done.choices[0].text == " a time 漢🙂"
    assert done.choices[0].finish_reason == "stop"
    assert done.usage.prompt_tokens == len(submit.prompt_token_ids)
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens


@pytest.mark.parametrize(
    ("kind", "count"), [("text", 1), ("texts", 3), ("ids", 1), ("lists of ids", 3), ("one list of ids", 1)]
)
async def test_prompts_of_every_kind(kind: str, count: int, edge: RunningEdge) -> None:
    texts = ["one", "two <|im_start|> is a control token here", "three 漢"]
    ids = [edge.ids(text) for text in texts]
    prompts = {"text": texts[0], "texts": texts, "ids": ids[0], "lists of ids": ids, "one list of ids": ids[:1]}
    async with edge.rambling() as submits:
        done = await create(edge, prompt=prompts[kind], n=2)
    assert [choice.index for choice in done.choices] == list(range(2 * count))
    assert sorted(map(list, (submit.prompt_token_ids for submit in submits))) == sorted(ids[:count] * 2)
    assert done.usage.prompt_tokens == sum(map(len, ids[:count]))
    assert edge.tokenizer.token_to_id("<|im_start|>") in ids[1]


async def test_choices_belong_to_their_prompts(edge: RunningEdge) -> None:
    call = asyncio.create_task(create(edge, prompt=["a", "b"], n=2))
    first, second = await edge.submitted(), await edge.submitted()
    await edge.output(second, edge.ids("b one"), "stop")
    late = await edge.submitted()
    assert late.prompt_token_ids == second.prompt_token_ids
    await edge.output(late, edge.ids("b two"), "stop")
    await edge.output(first, edge.ids("a one"), "stop")
    await edge.output(await edge.submitted(), edge.ids("a two"), "stop")
    assert [choice.text for choice in (await call).choices] == ["a one", "a two", "b one", "b two"]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_echo_comes_before_the_answer(stream: bool, edge: RunningEdge) -> None:
    body = {"prompt": ["Once", "Twice"], "echo": True}
    async with edge.answering(" more"):
        if stream:
            chunks = await events(edge, ROUTE, **body)
            texts = ["", ""]
            for chunk in chunks:
                texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
        else:
            texts = [choice["text"] for choice in (await post(edge, ROUTE, **body))["choices"]]
    assert texts == ["Once more", "Twice more"]


async def test_an_echo_of_token_ids_is_their_text(edge: RunningEdge) -> None:
    async with edge.answering(" more"):
        done = await create(edge, prompt=edge.ids("Once <|im_end|>"), echo=True)
    assert done.choices[0].text == "Once <|im_end|> more"


async def test_legacy_logprobs_are_of_the_text(edge: RunningEdge) -> None:
    ids = edge.ids("He said 漢🙂 twice")
    call = asyncio.create_task(create(edge, prompt="x", logprobs=2))
    submit = await edge.submitted()
    assert submit.sampling.num_logprobs == 2
    await edge.output(submit, ids, "length")
    choice = (await call).choices[0]
    logprobs = choice.logprobs
    assert logprobs.token_logprobs == [fake_logprobs(id, 2).logprob for id in ids]
    assert all(1 <= len(entries) <= 3 for entries in logprobs.top_logprobs)
    for token, entries in zip(logprobs.tokens, logprobs.top_logprobs, strict=True):
        assert token in entries
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    for at, token in zip(logprobs.text_offset, logprobs.tokens, strict=True):
        assert "\ufffd" in token or choice.text[at : at + len(token)] == token


async def test_the_first_chunk_of_a_stream_is_text(edge: RunningEdge) -> None:
    async with edge.answering("one two"):
        chunks = await events(edge, ROUTE, prompt="x", max_tokens=99)
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert chunks[0]["choices"][0]["text"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "stop"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "one two"


async def test_an_error_before_any_text_keeps_its_status(edge: RunningEdge) -> None:
    """The first bytes of a character are no text yet."""
    async with http() as session:
        call = asyncio.create_task(session.post(edge.url + ROUTE, json={"prompt": "x", "stream": True}))
        submit = await edge.submitted()
        await edge.output(submit, [edge.tokenizer.get_vocab()["ð"]])
        await edge.output(submit, error=WireError(400, "broken", "code", None))
        async with await call as response:
            assert response.status == 400
            assert (await response.json())["error"]["message"] == "broken"


async def test_harmless_fields_of_completions(edge: RunningEdge) -> None:
    async with edge.answering("x"):
        answer = await post(edge, ROUTE, prompt="x", best_of=2, n=2, suffix="", user="u", echo=False, logit_bias={})
        assert len(answer["choices"]) == 2


def prompt(value: Any = "x", **fields: Any) -> dict[str, Any]:
    return {"prompt": value, **fields}


TABLE = [
    Wrong("no prompt", {}, "prompt", "missing_field"),
    Wrong("prompt null", prompt(None), "prompt", "invalid_value"),
    Wrong("prompt a number", prompt(5), "prompt", "invalid_value"),
    Wrong("prompt a dict", prompt({}), "prompt", "invalid_value"),
    Wrong("prompt of truth", prompt([True]), "prompt[0]", "invalid_value"),
    Wrong("no prompts", prompt([]), "prompt", "invalid_value"),
    Wrong("an empty text", prompt(""), "prompt", "empty_prompt"),
    Wrong("no ids", prompt([[]]), "prompt", "empty_prompt"),
    Wrong("a text among ids", prompt([1, "a"]), "prompt", "invalid_value"),
    Wrong("an id among texts", prompt(["a", 1]), "prompt", "invalid_value"),
    Wrong("ids among texts", prompt(["a", [1]]), "prompt", "invalid_value"),
    Wrong("a text among lists", prompt([[1], "a"]), "prompt", "invalid_value"),
    Wrong("id -1", prompt([-1]), "prompt", "invalid_value", says="-1"),
    Wrong("id out of vocabulary", prompt([[5], [10**6]]), "prompt", "invalid_value", says="1000000"),
    Wrong("a placeholder", prompt("see <|image_pad|>"), "prompt", "placeholder_mismatch", says="<|image_pad|>"),
    Wrong("a placeholder of video", prompt("<|video_pad|>"), "prompt", "placeholder_mismatch"),
    Wrong("beyond the context", prompt("a b " * 5000), "prompt", LONG, says="2048"),
    Wrong("max_tokens 0", prompt(max_tokens=0), "max_tokens", "invalid_value"),
    Wrong("min_tokens above the default of max_tokens", prompt(min_tokens=17), "min_tokens", "invalid_value"),
    Wrong("logprobs 6", prompt(logprobs=6), "logprobs", "invalid_value", says="6"),
    Wrong("logprobs -1", prompt(logprobs=-1), "logprobs", "invalid_value"),
    Wrong("logprobs true", prompt(logprobs=True), "logprobs", "invalid_value"),
    Wrong("echo with logprobs", prompt(logprobs=0, echo=True), "echo", "unsupported_value"),
    Wrong("suffix", prompt(suffix="end"), "suffix", "unsupported_value"),
    Wrong("best_of above n", prompt(best_of=3, n=2), "best_of", "unsupported_value", says="2"),
    Wrong("unknown model", prompt(model="gpt-9"), "model", "model_not_found", 404),
    Wrong("too many choices in all", prompt(["x"] * 10, n=128), "n", "invalid_value", says="1280"),
    Wrong("very many prompts", prompt(["x"] * 10**6), "n", "invalid_value", says="1000000"),
    Wrong("stream_options without stream", prompt(stream_options={}), "stream_options", "invalid_value"),
]


@pytest.mark.parametrize("wrong", TABLE, ids=lambda wrong: wrong.name)
async def test_a_wrong_completion_says_what_is_wrong_and_reaches_nobody(wrong: Wrong, edge: RunningEdge) -> None:
    await check_refused(edge, ROUTE, wrong)
