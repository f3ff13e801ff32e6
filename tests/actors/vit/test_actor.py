"""The ViT actor: rows as the reference's in the slab's pages, one answer per image, failures alone."""

from __future__ import annotations

import asyncio
import gzip
import threading
import time
import weakref
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen2VLImageProcessorPil

from tests.actors.vit.conftest import Checkpoint
from tests.support import FakeContext, FakeMemory, make_config, peer_down, peer_up
from vlmrt.actors.vit import actor as vit_actor
from vlmrt.actors.vit.actor import EncodeStuck, VitActor
from vlmrt.actors.vit.encoder import Answer, EncodeBatch
from vlmrt.actors.vit.engines.engine import Pixels
from vlmrt.actors.vit.engines.torch import TorchEngine, TorchRun
from vlmrt.runtime.actor import ActorContext
from vlmrt.runtime.config import MemoryOptions, ParallelOptions, SupervisionOptions
from vlmrt.runtime.control_messages import SchedulerReady, VitReady
from vlmrt.runtime.errors import StartupError
from vlmrt.runtime.faults import hold_file
from vlmrt.runtime.messages import (
    ActorName,
    ArenaRef,
    CancelEncode,
    EmbedsReady,
    Encode,
    EncodeFailed,
    Epoch,
    HostSlabExport,
    Message,
    MmHash,
    Restore,
)
from vlmrt.runtime.questions import ListRequests, Profiling, StartProfile, StopProfile
from vlmrt.runtime.shared_memory import PixelArena
from vlmrt.runtime.slab import HostSlab, row_index

SCHEDULER = ActorName("scheduler:0")
PAGE_ROWS = 3
SLAB_PAGES = 128
HOST_PAGES = 64
SIZES = ((4, 6), (2, 10), (8, 8), (2, 2), (14, 4), (6, 6))  # patches


@dataclass
class Picture:
    """Pixels with their grid, and the rows that the reference makes of them."""

    grid_thw: tuple[int, int, int]
    pixels: Pixels

    @property
    def num_rows(self) -> int:
        return self.grid_thw[1] * self.grid_thw[2] // 4

    def rows(self, checkpoint: Checkpoint) -> Tensor:
        processor = Qwen2VLImageProcessorPil.from_pretrained(checkpoint.directory)
        made = processor(images=[Image.fromarray(self.pixels[0])], do_resize=False, return_tensors="pt")
        assert made["image_grid_thw"].tolist() == [list(self.grid_thw)]
        with torch.inference_mode():
            rows: Tensor = checkpoint.reference_tower(
                made["pixel_values"], grid_thw=made["image_grid_thw"]
            ).pooler_output
        return rows


def ready(encode_id: int, num_rows: int) -> EmbedsReady:
    """Without the times, which Bench.answers checks and takes out."""
    return EmbedsReady(encode_id, num_rows, 0.0, 0.0)


def picture(seed: int, size: tuple[int, int]) -> Picture:
    height, width = size
    pixels = np.random.default_rng(seed).integers(0, 256, (1, height * 14, width * 14, 3), dtype=np.uint8)
    return Picture((1, height, width), pixels)


