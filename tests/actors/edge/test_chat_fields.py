"""Fields of chat completions: what of a conversation reaches the prompt, and what of a picture its identity."""

from __future__ import annotations

import asyncio
import base64
import io
from typing import Any

import pytest
from PIL import Image

from tests.actors.edge.running import MODEL, RunningEdge, fake_logprobs
from tests.pictures import noise, picture
from vlmrt.runtime.messages import Submit


async def submit_of(edge: RunningEdge, **body: Any) -> Submit:
    """What the scheduler is asked for such a request."""
    known = {name: body.pop(name) for name in ("messages", "logprobs", "top_logprobs") if name in body}
    known.setdefault("messages", [{"role": "user", "content": "Hello"}])
    call = asyncio.create_task(edge.client.chat.completions.create(model=MODEL, extra_body=body, **known))
    submit = await edge.submitted()
    await edge.answer(submit, "x")
    await call
    return submit


def prompt_text(edge: RunningEdge, submit: Submit) -> str:
    text: str = edge.tokenizer.decode(list(submit.prompt_token_ids), skip_special_tokens=False)
    return text


SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("messages", "rendered"),
    [
        (
            [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi", "name": "Ann"}],
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n",
        ),
        (
            [
                {"role": "system", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": " brief."}]},
                {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            ],
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n",
        ),
        (
            [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "42", "tool_call_id": "call_1"},
            ],
            SYSTEM
            + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n<|im_start|>tool\n42<|im_end|>\n",
        ),
    ],
    ids=["developer is system", "parts of a system message", "calls and their results"],
)
async def test_roles_and_forms_of_content(messages: list[dict[str, Any]], rendered: str, edge: RunningEdge) -> None:
    text = prompt_text(edge, await submit_of(edge, messages=messages))
    assert text == rendered + "<|im_start|>assistant\n"


async def test_the_last_message_of_the_assistant(edge: RunningEdge) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well,"}]
    start = SYSTEM + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nWell,"
    for fields, end in (
        ({}, "<|im_end|>\n<|im_start|>assistant\n"),
        ({"add_generation_prompt": False}, "<|im_end|>\n"),
        ({"continue_final_message": True}, ""),
        ({"continue_final_message": True, "add_generation_prompt": False}, ""),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "<|im_end|>\n<|im_start|>assistant\n"),
    ):
        assert prompt_text(edge, await submit_of(edge, messages=messages, **fields)) == start + end, fields


async def test_logprobs_are_asked_for_and_told(edge: RunningEdge) -> None:
    for fields, num_logprobs in (({}, -1), ({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 20}, 20)):
        assert (await submit_of(edge, **fields)).sampling.num_logprobs == num_logprobs
    ids = edge.ids("He 漢🙂")
    create = edge.client.chat.completions.create
    call = asyncio.create_task(
        create(model=MODEL, messages=[{"role": "user", "content": "x"}], logprobs=True, top_logprobs=2)
    )
    await edge.output(await edge.submitted(), ids, "length")
    choice = (await call).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert bytes(byte for entry in choice.logprobs.content for byte in entry.bytes or ()) == "He 漢🙂".encode()
    for token_id, entry in zip(ids, choice.logprobs.content, strict=True):
        assert entry.logprob == fake_logprobs(token_id, 2).logprob
        assert entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob == entry.logprob
        assert len(entry.top_logprobs) == 2


async def test_impossible_tokens_have_a_finite_logprob(edge: RunningEdge) -> None:
    from vlmrt.actors.edge.chat_format import LEAST_LOGPROB
    from vlmrt.runtime.messages import ActorName, TokenBatch, TokenLogprobs, TokenOutput, Usage

    call = asyncio.create_task(
        edge.client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "x"}], logprobs=True, top_logprobs=1
        )
    )
    submit = await edge.submitted()
    (token_id, *_) = edge.ids("a")
    logprobs = TokenLogprobs(float("-inf"), ((token_id, float("-inf")),))
    output = TokenOutput(submit.request_id, (token_id,), Usage(1, 0, 1), "length", None, (logprobs,))
    await edge.actor.handle(TokenBatch((output,)), ActorName("scheduler:0"))
    (entry,) = (await call).choices[0].logprobs.content  # type: ignore[union-attr,misc]
    assert (entry.logprob, entry.top_logprobs[0].logprob) == (LEAST_LOGPROB, LEAST_LOGPROB)


def image_part(url: str, **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}, **fields}


