"""Chat completions end to end: a real client, a real server, the scheduler played by the test."""

from __future__ import annotations

import asyncio

from tests.actors.edge.running import MODEL, RunningEdge
from tests.pictures import picture
from vlmrt.runtime.messages import ActorName, Decode, Epoch, NeedMedia


async def test_an_answer_carries_text_finish_reason_and_usage(edge: RunningEdge) -> None:
    call = asyncio.create_task(
        edge.client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hello"}])
    )
    submit = await edge.submitted()
    await edge.answer(submit, "Hi there! 你好 🙂")
    done = await call
    assert done.object == "chat.completion"
    assert done.id.startswith("chatcmpl-")
    assert done.model == MODEL
    assert done.choices[0].message.content == "Hi there! 你好 🙂"
    assert done.choices[0].finish_reason == "stop"
    assert done.usage is not None
    assert done.usage.prompt_tokens == len(submit.prompt_token_ids)
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens


async def test_a_stream_joins_to_the_whole_text(edge: RunningEdge) -> None:
    async with edge.answering("Streams of 漢字 and 👩‍👩‍👧 arrive whole."):
        stream = await edge.client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hello"}], stream=True
        )
        chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Streams of 漢字 and 👩‍👩‍👧 arrive whole."
    )
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "stop"]


async def test_pictures_become_placeholders_and_their_bytes_go_to_the_worker_named(edge: RunningEdge) -> None:
    first, second = picture(0), picture(1)
    content = [first.part, {"type": "text", "text": "Compare them."}, second.part]
    call = asyncio.create_task(
        edge.client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": content}],  # type: ignore[list-item,misc]
        )
    )
    submit = await edge.submitted()
    assert len(submit.media) == 2
    await edge.actor.handle(
        NeedMedia(submit.request_id, submit.media[1].mm_hash, ActorName("media:0"), Epoch(1)), ActorName("scheduler:0")
    )
    peer, decode = await edge.context.outbox.next()
    assert peer == "media:0"
    assert isinstance(decode, Decode)
    assert decode.encoded == second.data
    await edge.answer(submit, "Same.")
    done = await call
    assert done.usage is not None
    assert done.usage.prompt_tokens_details is not None
    num_image_tokens = sum(item.num_tokens for item in submit.media)
    assert done.usage.prompt_tokens_details.model_dump()["image_tokens"] == num_image_tokens