@dataclass
class Bench:
    """A ViT actor, the arena it reads and the slab it writes, as peers see them."""

    context: FakeContext
    actor: VitActor
    arena: PixelArena
    slab: HostSlab
    free_pages: list[int]
    num_encodes: int = 0
    begun_s: float = field(default_factory=time.monotonic)

    def message(self, picture: Picture) -> Encode:
        ref = self.arena.write(picture.pixels)
        assert ref is not None
        self.num_encodes += 1
        pages = tuple(self.free_pages.pop() for _ in range(-(-picture.num_rows // PAGE_ROWS)))
        shape = cast(tuple[int, int, int, int], picture.pixels.shape)
        return Encode(self.num_encodes, MmHash("hash"), picture.grid_thw, ref, shape, pages)

    def restore(self, message: Encode, num_rows: int) -> Restore:
        """The same rows from host memory into pages of their own."""
        self.num_encodes += 1
        pages = tuple(self.free_pages.pop() for _ in message.pages)
        return Restore(self.num_encodes, message.mm_hash, num_rows, message.host_pages, pages)

    async def encode(self, message: Encode | Restore) -> None:
        await self.actor.handle(message, SCHEDULER)

    async def answers(self, count: int) -> dict[int, Answer]:
        told = [await self.context.outbox.next() for _ in range(count)]
        assert {sent.peer for sent in told} == {SCHEDULER}
        return {answer.encode_id: answer for answer in [self._without_times(sent.message) for sent in told]}

    def _without_times(self, answer: Message) -> Answer:
        assert isinstance(answer, EmbedsReady | EncodeFailed)
        if isinstance(answer, EncodeFailed):
            return answer
        assert self.begun_s <= answer.begin_s <= answer.end_s <= time.monotonic()
        return ready(answer.encode_id, answer.num_rows)

    def rows(self, message: Encode | Restore, num_rows: int) -> Tensor:
        return self.slab.tensor()[torch.from_numpy(row_index(message.pages, 0, num_rows, PAGE_ROWS))]

    def hold(self, name: str) -> Path:
        file = hold_file(self.context.run_dir, name)
        file.touch()
        return file


@asynccontextmanager
async def running(checkpoint: Checkpoint, run_dir: Path, max_patches: int = 100) -> AsyncIterator[Bench]:
    width = checkpoint.config.vision.out_hidden_size
    config = make_config(
        checkpoint.directory,
        memory=MemoryOptions(
            embedding_cache_gib=SLAB_PAGES * PAGE_ROWS * width * 4 / 2**30,
            embedding_host_cache_gib=HOST_PAGES * PAGE_ROWS * width * 4 / 2**30,
            page_rows=PAGE_ROWS,
        ),
        parallel=ParallelOptions(max_patches_per_batch=max_patches),
        supervision=SupervisionOptions(fault_hooks=True),
    )
    memory = FakeMemory()
    media = FakeContext("media:0", run_dir, config, memory=memory)
    async with FakeContext("vit:0", run_dir, config, epoch=4, memory=memory) as context:
        actor = VitActor(cast(ActorContext, context))
        ready = await actor.start()
        assert ready == VitReady(HostSlabExport("slab/vit:0/4", SLAB_PAGES, PAGE_ROWS, width, "float32"), HOST_PAGES)
        assert isinstance(ready.slab, HostSlabExport)
        await actor.peer_up(peer_up("scheduler:0", SchedulerReady()))
        arena = PixelArena.create(media, 1 << 22)
        slab = HostSlab.open(context, ready.slab)
        slab.tensor().fill_(float("nan"))
        free_pages = np.random.default_rng(0).permutation(SLAB_PAGES).tolist()
        yield Bench(context, actor, arena, slab, free_pages)
        await actor.stop(1.0)
        slab.close()
        arena.close()


def assert_close(rows: Tensor, expected: Tensor) -> None:
    assert (rows - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("max_patches", [10, 100, 10_000])
async def test_rows_in_shuffled_pages_equal_the_reference(
    checkpoint: Checkpoint, tmp_path: Path, max_patches: int
) -> None:
    async with running(checkpoint, tmp_path, max_patches) as bench:
        pictures = [picture(seed, size) for seed, size in enumerate(SIZES)]
        held = bench.hold("vit.encode")
        messages = [bench.message(each) for each in pictures]
        for message in messages:
            await bench.encode(message)
        held.unlink()
        answers = await bench.answers(len(pictures))
        for each, message in zip(pictures, messages, strict=True):
            assert answers[message.encode_id] == ready(message.encode_id, each.num_rows)
            assert_close(bench.rows(message, each.num_rows), each.rows(checkpoint))
        written = ~bench.slab.tensor().isnan().all(dim=1)
        assert int(written.sum()) == sum(each.num_rows for each in pictures)  # and nothing else
        snapshot = bench.context.metrics.snapshot()
        assert snapshot.counters["images_encoded_total"] == len(pictures)
        batches = sum(snapshot.histograms["vit_batch_images"].counts)
        assert batches == {10: 6, 100: 3, 10_000: 1}[max_patches]
        assert sum(snapshot.histograms["encode_seconds"].counts) == batches


async def test_an_idle_tower_waits_for_an_image_that_follows_and_not_for_one_that_does_not_come(
    one_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(one_checkpoint, tmp_path) as bench:

        def num_batches() -> int:
            return sum(bench.context.metrics.snapshot().histograms["vit_batch_images"].counts)

        monkeypatch.setattr(vit_actor, "GATHER_S", 60.0)
        first, last, late = (bench.message(picture(seed, (4, 4))) for seed in range(3))
        await bench.encode(msgspec.structs.replace(first, more_follow=True))
        await asyncio.sleep(0)
        await bench.encode(last)
        await bench.answers(2)
        assert num_batches() == 1
        monkeypatch.setattr(vit_actor, "GATHER_S", 0.001)
        await bench.encode(msgspec.structs.replace(late, more_follow=True))
        await bench.answers(1)
        assert num_batches() == 2


async def test_an_image_that_cannot_be_read_fails_alone(one_checkpoint: Checkpoint, tmp_path: Path) -> None:
    async with running(one_checkpoint, tmp_path) as bench:
        good = picture(0, (4, 4))
        message = bench.message(good)
        ref = message.pixels
        replace = msgspec.structs.replace
        bad = {
            "grid": replace(message, grid_thw=(1, 4, 6)),
            "odd grid": replace(message, grid_thw=(1, 3, 4), shape=(1, 42, 56, 3)),
            "frames": replace(message, shape=(3, 56, 56, 3)),
            "channels": replace(message, shape=(1, 56, 56, 4)),
            "bytes": replace(message, pixels=replace(ref, num_bytes=ref.num_bytes - 1)),
            "outside": replace(message, pixels=replace(ref, offset=1 << 22)),
            "few pages": replace(message, pages=message.pages[:1]),
            "many pages": replace(message, pages=(*message.pages, 100)),
            "page twice": replace(message, pages=(1, 1)),
            "page outside": replace(message, pages=(0, SLAB_PAGES)),
            "few host pages": replace(message, host_pages=(0,)),
            "host page twice": replace(message, host_pages=(1, 1)),
            "host page outside": replace(message, host_pages=(0, HOST_PAGES)),
            "host page below": replace(message, host_pages=(0, -1)),
            "lost": replace(message, pixels=replace(ref, epoch=Epoch(9))),
        }
        codes = dict.fromkeys(bad, "bad_encode") | {"lost": "pixels_lost"}
        held = bench.hold("vit.encode")
        for encode_id, each in enumerate(bad.values(), 100):
            await bench.encode(replace(each, encode_id=encode_id))
        await bench.encode(message)
        held.unlink()
        answers = await bench.answers(len(bad) + 1)
        assert answers[message.encode_id] == ready(message.encode_id, good.num_rows)
        assert_close(bench.rows(message, good.num_rows), good.rows(one_checkpoint))
        for encode_id, name in enumerate(bad, 100):
            answer = answers[encode_id]
            assert isinstance(answer, EncodeFailed), name
            assert (answer.error.status, answer.error.code) == (500, codes[name]), name


async def test_an_image_that_breaks_a_batch_fails_alone(
    one_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = TorchEngine.prepare

    def picky(self: TorchEngine, images: Sequence[Pixels], grids: Sequence[tuple[int, int, int]]) -> Any:
        if any(image.max() == 0 for image in images) and len(grids) < 100 and grids != [(1, 2, 2)]:
            raise torch.OutOfMemoryError("black images are too much")
        return prepare(self, images, grids)

    monkeypatch.setattr(TorchEngine, "prepare", picky)
    async with running(one_checkpoint, tmp_path) as bench:
        pictures = [picture(seed, (4, 4)) for seed in range(3)]
        pictures[1].pixels[:] = 0
        held = bench.hold("vit.encode")
        messages = [bench.message(each) for each in pictures]
        for message in messages:
            await bench.encode(message)
        held.unlink()
        answers = await bench.answers(3)
        failed = answers[messages[1].encode_id]
        assert isinstance(failed, EncodeFailed)
        assert failed.error.code == "encode_failed"
        assert "--max-pixels" in failed.error.message
        for index in (0, 2):
            assert answers[messages[index].encode_id] == ready(messages[index].encode_id, 4)
            assert_close(bench.rows(messages[index], 4), pictures[index].rows(one_checkpoint))


async def test_images_are_tried_alone_after_the_memory_of_the_failed_batch_is_free(
    one_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = TorchEngine.rows
    workspace: list[weakref.ref[Tensor]] = []

    def scarce(self: TorchEngine, run: TorchRun) -> Tensor:
        still_held = [tensor for tensor in workspace if tensor() is not None]
        workspace.append(weakref.ref(run.state.x))
        if still_held or len(run.state.x) > 16:
            raise torch.OutOfMemoryError("too much at once")
        return rows(self, run)

    async with running(one_checkpoint, tmp_path) as bench:
        monkeypatch.setattr(TorchEngine, "rows", scarce)
        held = bench.hold("vit.encode")
        messages = [bench.message(picture(seed, (4, 4))) for seed in range(3)]
        for message in messages:
            await bench.encode(message)
        held.unlink()
        answers = await bench.answers(3)
        assert [answers[message.encode_id] for message in messages] == [
            ready(message.encode_id, 4) for message in messages
        ]


async def test_a_cancelled_image_is_answered_and_not_encoded(one_checkpoint: Checkpoint, tmp_path: Path) -> None:
    async with running(one_checkpoint, tmp_path, max_patches=16) as bench:
        held = bench.hold("vit.encode")
        messages = [bench.message(picture(seed, (4, 4))) for seed in range(3)]
        for message in messages:
            await bench.encode(message)
        await bench.actor.handle(CancelEncode(messages[1].encode_id), SCHEDULER)
        cancelled = (await bench.answers(1))[messages[1].encode_id]
        assert isinstance(cancelled, EncodeFailed)
        assert cancelled.error.code == "cancelled"
        held.unlink()
        answers = await bench.answers(2)
        assert answers.keys() == {messages[0].encode_id, messages[2].encode_id}
        await bench.actor.handle(CancelEncode(messages[0].encode_id), SCHEDULER)  # it has been answered already
        await bench.actor.handle(CancelEncode(99), SCHEDULER)
        await asyncio.sleep(0)
        assert bench.context.outbox.take() == []
        assert bench.rows(messages[1], 4).isnan().all()


async def test_rows_come_back_from_host_memory_bit_for_bit_into_other_pages(
    one_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    async with running(one_checkpoint, tmp_path) as bench:
        pictures = [picture(seed, size) for seed, size in enumerate(SIZES)]
        host_pages = np.random.default_rng(1).permutation(HOST_PAGES).tolist()
        messages = []
        for each in pictures:
            message = bench.message(each)
            kept = tuple(host_pages.pop() for _ in message.pages)
            messages.append(msgspec.structs.replace(message, host_pages=kept))
            await bench.encode(messages[-1])
        await bench.answers(len(messages))
        encoded = [bench.rows(each, shown.num_rows).clone() for each, shown in zip(messages, pictures, strict=True)]
        bench.slab.tensor().fill_(float("nan"))
        held = bench.hold("vit.encode")
        await bench.encode(bench.message(picture(99, (4, 4))))  # which restored images do not wait for
        restores = [bench.restore(each, shown.num_rows) for each, shown in zip(messages, pictures, strict=True)]
        for restore in restores:
            await bench.encode(restore)
        answers = await bench.answers(len(restores))
        for restore, rows in zip(restores, encoded, strict=True):
            assert answers[restore.encode_id] == ready(restore.encode_id, len(rows))
            assert torch.equal(bench.rows(restore, len(rows)), rows)
        written = ~bench.slab.tensor().isnan().all(dim=1)
        assert int(written.sum()) == sum(len(rows) for rows in encoded)  # and nothing else
        held.unlink()
        await bench.answers(1)
        assert bench.context.metrics.snapshot().counters["images_encoded_total"] == len(pictures) + 1


async def test_a_restore_that_contradicts_itself_is_refused_alone(one_checkpoint: Checkpoint, tmp_path: Path) -> None:
    async with running(one_checkpoint, tmp_path) as bench:
        message = msgspec.structs.replace(bench.message(picture(0, (4, 4))), host_pages=(5, 3))
        await bench.encode(message)
        await bench.answers(1)
        good = bench.restore(message, 4)
        replace = msgspec.structs.replace
        bad = {
            "no rows": replace(good, num_rows=0, pages=(), host_pages=()),
            "more rows": replace(good, num_rows=7),
            "few pages": replace(good, pages=good.pages[:1]),
            "page twice": replace(good, pages=(1, 1)),
            "page outside": replace(good, pages=(0, SLAB_PAGES)),
            "few host pages": replace(good, host_pages=(5,)),
            "host page twice": replace(good, host_pages=(5, 5)),
            "host page outside": replace(good, host_pages=(5, HOST_PAGES)),
            "host page below": replace(good, host_pages=(5, -1)),
        }
        held = bench.hold("vit.restore")
        for encode_id, each in enumerate(bad.values(), 100):
            await bench.encode(replace(each, encode_id=encode_id))
        await bench.encode(good)
        held.unlink()
        answers = await bench.answers(len(bad) + 1)
        assert answers[good.encode_id] == ready(good.encode_id, 4)
        assert torch.equal(bench.rows(good, 4), bench.rows(message, 4))
        for encode_id, name in enumerate(bad, 100):
            answer = answers[encode_id]
            assert isinstance(answer, EncodeFailed), name
            assert (answer.error.status, answer.error.code) == (500, "bad_restore"), name


async def test_a_cancelled_restore_is_answered_and_not_done(one_checkpoint: Checkpoint, tmp_path: Path) -> None:
    async with running(one_checkpoint, tmp_path) as bench:
        message = msgspec.structs.replace(bench.message(picture(0, (4, 4))), host_pages=(5, 3))
        await bench.encode(message)
        await bench.answers(1)
        held = bench.hold("vit.restore")
        restores = [bench.restore(message, 4) for _ in range(2)]
        for restore in restores:
            await bench.encode(restore)
        await bench.actor.handle(CancelEncode(restores[0].encode_id), SCHEDULER)
        cancelled = (await bench.answers(1))[restores[0].encode_id]
        assert isinstance(cancelled, EncodeFailed)
        assert cancelled.error.code == "cancelled"
        held.unlink()
        assert (await bench.answers(1)).keys() == {restores[1].encode_id}
        assert bench.rows(restores[0], 4).isnan().all()


async def test_what_a_dead_scheduler_wanted_restored_is_dropped(one_checkpoint: Checkpoint, tmp_path: Path) -> None:
    async with running(one_checkpoint, tmp_path) as bench:
        message = msgspec.structs.replace(bench.message(picture(0, (4, 4))), host_pages=(5, 3))
        await bench.encode(message)
        await bench.answers(1)
        held = bench.hold("vit.restore")
        restore = bench.restore(message, 4)
        await bench.encode(restore)
        await bench.actor.peer_up(peer_up("scheduler:0", SchedulerReady(), epoch=2))
        held.unlink()
        again = bench.message(picture(0, (4, 4)))
        await bench.encode(again)
        assert (await bench.answers(1)).keys() == {again.encode_id}
        assert bench.rows(restore, 4).isnan().all()


async def test_what_a_dead_scheduler_asked_for_is_dropped(one_checkpoint: Checkpoint, tmp_path: Path) -> None:
    async with running(one_checkpoint, tmp_path) as bench:
        held = bench.hold("vit.encode")
        old, new = (bench.message(picture(seed, (4, 4))) for seed in range(2))
        await bench.encode(old)
        await bench.actor.peer_down(peer_down("scheduler:0"))
        await bench.actor.peer_up(peer_up("scheduler:0", SchedulerReady(), epoch=2))
        await bench.encode(new)
        held.unlink()
        assert (await bench.answers(1)).keys() == {new.encode_id}
        assert bench.rows(old, 4).isnan().all()


class FakeEncoder:
    """Waits in `issue` and `restore` until `open` is set."""

    num_host_pages = 1

    def __init__(self) -> None:
        self.beat_s = 0.0
        self.export = HostSlabExport("slab", 1, 1, 1, "float32")
        self.open = threading.Event()
        self.error: Exception | None = None

    def begin(self, batch: Sequence[Encode]) -> EncodeBatch:
        return EncodeBatch(answers=[ready(encode.encode_id, 1) for encode in batch])

    def issue(self, begun: EncodeBatch) -> None:
        self._wait()

    def restore(self, restores: Sequence[Restore]) -> list[Answer]:
        self._wait()
        return [ready(restore.encode_id, 1) for restore in restores]

    def _wait(self) -> None:
        assert self.open.wait(30)
        if self.error is not None:
            raise self.error

    def finish(self, begun: EncodeBatch) -> list[Answer]:
        return begun.answers

    def close(self) -> None:
        pass


ENCODE = Encode(1, MmHash("h"), (1, 2, 2), ArenaRef(ActorName("media:0"), Epoch(1), 0, 3), (1, 28, 28, 3), (0,))
RESTORE = Restore(1, MmHash("h"), 1, (0,), (0,))


async def run_one(message: Encode | Restore, encoder: FakeEncoder, run_dir: Path, step_timeout_s: float) -> None:
    config = make_config(supervision=SupervisionOptions(step_timeout_s=step_timeout_s))
    async with FakeContext("vit:0", run_dir, config) as context:
        actor = VitActor(cast(ActorContext, context), lambda _: encoder)
        await actor.start()
        await actor.peer_up(peer_up("scheduler:0", SchedulerReady()))
        await actor.handle(message, SCHEDULER)
        await asyncio.wait(context._tasks, timeout=10, return_when=asyncio.FIRST_COMPLETED)


@pytest.mark.parametrize("message", [ENCODE, RESTORE])
async def test_a_stuck_device_ends_the_actor(message: Encode | Restore, tmp_path: Path) -> None:
    encoder = FakeEncoder()
    try:
        with pytest.raises(EncodeStuck):
            await run_one(message, encoder, tmp_path, 0.05)
    finally:
        encoder.open.set()


@pytest.mark.parametrize("message", [ENCODE, RESTORE])
async def test_a_fault_of_the_device_ends_the_actor(message: Encode | Restore, tmp_path: Path) -> None:
    encoder = FakeEncoder()
    encoder.error = torch.AcceleratorError("illegal memory access")
    encoder.open.set()
    with pytest.raises(torch.AcceleratorError):
        await run_one(message, encoder, tmp_path, 60.0)


async def test_a_new_scheduler_is_heard_after_what_its_predecessor_had_restored(tmp_path: Path) -> None:
    encoder = FakeEncoder()
    async with FakeContext("vit:0", tmp_path) as context:
        actor = VitActor(cast(ActorContext, context), lambda _: encoder)
        await actor.start()
        await actor.peer_up(peer_up("scheduler:0", SchedulerReady()))
        await actor.handle(RESTORE, SCHEDULER)
        await asyncio.sleep(0)
        successor = asyncio.create_task(actor.peer_up(peer_up("scheduler:0", SchedulerReady(), epoch=2)))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not successor.done()
        encoder.open.set()
        await successor
        await actor.handle(msgspec.structs.replace(RESTORE, encode_id=2), SCHEDULER)
        answer = await context.outbox.next()
        assert answer.message == ready(2, 1)
        assert context.outbox.take() == []
        await actor.stop(1.0)


async def test_a_start_that_cannot_work_says_why(tmp_path: Path) -> None:
    async with FakeContext("vit:0", tmp_path, make_config(tmp_path)) as context:
        with pytest.raises(StartupError, match=r"config\.json"):
            await VitActor(cast(ActorContext, context)).start()


@pytest.mark.parametrize(
    ("memory", "option"),
    [
        (MemoryOptions(embedding_cache_gib=1e-9), "--embedding-cache-gib 1e-09: one page"),
        (MemoryOptions(embedding_host_cache_gib=1e-9), "--embedding-host-cache-gib 1e-09: one page"),
        (MemoryOptions(embedding_host_cache_gib=1e6), "--embedding-host-cache-gib: 1000000.00 GiB are asked for"),
    ],
)
async def test_a_cache_without_a_page_or_larger_than_the_memory_is_refused(
    memory: MemoryOptions, option: str, one_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    config = make_config(one_checkpoint.directory, memory=memory)
    async with FakeContext("vit:0", tmp_path, config) as context:
        with pytest.raises(StartupError, match=option):
            await VitActor(cast(ActorContext, context)).start()


async def test_a_profile_holds_what_the_tower_computed_meanwhile(one_checkpoint: Checkpoint, tmp_path: Path) -> None:
    async with running(one_checkpoint, tmp_path) as bench:
        begun = await bench.actor.answer(StartProfile(str(tmp_path / "vit-0"), 60.0))
        assert isinstance(begun, Profiling)
        await bench.encode(bench.message(picture(0, SIZES[0])))
        await bench.answers(1)
        assert await bench.actor.answer(StopProfile()) == Profiling(begun.path, 0.0)
        assert await bench.actor.answer(ListRequests()) is None
    with gzip.open(begun.path) as file:
        events = msgspec.json.decode(file.read())["traceEvents"]
    assert any(event.get("name", "").startswith("aten::") for event in events)


async def test_a_tower_on_a_gpu_tells_how_much_of_it_its_process_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: {"cuda:1": 5 << 30}[device])
    encoder = FakeEncoder()
    async with FakeContext("vit:0", tmp_path, device="cuda:1") as context:
        actor = VitActor(cast(ActorContext, context), lambda _: encoder)
        await actor.start()
        await asyncio.sleep(0)  # its tasks begin
        slab = encoder.export
        held_bytes = (5 << 30) + slab.num_pages * slab.page_rows * slab.width * 4
        assert context.metrics.snapshot().gauges["device_memory_bytes"] == held_bytes
        await actor.stop(1.0)