async def items_of(edge: RunningEdge, *parts: dict[str, Any], **body: Any) -> list[tuple[str, int]]:
    """(identity, number of tokens) of each picture."""
    submit = await submit_of(edge, messages=[{"role": "user", "content": list(parts)}], **body)
    return [(item.mm_hash, item.num_tokens) for item in submit.media]


LARGE = picture(7).url  # 640x480


async def test_pixel_limits_bind_and_the_nearest_wins(edge: RunningEdge) -> None:
    few, some = 28 * 28 * 10, 28 * 28 * 40
    (own,) = await items_of(edge, image_part(LARGE))
    for parts, fields in (
        ([image_part(LARGE, max_pixels=few)], {}),
        ([{"type": "image_url", "image_url": {"url": LARGE, "max_pixels": few}}], {}),
        ([{"type": "image_url", "image_url": {"url": LARGE, "max_pixels": few}, "max_pixels": some}], {}),
        ([{"type": "image", "image": LARGE, "max_pixels": few}], {}),
        ([{"type": "image_url", "image_url": LARGE, "max_pixels": few}], {}),
        ([image_part(LARGE)], {"mm_processor_kwargs": {"max_pixels": few}}),
        ([image_part(LARGE)], {"mm_processor_kwargs": {"size": {"longest_edge": few, "shortest_edge": 28 * 28}}}),
        ([image_part(LARGE, max_pixels=few)], {"mm_processor_kwargs": {"max_pixels": some}}),
    ):
        ((mm_hash, num_tokens),) = await items_of(edge, *parts, **fields)
        assert num_tokens <= 10 < own[1], (parts, fields)
        assert mm_hash != own[0]
    both = await items_of(edge, image_part(LARGE, max_pixels=few), image_part(LARGE), mm_processor_kwargs=None)
    assert both[1] == own
    assert both[0] != own
    small = picture(0).url
    ((_, few_tokens),) = await items_of(edge, image_part(small))
    ((_, more_tokens),) = await items_of(edge, image_part(small, min_pixels=some))
    assert few_tokens < 40 <= more_tokens


async def test_detail_maps_to_pixel_limits(edge: RunningEdge) -> None:
    counts = {}
    large = base64.b64encode(_png(900, 900)).decode()
    for detail in ("auto", "high", "low"):
        part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{large}", "detail": detail}}
        ((_, counts[detail]),) = await items_of(edge, part)
    assert counts["low"] < counts["auto"] == counts["high"]
    assert counts["low"] * 28 * 28 <= 512 * 512


def _png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    noise(width, height, 0).save(buffer, "PNG")
    return buffer.getvalue()


def _animation() -> bytes:
    buffer = io.BytesIO()
    first, *rest = (noise(60, 40, seed).convert("P") for seed in range(3))
    first.save(buffer, "GIF", save_all=True, append_images=rest)
    return buffer.getvalue()


async def test_the_bytes_say_what_a_picture_is_not_the_media_type(edge: RunningEdge) -> None:
    text = base64.b64encode(picture(0).data).decode()
    found = {
        (await items_of(edge, image_part(f"{start},{data}")))[0]
        for start, data in (
            ("data:image/png;base64", text),
            ("data:image/jpeg;base64", text),
            ("data:image/webp;base64", text),
            ("DATA:IMAGE/PNG;BASE64", text),
            ("data:application/octet-stream;base64", text),
            ("data:;base64", text),
            ("data:image/png;base64", text.rstrip("=")),
            ("data:image/png;base64", "\n".join(text[at : at + 64] for at in range(0, len(text), 64))),
            ("data:image/png;base64", text.replace("+", "-").replace("/", "_")),
        )
    }
    assert len(found) == 1


async def test_an_animation_is_its_first_frame(edge: RunningEdge) -> None:
    data = _animation()
    with Image.open(io.BytesIO(data)) as opened:
        assert getattr(opened, "n_frames", 1) == 3
    url = f"data:image/gif;base64,{base64.b64encode(data).decode()}"
    submit = await submit_of(edge, messages=[{"role": "user", "content": [image_part(url)]}])
    assert submit.media[0].grid_thw[0] == 1


async def test_a_message_may_be_a_picture_alone_and_the_same_one_twice(edge: RunningEdge) -> None:
    (one,) = await items_of(edge, {"type": "image_url", "image_url": picture(1).url})
    assert await items_of(edge, image_part(picture(1).url), image_part(picture(1).url)) == [one, one]
