"""The media worker: answers, arena, and what happens when the scheduler goes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from tests.actors.edge.encoded_images import save
from tests.clips import make_clip
from tests.pictures import noise
from tests.support import FakeContext, make_config, peer_down, peer_up
from vlmrt.actors.media import actor as media_actor
from vlmrt.actors.media import open_clips
from vlmrt.actors.media.actor import DecodeStuck, MediaActor
from vlmrt.actors.media.clip import Clip
from vlmrt.actors.media.image import decode_image
from vlmrt.actors.media.resize import resize_frame
from vlmrt.runtime.actor import ActorContext
from vlmrt.runtime.config import MemoryOptions, ServerOptions, SupervisionOptions, VideoOptions
from vlmrt.runtime.control_messages import MediaReady, SchedulerReady
from vlmrt.runtime.messages import (
    ActorName,
    ArenaRef,
    ClipInfo,
    Decode,
    DecodeFailed,
    DecodeFrames,
    Epoch,
    FrameGroup,
    FreePixels,
    MmHash,
    PixelsReady,
    Probe,
    Probed,
)
from vlmrt.runtime.shared_memory import ArenaReader

EDGE = ActorName("edge:0")
SCHEDULER = ActorName("scheduler:0")
TARGET = (84, 56)
NUM_BYTES = 84 * 56 * 3


class Worker:
    def __init__(self, context: FakeContext, actor: MediaActor) -> None:
        self.context = context
        self.actor = actor

    async def decode(self, name: str, data: bytes, *, scheduler_epoch: int = 1) -> None:
        await self.actor.handle(Decode(MmHash(name), data, (80, 60), TARGET, Epoch(scheduler_epoch)), EDGE)

    async def ready(self) -> PixelsReady:
        peer, message = await self.context.outbox.next()
        assert peer == SCHEDULER
        assert isinstance(message, PixelsReady), message
        return message

    async def failed(self) -> DecodeFailed:
        peer, message = await self.context.outbox.next()
        assert peer == SCHEDULER
        assert isinstance(message, DecodeFailed), message
        return message

    @property
    def used_bytes(self) -> float:
        return self.context.metrics.snapshot().gauges.get("pixel_arena_bytes", 0.0)


@asynccontextmanager
async def running_worker(run_dir: Path, arena_wait_s: float) -> AsyncIterator[Worker]:
    config = make_config(memory=MemoryOptions(pixel_arena_mib=1))
    async with FakeContext("media:0", run_dir, config) as context:
        actor = MediaActor(cast(ActorContext, context), arena_wait_s=arena_wait_s)
        assert await actor.start() == MediaReady(arena_bytes=1 << 20)
        await actor.peer_up(peer_up(SCHEDULER, SchedulerReady()))
        yield Worker(context, actor)
        await actor.stop(0.0)


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[Worker]:
    async with running_worker(tmp_path, arena_wait_s=30.0) as running:
        yield running


PNG = save(noise(80, 60, 1), "PNG")


async def test_pixels_lie_in_the_arena_until_they_are_freed(worker: Worker) -> None:
    await worker.decode("a", PNG)
    ready = await worker.ready()
    assert ready.mm_hash == "a"
    assert ready.shape == (1, 56, 84, 3)
    pixels = ArenaReader(worker.context.open_memory).view(ready.pixels, ready.shape)
    np.testing.assert_array_equal(pixels, decode_image(PNG, (80, 60), TARGET, 10**6))
    assert worker.used_bytes >= NUM_BYTES
    await worker.actor.handle(FreePixels((ready.pixels,)), SCHEDULER)
    assert worker.used_bytes == 0
    await worker.actor.handle(FreePixels((ready.pixels,)), SCHEDULER)  # twice is no harm
    assert worker.used_bytes == 0


async def test_the_use_of_the_arena_is_shown(worker: Worker) -> None:
    await worker.decode("a", PNG)
    ready = await worker.ready()
    assert 0.0 < ready.begin_s <= ready.end_s <= time.monotonic()
    assert worker.context.metrics.snapshot().gauges["pixel_arena_bytes"] == worker.used_bytes > 0


async def test_a_broken_picture_fails_alone(worker: Worker) -> None:
    await worker.decode("broken", PNG[:200])
    failed = await worker.failed()
    assert failed.error.status == 400
    await worker.decode("whole", PNG)
    assert (await worker.ready()).mm_hash == "whole"


async def decode_without_end(run_dir: Path) -> None:
    config = make_config(supervision=SupervisionOptions(step_timeout_s=0.05))
    async with FakeContext("media:0", run_dir, config) as context:
        actor = MediaActor(cast(ActorContext, context))
        await actor.start()
        await actor.peer_up(peer_up(SCHEDULER, SchedulerReady()))
        await Worker(context, actor).decode("a", PNG)
        await asyncio.wait(context._tasks, timeout=10)


async def test_a_decoder_that_does_not_come_back_ends_the_actor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back = threading.Event()
    monkeypatch.setattr(media_actor, "decode_image", lambda *arguments: back.wait(30))
    try:
        with pytest.raises(DecodeStuck):
            await decode_without_end(tmp_path)
    finally:
        back.set()


async def test_a_full_arena_waits_for_freed_pixels(worker: Worker) -> None:
    refs: list[ArenaRef] = []
    while worker.used_bytes + NUM_BYTES <= 1 << 20:
        await worker.decode(f"{len(refs)}", PNG)
        refs.append((await worker.ready()).pixels)
    await worker.decode("next", PNG)
    await asyncio.sleep(0.05)
    assert not worker.context.outbox.sent
    await worker.actor.handle(FreePixels((refs[3],)), SCHEDULER)
    ready = await worker.ready()
    assert ready.mm_hash == "next"
    assert ready.pixels.offset == refs[3].offset


async def test_an_arena_that_stays_full_is_an_error_to_try_again(tmp_path: Path) -> None:
    async with running_worker(tmp_path, arena_wait_s=0.05) as worker:
        while worker.used_bytes + NUM_BYTES <= 1 << 20:
            await worker.decode("fill", PNG)
            await worker.ready()
        await worker.decode("next", PNG)
        failed = await worker.failed()
    assert (failed.error.status, failed.error.code) == (503, "media_worker_busy")


async def test_a_picture_larger_than_the_arena_is_refused(worker: Worker) -> None:
    await worker.actor.handle(Decode(MmHash("a"), PNG, (80, 60), (28 * 40, 28 * 40), Epoch(1)), EDGE)
    assert (await worker.failed()).error.code == "image_too_large"


async def test_the_schedulers_end_empties_the_arena(worker: Worker) -> None:
    await worker.decode("a", PNG)
    await worker.ready()
    await worker.actor.peer_down(peer_down(SCHEDULER))
    assert worker.used_bytes == 0
    await worker.decode("early", PNG, scheduler_epoch=2)  # from an edge that heard of the next one first
    await worker.decode("late", PNG)  # and from one that has not heard of this one's end yet
    await worker.actor.peer_up(peer_up(SCHEDULER, SchedulerReady(), epoch=2))
    assert (await worker.ready()).mm_hash == "early"
    assert list(worker.context.outbox.sent) == []


async def test_a_picture_for_a_scheduler_not_heard_of_yet_is_decoded_for_it(worker: Worker) -> None:
    await worker.decode("early", PNG, scheduler_epoch=2)
    await worker.decode("a", PNG)
    assert (await worker.ready()).mm_hash == "a"
    await worker.actor.peer_down(peer_down(SCHEDULER))
    await worker.actor.peer_up(peer_up(SCHEDULER, SchedulerReady(), epoch=2))
    assert (await worker.ready()).mm_hash == "early"


async def test_a_full_channel_delays_the_answer(worker: Worker) -> None:
    worker.context.outbox.full.add(SCHEDULER)
    await worker.decode("a", PNG)
    await asyncio.sleep(0.1)
    worker.context.outbox.full.clear()
    assert (await worker.ready()).mm_hash == "a"


# ---------------------------------------------------------------- clips

CLIP = make_clip()


def groups_of(name: str, *indices: tuple[int, ...]) -> tuple[FrameGroup, ...]:
    return tuple(FrameGroup(MmHash(f"{name}{number}"), pair) for number, pair in enumerate(indices))


async def probed(worker: Worker, data: bytes, probe_id: int = 7) -> Probed:
    await worker.actor.handle(Probe(probe_id, data), EDGE)
    peer, message = await worker.context.outbox.next()
    assert peer == EDGE
    assert isinstance(message, Probed)
    assert message.probe_id == probe_id
    return message


async def test_a_probe_is_answered_to_its_edge(worker: Worker) -> None:
    assert await probed(worker, CLIP) == Probed(7, ClipInfo(160, 96, 30, 30.0, 1.0))
    refused = await probed(worker, PNG, 8)
    assert refused.clip is None
    assert refused.error is not None
    assert (refused.error.status, refused.error.code) == (400, "invalid_video")


async def test_groups_come_one_by_one_in_order(worker: Worker) -> None:
    groups = groups_of("g", (0, 4), (8, 12), (16, 20))
    await worker.actor.handle(DecodeFrames(CLIP, (160, 96), TARGET, groups, Epoch(1)), EDGE)
    clip, reader = Clip(CLIP, VideoOptions()), ArenaReader(worker.context.open_memory)
    for group in groups:
        ready = await worker.ready()
        assert (ready.mm_hash, ready.shape) == (group.mm_hash, (2, 56, 84, 3))
        expected = np.stack([resize_frame(frame, TARGET) for frame in clip.read(group.frame_indices)])
        np.testing.assert_array_equal(reader.view(ready.pixels, ready.shape), expected)
    counters = worker.context.metrics.snapshot().counters
    assert counters['frames_decoded_total{reader="decord"}'] == 6


async def test_a_clip_that_was_probed_is_not_opened_again(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[bytes] = []

    def open_clip(encoded: bytes, options: VideoOptions) -> Clip:
        opened.append(encoded)
        return Clip(encoded, options)

    monkeypatch.setattr(open_clips, "Clip", open_clip)
    await probed(worker, CLIP)
    for number in range(3):
        groups = groups_of(f"{number}-", (number, number + 1))
        await worker.actor.handle(DecodeFrames(CLIP, (160, 96), TARGET, groups, Epoch(1)), EDGE)
        await worker.ready()
    assert len(opened) == 1


async def test_a_picture_has_its_turn_between_the_groups_of_a_long_clip(worker: Worker) -> None:
    groups = groups_of("g", *((index, index) for index in range(16)))
    await worker.actor.handle(DecodeFrames(CLIP, (160, 96), TARGET, groups, Epoch(1)), EDGE)
    await worker.decode("picture", PNG)
    names = [(await worker.ready()).mm_hash for _ in range(17)]
    assert names.index(MmHash("picture")) < 8
    assert [name for name in names if name != "picture"] == [group.mm_hash for group in groups]


@pytest.mark.parametrize(
    ("data", "size", "indices", "code"),
    [
        (CLIP[: len(CLIP) // 2], (160, 96), (0, 1), "invalid_video"),
        (PNG, (160, 96), (0, 1), "invalid_video"),
        (CLIP, (96, 160), (0, 1), "video_mismatch"),
        (CLIP, (160, 96), (0, 30), "video_mismatch"),
    ],
)
async def test_a_broken_clip_fails_alone_with_all_its_groups(
    worker: Worker, data: bytes, size: tuple[int, int], indices: tuple[int, int], code: str
) -> None:
    groups = groups_of("g", indices, (2, 3))
    await worker.actor.handle(DecodeFrames(data, size, TARGET, groups, Epoch(1)), EDGE)
    for group in groups:
        failed = await worker.failed()
        assert (failed.mm_hash, failed.error.status, failed.error.code) == (group.mm_hash, 400, code)
    await worker.decode("whole", PNG)
    assert (await worker.ready()).mm_hash == "whole"


async def test_a_clip_that_cannot_be_opened_for_want_of_memory_fails_alone(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(encoded: bytes, options: VideoOptions) -> Clip:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(open_clips, "Clip", no_memory)
        error = (await probed(worker, CLIP)).error
        assert error is not None
        assert (error.status, error.code) == (503, "media_out_of_memory")
        await worker.actor.handle(DecodeFrames(CLIP, (160, 96), TARGET, groups_of("g", (0, 1)), Epoch(1)), EDGE)
        assert (await worker.failed()).error.code == "media_out_of_memory"
    assert (await probed(worker, CLIP)).clip is not None


async def test_groups_before_one_that_fails_are_answered(worker: Worker) -> None:
    groups = groups_of("g", (0, 1), (2, 99), (4, 5))
    await worker.actor.handle(DecodeFrames(CLIP, (160, 96), TARGET, groups, Epoch(1)), EDGE)
    assert (await worker.ready()).mm_hash == "g0"
    assert [(await worker.failed()).mm_hash for _ in range(2)] == ["g1", "g2"]


async def test_nobody_decodes_on_for_a_scheduler_that_is_gone(worker: Worker) -> None:
    groups = groups_of("g", *((index, index + 1) for index in range(0, 28, 2)))
    await worker.actor.handle(DecodeFrames(CLIP, (160, 96), TARGET, groups, Epoch(1)), EDGE)
    await worker.ready()
    await worker.actor.peer_down(peer_down(SCHEDULER))
    assert worker.used_bytes == 0
    await worker.actor.handle(DecodeFrames(CLIP, (160, 96), TARGET, groups[:1], Epoch(2)), EDGE)
    worker.context.outbox.take()
    await worker.actor.peer_up(peer_up(SCHEDULER, SchedulerReady(), epoch=2))
    assert (await worker.ready()).mm_hash == "g0"


async def test_more_bytes_than_requests_may_hold_are_refused(tmp_path: Path) -> None:
    config = make_config(server=ServerOptions(max_media_mib=0))
    async with FakeContext("media:0", tmp_path, config) as context:
        actor = MediaActor(cast(ActorContext, context))
        await actor.start()
        error = (await probed(Worker(context, actor), CLIP)).error
        assert error is not None
        assert (error.status, error.code) == (503, "media_worker_busy")
        await actor.stop(0.0)


async def test_an_edge_whose_channel_is_full_gets_its_answer_later(worker: Worker) -> None:
    worker.context.outbox.full.add(EDGE)
    await worker.actor.handle(Probe(1, CLIP), EDGE)
    await asyncio.sleep(0.1)
    worker.context.outbox.full.clear()
    assert isinstance((await worker.context.outbox.next()).message, Probed)


async def test_many_pictures_at_once_are_all_answered(worker: Worker) -> None:
    for index in range(40):
        await worker.decode(f"{index}", PNG if index % 3 else PNG[: 100 + index])
    names = set()
    for _ in range(40):
        _, message = await worker.context.outbox.next()
        assert isinstance(message, PixelsReady | DecodeFailed)
        names.add(message.mm_hash)
        if isinstance(message, PixelsReady):
            await worker.actor.handle(FreePixels((message.pixels,)), SCHEDULER)
    assert len(names) == 40
    assert worker.used_bytes == 0
