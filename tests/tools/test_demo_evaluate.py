"""The evaluation asks a server as any client would and counts what comes back."""

from __future__ import annotations

import base64
import io
import json
import random

import av
from aiohttp import web
from aiohttp.test_utils import TestServer
from PIL import Image

from vlmrt.tools.demo.drawing import Clip, Scenery
from vlmrt.tools.demo.evaluate import ask_server, image_url, messages, questions, summary, video_url


def decoded(url: str) -> bytes:
    return base64.b64decode(url.split(",", 1)[1])


def test_pictures_are_sent_as_png_and_jpeg_of_many_sizes() -> None:
    rng, image = random.Random(0), Image.new("RGB", (64, 48), "red")
    urls = [image_url(rng, image) for _ in range(40)]
    assert {url.split(";")[0] for url in urls} == {"data:image/png", "data:image/jpeg"}
    assert len({Image.open(io.BytesIO(decoded(url))).size for url in urls}) > 3


def test_clips_are_sent_as_h264_with_every_frame() -> None:
    (chat,) = questions(1, ["motion"], Scenery(), seed=3)
    (clip,) = (part for turn in chat.turns for part in turn.parts if isinstance(part, Clip))
    with av.open(io.BytesIO(decoded(video_url(clip)))) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert len(list(container.decode(video=0))) == len(clip.frames)


def test_messages_end_with_the_question_and_keep_the_answers_before_it() -> None:
    for chat in questions(24, ["shape", "compare", "chat"], Scenery(), seed=4):
        sent = messages(random.Random(0), chat)
        assert [message["role"] for message in sent] == ["user", "assistant"] * (len(chat.turns) - 1) + ["user"]
        assert [m["content"] for m in sent if m["role"] == "assistant"] == [turn.answer for turn in chat.turns[:-1]]


async def test_answers_of_a_server_are_counted_by_kind() -> None:
    chats = questions(12, ["shape", "chat"], Scenery(), seed=5)

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "m", "object": "model"}]})

    async def complete(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        assert (body["model"], body["temperature"]) == ("m", 0)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for piece in ("A cir", "cle. "):
            chunk = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m"}
            chunk |= {"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]}
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/chat/completions", complete)
    async with TestServer(app) as server:
        results = await ask_server(str(server.make_url("/v1")), None, chats, concurrency=3, stream=True)
    report = summary(results)
    circles = sum(chat.turns[-1].answer == "A circle." for chat in chats)
    assert report["kinds"]["shape"] == {"right": circles, "asked": 6, "percent": round(100 * circles / 6, 1)}
    assert report["kinds"]["chat"]["right"] == 0
    assert report["all"]["asked"] == 12
