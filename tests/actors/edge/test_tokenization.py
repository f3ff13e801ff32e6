"""POST /tokenize counts what a prompt costs, POST /detokenize says what ids mean; both without the scheduler."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.actors.edge.running import RunningEdge, edge_config, running_edge
from tests.actors.edge.test_generation import HELLO, create, post
from tests.actors.edge.test_wrong_requests import Wrong, check_refused
from tests.pictures import picture
from tests.support import peer_down
from vlmrt.runtime.config import ServerOptions
from vlmrt.runtime.messages import ActorName, KnownMedia, LookUpMedia, MediaFound, MmHash

TEXTS = ("", "Hello", "漢字 🙂\n\n  x", "<|im_start|>user\nhi<|im_end|>")


@pytest.mark.parametrize("text", TEXTS)
async def test_a_prompt_goes_there_and_back(text: str, edge: RunningEdge) -> None:
    await edge.actor.peer_down(peer_down("scheduler:0"))
    answer = await post(edge, "/tokenize", prompt=text, model="model")
    assert answer == {
        "count": len(edge.ids(text)),
        "max_model_len": 2048,
        "tokens": edge.ids(text),
        "token_strs": None,
    }
    assert await post(edge, "/detokenize", tokens=answer["tokens"], model="model") == {"prompt": text}
    assert edge.sent == []


async def test_tokens_are_named_where_asked_for(edge: RunningEdge) -> None:
    answer = await post(edge, "/tokenize", prompt="a b<|im_end|>", return_token_strs=True)
    assert answer["token_strs"] == [edge.tokenizer.id_to_token(id) for id in answer["tokens"]]


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": HELLO},
        {"messages": [{"role": "user", "content": [picture(0).part, {"type": "text", "text": "?"}, picture(1).part]}]},
        {"messages": [*HELLO, {"role": "assistant", "content": "Well,"}], "continue_final_message": True},
        {"messages": HELLO, "add_generation_prompt": False},
        {"messages": [{"role": "user", "content": [picture(7).part]}], "mm_processor_kwargs": {"max_pixels": 9000}},
    ],
    ids=range(5),
)
async def test_a_conversation_costs_what_its_completion_says(fields: dict[str, Any], edge: RunningEdge) -> None:
    answer = await post(edge, "/tokenize", **fields)
    call = asyncio.create_task(create(edge, messages=fields["messages"], extra_body=fields))
    submit = await edge.submitted()
    await edge.answer(submit, "x")
    done = await call
    assert answer["tokens"] == list(submit.prompt_token_ids)
    assert answer["count"] == done.usage.prompt_tokens


async def test_an_image_that_is_named_is_looked_up(edge: RunningEdge) -> None:
    messages = [{"role": "user", "content": [{"type": "image_url", "uuid": "known"}]}]
    call = asyncio.create_task(post(edge, "/tokenize", messages=messages, cache_salt="mine"))
    lookup = (await edge.context.outbox.next()).message
    assert isinstance(lookup, LookUpMedia)
    assert lookup.cache_salt == "mine"
    known = KnownMedia(MmHash("k" * 64), 4, (1, 4, 4))
    await edge.actor.handle(MediaFound(lookup.lookup_id, (known,)), ActorName("scheduler:0"))
    pad = edge.tokenizer.token_to_id("<|image_pad|>")
    assert (await call)["tokens"].count(pad) == 4
    assert len(edge.sent) == 1  # the lookup is forgotten


async def test_a_scheduler_that_does_not_answer_costs_the_time_of_a_request(checkpoint: Path, tmp_path: Path) -> None:
    config = edge_config(checkpoint, server=ServerOptions(request_timeout_s=0.1))
    async with running_edge(config, tmp_path) as edge:
        answer = await post(edge, "/tokenize", messages=[{"role": "user", "content": [{"type": "image", "uuid": "u"}]}])
        assert answer["error"]["code"] == "request_timeout"


async def test_a_conversation_longer_than_the_context_is_counted_all_the_same(edge: RunningEdge) -> None:
    answer = await post(edge, "/tokenize", messages=[{"role": "user", "content": "a b " * 3000}])
    assert answer["count"] > answer["max_model_len"] == 2048


WRONG_TOKENIZE = [
    Wrong("nothing", {}, "prompt", "missing_field"),
    Wrong("both", {"prompt": "x", "messages": HELLO}, "prompt", "invalid_value"),
    Wrong("a number", {"prompt": 5}, "prompt", "invalid_value"),
    Wrong("no messages", {"messages": []}, "messages", "invalid_value"),
    Wrong("unknown model", {"prompt": "x", "model": "gpt-9"}, "model", "model_not_found", 404),
    Wrong("cache_salt", {"messages": HELLO, "cache_salt": "a b"}, "cache_salt", "invalid_value"),
    Wrong("too many images", {"messages": [{"role": "user", "content": [picture(0).part] * 65}]}, "messages",
          "too_many_images"),
    Wrong("strange role", {"messages": [{"role": "cat", "content": "x"}]}, "messages[0].role", "invalid_value"),
]  # fmt: skip
WRONG_DETOKENIZE = [
    Wrong("no tokens", {}, "tokens", "missing_field"),
    Wrong("a text", {"tokens": "x"}, "tokens", "invalid_value"),
    Wrong("-1", {"tokens": [-1]}, "tokens", "invalid_value"),
    Wrong("beyond the vocabulary", {"tokens": [1, 10**7]}, "tokens", "invalid_value", says="10000000"),
    Wrong("unknown model", {"tokens": [], "model": "gpt-9"}, "model", "model_not_found", 404),
]


@pytest.mark.parametrize("wrong", WRONG_TOKENIZE, ids=lambda wrong: wrong.name)
async def test_wrong_requests_to_tokenize(wrong: Wrong, edge: RunningEdge) -> None:
    await check_refused(edge, "/tokenize", wrong)


@pytest.mark.parametrize("wrong", WRONG_DETOKENIZE, ids=lambda wrong: wrong.name)
async def test_wrong_requests_to_detokenize(wrong: Wrong, edge: RunningEdge) -> None:
    await check_refused(edge, "/detokenize", wrong)
