"""Each clip is asked about once, of a living worker, and whoever waits for it gets one answer in time."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from tests.support import FakeOutbox, peer_down, peer_up
from vlmrt.actors.edge.clip_prober import ClipProber
from vlmrt.runtime.control_messages import MediaReady
from vlmrt.runtime.errors import RequestError, WireError
from vlmrt.runtime.messages import ClipInfo, Probe, Probed
from vlmrt.runtime.metrics import Metrics

CLIP = ClipInfo(160, 96, 30, 30.0, 1.0)
OTHER = ClipInfo(16, 16, 3, 1.0, 3.0)


class Probing:
    """A prober, and the media workers' part played by the test."""

    def __init__(self, timeout_s: float = 10.0, num_workers: int = 1) -> None:
        self.outbox = FakeOutbox()
        self.prober = ClipProber(self.outbox, Metrics(), timeout_s)
        for index in range(num_workers):
            self.up(index)

    def up(self, index: int, epoch: int = 1) -> None:
        self.prober.peer_up(peer_up(f"media:{index}", MediaReady(1), epoch=epoch))

    def down(self, index: int, epoch: int = 1) -> None:
        self.prober.peer_down(peer_down(f"media:{index}", epoch=epoch))

    def ask(self, name: bytes = b"clip") -> asyncio.Task[ClipInfo]:
        return asyncio.create_task(self.prober.probe(name, b"bytes of " + name))

    async def asked(self) -> tuple[str, Probe]:
        sent = await self.outbox.next()
        return sent.peer, cast(Probe, sent.message)

    async def answer(self, clip: ClipInfo = CLIP) -> str:
        worker, probe = await self.asked()
        self.prober.take(Probed(probe.probe_id, clip))
        return worker


async def test_a_clip_is_asked_about_once() -> None:
    probing = Probing()
    waiting = [probing.ask() for _ in range(3)]
    _, probe = await probing.asked()
    assert probe.encoded == b"bytes of clip"
    probing.prober.take(Probed(probe.probe_id, CLIP))
    assert await asyncio.gather(*waiting) == [CLIP] * 3
    assert await probing.ask() == CLIP
    assert probing.outbox.sent == []
    other = probing.ask(b"other")
    await probing.answer(OTHER)
    assert await other == OTHER


async def test_what_is_wrong_with_a_clip_reaches_everybody_and_is_asked_again_later() -> None:
    probing = Probing()
    waiting = [probing.ask() for _ in range(2)]
    _, probe = await probing.asked()
    probing.prober.take(Probed(probe.probe_id, error=WireError(400, "no clip", "invalid_video")))
    for error in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(error, RequestError)
        assert (error.status, error.code) == (400, "invalid_video")
    again = probing.ask()
    await probing.answer()
    assert await again == CLIP


async def test_clips_are_spread_over_workers() -> None:
    probing = Probing(num_workers=3)
    tasks = [probing.ask(bytes([number])) for number in range(6)]
    asked = [await probing.asked() for _ in tasks]
    assert sorted(worker for worker, _ in asked) == ["media:0", "media:0", "media:1", "media:1", "media:2", "media:2"]
    for _, probe in asked:
        probing.prober.take(Probed(probe.probe_id, CLIP))
    await asyncio.gather(*tasks)


async def test_another_worker_is_asked_once_when_one_dies() -> None:
    probing = Probing(num_workers=2)
    task = probing.ask()
    first, probe = await probing.asked()
    probing.down(int(first[-1]))
    second = await probing.answer()
    assert second != first
    assert await task == CLIP
    probing.prober.take(Probed(probe.probe_id, OTHER))  # too late, and dropped
    assert await probing.ask() == CLIP


@pytest.mark.parametrize("down_is_heard", [True, False])
async def test_a_clip_that_two_workers_die_of_is_503(down_is_heard: bool) -> None:
    probing = Probing()
    task = probing.ask()
    for epoch in (1, 2):
        await probing.asked()
        if down_is_heard:
            probing.down(0, epoch)
        probing.up(0, epoch + 1)
    with pytest.raises(RequestError, match="died") as refused:
        await task
    assert (refused.value.status, refused.value.code) == (503, "service_unavailable")
    assert refused.value.retry_after_s
    assert probing.outbox.sent == []


async def test_a_stale_word_of_a_dead_worker_changes_nothing() -> None:
    probing = Probing()
    probing.up(0, epoch=2)
    task = probing.ask()
    probing.down(0, epoch=1)
    await probing.answer()
    assert await task == CLIP


async def test_nobody_waits_longer_than_the_deadline() -> None:
    for probing in (Probing(0.05), Probing(0.05, num_workers=0)):
        with pytest.raises(RequestError, match=r"0\.05 s") as refused:
            await probing.ask()
        assert refused.value.status == 503


async def test_full_channels_are_tried_again_and_others_taken_meanwhile() -> None:
    probing = Probing(num_workers=2)
    probing.outbox.full |= {peer_up("media:0", MediaReady(1)).actor, peer_up("media:1", MediaReady(1)).actor}
    task = probing.ask()
    await asyncio.sleep(0)
    assert probing.outbox.sent == []
    probing.outbox.full.discard(peer_up("media:1", MediaReady(1)).actor)
    assert await probing.answer() == "media:1"
    assert await task == CLIP


async def test_one_that_goes_leaves_the_answer_to_the_others_and_the_last_one_ends_the_search() -> None:
    probing = Probing()
    first, second = probing.ask(), probing.ask()
    _, probe = await probing.asked()
    first.cancel()
    await asyncio.sleep(0)
    probing.prober.take(Probed(probe.probe_id, CLIP))
    assert await second == CLIP

    alone = probing.ask(b"alone")
    await probing.asked()
    alone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await alone
    again = probing.ask(b"alone")
    await probing.answer(OTHER)
    assert await again == OTHER
    assert probing.prober._questions == {}
    assert probing.prober._searches == {}
