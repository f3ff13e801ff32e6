"""Clips in conversations: what is asked about them, which groups the scheduler hears of, what a media worker gets."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.actors.edge.running import SCHEDULER, RunningEdge, edge_config, http, running_edge
from tests.actors.edge.test_wrong_requests import JSON, ROUTE, Wrong, check_refused, part
from tests.clips import make_clip
from tests.pictures import picture
from tests.support import peer_down, peer_up
from vlmrt.actors.edge import scheduler_link
from vlmrt.actors.models.qwen2_vl.video import frame_choice, plan_clip
from vlmrt.actors.models.registry import load_video_processing
from vlmrt.runtime.config import VideoOptions
from vlmrt.runtime.control_messages import MediaReady
from vlmrt.runtime.errors import WireError
from vlmrt.runtime.frame_list import unpack_frames
from vlmrt.runtime.messages import (
    ActorName,
    ClipInfo,
    Decode,
    DecodeFrames,
    Epoch,
    MediaItem,
    MediaUnsent,
    NeedMedia,
    Probe,
    Probed,
    Submit,
)

MEDIA = ActorName("media:0")
CLIP = make_clip(64, 48, 4)
INFO = ClipInfo(128, 96, 40, 10.0, 4.0)
TEXT = {"type": "text", "text": "What happens?"}
VIDEO = "messages[0].content[0]"


def url(data: bytes = CLIP, mime: str = "video/mp4") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def video(data: bytes = CLIP, **options: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url(data), **options}}


def about(*parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [*parts, TEXT]}], **fields}


@pytest.fixture
async def edge(checkpoint: Path, tmp_path: Path) -> AsyncIterator[RunningEdge]:
    """With a media worker, whose part the test plays."""
    async with running_edge(edge_config(checkpoint), tmp_path) as running:
        await running.actor.peer_up(peer_up("media:0", MediaReady(1 << 20)))
        yield running


@asynccontextmanager
async def asked(edge: RunningEdge, body: dict[str, Any]) -> AsyncIterator[asyncio.Task[tuple[int, Any]]]:
    """The answer to a request that is under way: status and body."""

    async def post() -> tuple[int, Any]:
        async with http() as session, session.post(edge.url + ROUTE, json=body) as response:
            return response.status, await response.json()

    task = asyncio.create_task(post())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def probed(edge: RunningEdge, info: ClipInfo = INFO) -> Probe:
    peer, probe = await edge.context.outbox.next()
    assert peer == MEDIA
    assert isinstance(probe, Probe)
    await edge.actor.handle(Probed(probe.probe_id, info), MEDIA)
    return probe


async def submitted(edge: RunningEdge, body: dict[str, Any], *infos: ClipInfo) -> Submit:
    """What the scheduler hears of the request, whose client goes then."""
    async with asked(edge, body):
        for info in infos:
            await probed(edge, info)
        submit = await edge.submitted()
    await edge.aborted()
    return submit


async def test_the_groups_of_a_clip_are_items_one_behind_the_other(edge: RunningEdge, checkpoint: Path) -> None:
    async with asked(edge, about(video(fps=2), TEXT)) as answer:
        probe = await probed(edge)
        assert probe.encoded == CLIP
        submit = await edge.submitted()
        processing = load_video_processing(checkpoint)
        plan = plan_clip(128, 96, 40, 10.0, processing, frame_choice(processing, fps=2, frame_limit=768), None)
        assert len(plan.groups) == 4
        assert [item.time_offset for item in submit.media] == [0, 1, 2, 3]
        assert [item.continues for item in submit.media] == [False, True, True, True]
        assert {item.grid_thw for item in submit.media} == {(1, *plan.grid_thw[1:])}
        assert len({item.mm_hash for item in submit.media}) == 4
        start, count = submit.media[0].start, plan.num_group_tokens
        assert [item.start for item in submit.media] == [start + index * count for index in range(4)]
        pad = edge.ids("<|video_pad|>")
        assert list(submit.prompt_token_ids[start : start + 4 * count]) == pad * (4 * count)
        assert submit.prompt_token_ids.count(pad[0]) == 4 * count
        await edge.answer(submit, "It moves.")
        status, body = await answer
    assert status == 200
    details = body["usage"]["prompt_tokens_details"]
    assert (details["image_tokens"], details["video_tokens"]) == (0, 4 * count)
    assert details["text_tokens"] == len(submit.prompt_token_ids) - 4 * count


async def test_clips_and_pictures_stay_in_the_order_of_the_message(edge: RunningEdge) -> None:
    longer = ClipInfo(64, 64, 60, 10.0, 6.0)
    body = about(video(CLIP), picture(0).part, TEXT, video(make_clip(64, 48, 5)), picture(1).part)
    async with asked(edge, body):
        by_bytes = {CLIP: INFO}
        for _ in range(2):
            _, probe = await edge.context.outbox.next()
            assert isinstance(probe, Probe)
            await edge.actor.handle(Probed(probe.probe_id, by_bytes.get(probe.encoded, longer)), MEDIA)
        submit = await edge.submitted()
    continues = [item.continues for item in submit.media]
    assert continues == [False, *[True] * 3, False, False, *[True] * 5, False]
    image, clip = edge.ids("<|image_pad|>")[0], edge.ids("<|video_pad|>")[0]
    ids = [submit.prompt_token_ids[item.start] for item in submit.media]
    assert ids == [clip] * 4 + [image] + [clip] * 6 + [image]
    ends = [item.start + item.num_tokens for item in submit.media]
    for item, following, end in zip(submit.media, submit.media[1:], ends, strict=False):
        assert (following.start == end) == following.continues
        assert set(submit.prompt_token_ids[item.start : end]) <= {image, clip}
    await edge.aborted()


async def test_a_clip_seen_before_is_not_asked_about_and_keeps_its_keys(edge: RunningEdge) -> None:
    first = await submitted(edge, about(video(fps=2)), INFO)
    again = await submitted(edge, about(TEXT, video(fps=2)))
    hashes = [item.mm_hash for item in first.media]
    assert [item.mm_hash for item in again.media] == hashes
    salted = await submitted(edge, about(video(fps=2), cache_salt="mine"))
    smaller = await submitted(edge, about(video(fps=2, max_pixels=28 * 28 * 4)))
    sparser = await submitted(edge, about(video(fps=1)))
    for other in (salted, smaller):
        assert not set(hashes) & {item.mm_hash for item in other.media}
    assert {item.mm_hash for item in sparser.media} != set(hashes)


@pytest.mark.parametrize(
    ("options", "num_groups"),
    [
        ({}, 4),  # of 4 s, at 2 frames a second
        ({"fps": 1}, 2),
        ({"fps": 5.0}, 10),
        ({"fps": 1e300}, 20),
        ({"fps": 1e-300}, 2),  # the checkpoint's least
        ({"num_frames": 6}, 3),
        ({"num_frames": 1}, 1),
        ({"num_frames": 768}, 20),
        ({"max_frames": 4}, 2),
        ({"max_frames": 1}, 1),
        ({"fps": 0.1, "min_frames": 12}, 6),
    ],
)
async def test_options_choose_the_frames(options: dict[str, Any], num_groups: int, edge: RunningEdge) -> None:
    inside = await submitted(edge, about(video(**options)), INFO)
    assert len(inside.media) == num_groups
    beside = await submitted(edge, about({"type": "video", "video": url(), **options}))
    bare = await submitted(edge, about({"type": "video_url", "video_url": url(), **options}))
    for_all = await submitted(edge, about({"type": "video_url", "video_url": url()}, mm_processor_kwargs=options))
    assert inside.media == beside.media == bare.media == for_all.media


async def test_a_parts_own_options_win(edge: RunningEdge) -> None:
    kwargs = {"num_frames": 12, "max_pixels": 28 * 28 * 4}
    submit = await submitted(edge, about(video(fps=1), mm_processor_kwargs=kwargs), INFO)
    assert len(submit.media) == 2
    assert submit.media[0].num_tokens <= 4
    larger = await submitted(edge, about(video(fps=1, max_pixels=28 * 28 * 9), mm_processor_kwargs=kwargs))
    assert larger.media[0].num_tokens > 4


async def test_total_pixels_bound_all_frames_together(edge: RunningEdge) -> None:
    large = ClipInfo(640, 480, 40, 10.0, 4.0)
    least = 28 * 28 * 4
    submit = await submitted(edge, about(video(fps=2, min_pixels=least, total_pixels=28 * 28 * 40)), large)
    assert sum(item.num_tokens for item in submit.media) <= 40
    free = await submitted(edge, about(video(fps=2)))
    assert sum(item.num_tokens for item in free.media) > 40


async def test_frames_may_come_as_pictures(edge: RunningEdge) -> None:
    frames = [picture(number).data for number in range(5)]
    listed = {"type": "video", "video": [picture(number).part["image_url"]["url"] for number in range(5)]}
    info = ClipInfo(112, 112, 5, 2.0, 2.5)
    async with asked(edge, about(listed)):
        probe = await probed(edge, info)
        assert [bytes(frame) for frame in unpack_frames(probe.encoded)] == frames
        submit = await edge.submitted()
    await edge.aborted()
    assert len(submit.media) == 3
    joined = "data:video/jpeg;base64," + ",".join(base64.b64encode(frame).decode() for frame in frames)
    same = await submitted(edge, about({"type": "video_url", "video_url": {"url": joined, "fps": 4}}))
    assert same.media == submit.media
    fewer = await submitted(edge, about({**listed, "num_frames": 2}))
    assert len(fewer.media) == 1


async def test_groups_asked_for_together_go_to_the_worker_as_one(edge: RunningEdge) -> None:
    async with asked(edge, about(video(fps=2), picture(0).part)):
        await probed(edge)
        submit = await edge.submitted()
        for item in (*submit.media[1:], submit.media[0]):
            await edge.actor.handle(NeedMedia(submit.request_id, item.mm_hash, MEDIA, Epoch(1)), SCHEDULER)
        peer, image = await edge.context.outbox.next()
        assert isinstance(image, Decode)
        peer, frames = await edge.context.outbox.next()
        assert peer == MEDIA
        assert isinstance(frames, DecodeFrames)
        assert (frames.encoded, frames.size) == (CLIP, (128, 96))
        order = [*submit.media[1:4], submit.media[0]]
        assert [group.mm_hash for group in frames.groups] == [item.mm_hash for item in order]
        assert [group.frame_indices for group in frames.groups] == [(10, 15), (20, 25), (30, 35), (0, 5)]
        await asyncio.sleep(0.01)
        assert edge.sent == []
        await edge.actor.handle(NeedMedia(submit.request_id, order[0].mm_hash, MEDIA, Epoch(1)), SCHEDULER)
        _, again = await edge.context.outbox.next()
        assert isinstance(again, DecodeFrames)
        assert len(again.groups) == 1
    await edge.aborted()


async def test_a_large_clip_is_not_sent_again_for_every_single_group(
    edge: RunningEdge, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting: list[tuple[float, Callable[[], None]]] = []
    loop = asyncio.get_running_loop()
    call_later = loop.call_later

    def noted(delay_s: float, callback: Any, *arguments: Any) -> asyncio.TimerHandle | None:
        if callback.__name__ != "_hand_out_groups":
            return call_later(delay_s, callback, *arguments)
        waiting.append((delay_s, lambda: callback(*arguments)))
        return None

    async with asked(edge, about(video(fps=2))):
        await probed(edge)
        submit = await edge.submitted()
        monkeypatch.setattr(loop, "call_later", noted)

        async def wanted(media: ActorName, item: MediaItem) -> None:
            await edge.actor.handle(NeedMedia(submit.request_id, item.mm_hash, media, Epoch(1)), SCHEDULER)

        async def sent() -> int:
            """How many groups go out where the time has come."""
            waiting[-1][1]()
            message = (await edge.context.outbox.next()).message
            assert isinstance(message, DecodeFrames)
            return len(message.groups)

        await wanted(MEDIA, submit.media[0])
        assert await sent() == 1
        for item in submit.media[1:]:
            await wanted(MEDIA, item)
        assert await sent() == 3
        await wanted(ActorName("media:1"), submit.media[0])
        assert await sent() == 1
        again_s = scheduler_link.GATHER_S + len(CLIP) / scheduler_link.REPEAT_BYTES_PER_S
        assert [delay_s for delay_s, _ in waiting] == [scheduler_link.GATHER_S, again_s, scheduler_link.GATHER_S]
        monkeypatch.undo()
    await edge.aborted()


async def test_every_group_that_cannot_be_sent_is_reported(edge: RunningEdge) -> None:
    async with asked(edge, about(video(fps=2))):
        await probed(edge)
        submit = await edge.submitted()
        await edge.actor.peer_down(peer_down("media:0"))
        await edge.actor.peer_up(peer_up("media:0", MediaReady(1), epoch=2))
        for item in submit.media:
            await edge.actor.handle(NeedMedia(submit.request_id, item.mm_hash, MEDIA, Epoch(1)), SCHEDULER)
        unsent = [(await edge.context.outbox.next()).message for _ in submit.media]
        assert unsent == [MediaUnsent(submit.request_id, item.mm_hash) for item in submit.media]
        edge.context.outbox.full.add(MEDIA)
        await edge.actor.handle(NeedMedia(submit.request_id, submit.media[0].mm_hash, MEDIA, Epoch(2)), SCHEDULER)
        assert (await edge.context.outbox.next()).message == unsent[0]
    await edge.aborted()


async def test_groups_of_a_request_that_ended_meanwhile_are_not_sent(edge: RunningEdge) -> None:
    async with asked(edge, about(video(fps=2))):
        await probed(edge)
        submit = await edge.submitted()
    await edge.aborted()
    await edge.actor.handle(NeedMedia(submit.request_id, submit.media[0].mm_hash, MEDIA, Epoch(1)), SCHEDULER)
    await asyncio.sleep(0.01)
    assert edge.sent == []
    assert edge.actor.media_bytes_in_flight == 0


async def test_what_a_media_worker_refuses_is_said_with_the_field(edge: RunningEdge) -> None:
    async with asked(edge, about(video())) as answer:
        _, probe = await edge.context.outbox.next()
        assert isinstance(probe, Probe)
        error = WireError(400, "the video cannot be decoded: it has no frames", "invalid_video")
        await edge.actor.handle(Probed(probe.probe_id, error=error), MEDIA)
        status, body = await answer
    assert status == 400
    assert body["error"] == {
        "message": f"{VIDEO}.video_url.url: the video cannot be decoded: it has no frames",
        "type": "invalid_request_error",
        "param": f"{VIDEO}.video_url.url",
        "code": "invalid_video",
    }
    assert edge.sent == []


@pytest.mark.parametrize(
    ("info", "options", "code"),
    [
        (ClipInfo(10_000, 28, 40, 10.0, 4.0), {}, "invalid_video_size"),
        (ClipInfo(640, 480, 4000, 10.0, 400.0), {"fps": 2}, "context_length_exceeded"),
        (INFO, {"num_frames": 769}, "video_too_large"),
    ],
)
async def test_what_a_clip_turns_out_to_be_may_be_too_much(
    info: ClipInfo, options: dict[str, Any], code: str, edge: RunningEdge
) -> None:
    async with asked(edge, about(video(**options))) as answer:
        await probed(edge, info)
        status, body = await answer
    assert (status, body["error"]["code"]) == (400, code)
    assert edge.sent == []


async def test_tokenize_counts_clips(edge: RunningEdge) -> None:
    async with http() as session:
        task = asyncio.create_task(session.post(edge.url + "/tokenize", json=about(video(fps=2))))
        await probed(edge)
        response = await task
        counted = await response.json()
    submit = await submitted(edge, about(video(fps=2)))
    assert counted["tokens"] == list(submit.prompt_token_ids)


async def test_too_many_bytes_are_413(checkpoint: Path, tmp_path: Path) -> None:
    config = edge_config(checkpoint, video=VideoOptions(max_mib=1, limit_videos=2))
    async with running_edge(config, tmp_path) as edge, http() as session:
        for body, status, code in (
            (about(video(bytes(2 << 20))), 413, "invalid_video_url"),
            (about(*[video()] * 3), 400, "too_many_videos"),
        ):
            data = io.BytesIO(json.dumps(body).encode())
            async with session.post(edge.url + ROUTE, data=data, headers=JSON) as response:
                error = (await response.json())["error"]
            assert (response.status, error["code"]) == (status, code)
            assert set(error) == {"message", "type", "param", "code"}
        assert edge.sent == []


FIELD = f"{VIDEO}.video_url.url"
TABLE = [
    Wrong("no video_url", part(type="video_url"), f"{VIDEO}.video_url", "missing_field"),
    Wrong("no video", part(type="video"), f"{VIDEO}.video", "missing_field"),
    Wrong("no url", part(type="video_url", video_url={}), FIELD, "missing_field"),
    Wrong("a number", part(type="video_url", video_url=7), f"{VIDEO}.video_url", "invalid_value"),
    Wrong("no frames", part(type="video", video=[]), f"{VIDEO}.video", "invalid_value"),
    Wrong("too many frames", part(type="video", video=["x"] * 4097), f"{VIDEO}.video", "invalid_value", says="4096"),
    Wrong("a frame that is a video", part(type="video", video=[url()]), f"{VIDEO}.video[0]", "invalid_image_url"),
    Wrong("a name", part(**video(), uuid="mine"), f"{VIDEO}.uuid", "unsupported_value"),
    Wrong("no scheme", part(type="video", video="clip.mp4"), f"{VIDEO}.video", "invalid_video_url", says="video"),
    Wrong("http is off", part(type="video", video="http://example.com/a.mp4"), f"{VIDEO}.video", "invalid_video_url"),
    Wrong("files are off", part(type="video", video="file:///etc/passwd"), f"{VIDEO}.video", "invalid_video_url"),
    Wrong("a picture", part(type="video", video=url(picture(0).data, "image/png")), f"{VIDEO}.video",
          "invalid_video_url", says="video/*"),
    Wrong("a text", part(type="video", video=url(b"hello", "text/plain")), f"{VIDEO}.video", "invalid_video_url"),
    Wrong("empty", part(type="video", video="data:video/mp4;base64,"), f"{VIDEO}.video", "invalid_video_url"),
    Wrong("an empty frame", part(type="video", video="data:video/jpeg;base64,YWJj,,YWJj"), f"{VIDEO}.video",
          "invalid_video_url"),
    Wrong("broken base64", part(type="video", video="data:video/mp4;base64,ab!d"), f"{VIDEO}.video",
          "invalid_video_url"),
    Wrong("fps 0", part(**video(fps=0)), f"{VIDEO}.video_url.fps", "invalid_value"),
    Wrong("fps -1", part(**video(fps=-1)), f"{VIDEO}.video_url.fps", "invalid_value"),
    Wrong("fps in words", part(**video(fps="2")), f"{VIDEO}.video_url.fps", "invalid_value"),
    Wrong("fps NaN", b'{"messages": [{"role": "user", "content": [{"type": "video", "video": "x", "fps": NaN}]}]}',
          None, "invalid_json"),
    Wrong("fps 1e999", b'{"messages": [{"role": "user", "content": [{"type": "video", "video": "x", "fps": 1e999}]}]}',
          f"{VIDEO}.fps", "invalid_value"),
    Wrong("fps beside the part 0", part(**video(), fps=0), f"{VIDEO}.fps", "invalid_value"),
    Wrong("num_frames 0", part(**video(num_frames=0)), f"{VIDEO}.video_url.num_frames", "invalid_value"),
    Wrong("num_frames 1.5", part(**video(num_frames=1.5)), f"{VIDEO}.video_url.num_frames", "invalid_value"),
    Wrong("num_frames 10**30", part(**video(num_frames=10**30)), f"{VIDEO}.video_url.num_frames", "invalid_value"),
    Wrong("max_frames 0", part(**video(max_frames=0)), f"{VIDEO}.video_url.max_frames", "invalid_value"),
    Wrong("fps and num_frames", part(**video(fps=1, num_frames=2)), f"{VIDEO}.num_frames", "invalid_value"),
    Wrong("min_frames above max_frames", part(**video(min_frames=9, max_frames=8)), f"{VIDEO}.min_frames",
          "invalid_value", says="8"),
    Wrong("min_pixels above max_pixels", part(**video(min_pixels=9, max_pixels=8)), f"{VIDEO}.min_pixels",
          "invalid_value", says="8"),
    Wrong("total_pixels 0", part(**video(total_pixels=0)), f"{VIDEO}.video_url.total_pixels", "invalid_value"),
    Wrong("fps for all 0", about(mm_processor_kwargs={"fps": 0}), "mm_processor_kwargs.fps", "invalid_value"),
    Wrong("fps and num_frames for all", about(mm_processor_kwargs={"fps": 1, "num_frames": 2}),
          "mm_processor_kwargs.num_frames", "invalid_value"),
    Wrong("too many", about(*[video(b"x")] * 17), "messages", "too_many_videos", says="16"),
]  # fmt: skip


@pytest.mark.parametrize("wrong", TABLE, ids=lambda wrong: wrong.name)
async def test_a_wrong_video_says_what_is_wrong_and_reaches_nobody(wrong: Wrong, edge: RunningEdge) -> None:
    await check_refused(edge, ROUTE, wrong)


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_video", "video_url": "x"}]}]}),
        (
            "/v1/messages",
            {
                "max_tokens": 1,
                "messages": [{"role": "user", "content": [{"type": "video", "source": {"type": "url", "url": "x"}}]}],
            },
        ),
    ],
)
async def test_the_other_layers_refuse_clips_by_name(route: str, body: dict[str, Any], edge: RunningEdge) -> None:
    async with http() as session, session.post(edge.url + route, json={"model": "model", **body}) as response:
        error = (await response.json())["error"]
    assert response.status == 400
    assert "video" in error["message"]
    assert "supported" in error["message"]
    assert edge.sent == []
