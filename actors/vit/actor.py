"""One vision tower: Encode or Restore -> EmbedsReady or EncodeFailed; owns the slab that the rows lie in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import NamedTuple, Protocol, TypeVar, assert_never

from vlmrt.actors.models.gpu_memory import watch_held_memory
from vlmrt.actors.models.torch_profile import TorchProfiler
from vlmrt.actors.vit.batcher import EncodeQueue
from vlmrt.actors.vit.encoder import Answer, EncodeBatch
from vlmrt.actors.vit.loading import load_encoder
from vlmrt.runtime.actor import ActorContext
from vlmrt.runtime.control_messages import PeerDown, PeerUp, ServiceStatus, VitReady
from vlmrt.runtime.errors import RequestError, VlmrtError
from vlmrt.runtime.faults import gate
from vlmrt.runtime.messages import (
    ActorName,
    CancelEncode,
    EmbedsReady,
    Encode,
    EncodeFailed,
    Epoch,
    Restore,
    SlabExport,
    VitInbox,
)
from vlmrt.runtime.profiling import ProfileSession
from vlmrt.runtime.questions import Finding, Question, StartProfile, StopProfile
from vlmrt.runtime.slab import slab_bytes

SCHEDULER = ActorName("scheduler:0")
MAX_QUEUED = 4096
GATHER_S = 0.002  # an idle tower waits so long for images that follow: apart, two of a request take it twice as long
MAX_RESTORED_TOGETHER = 16  # images; the first of many are answered early
MAX_WATCH_INTERVAL_S = 1.0
Given = TypeVar("Given")
Result = TypeVar("Result")


class BatchEncoder(Protocol):
    """encoder.Encoder, or what a test puts in its place."""

    beat_s: float

    @property
    def export(self) -> SlabExport: ...

    @property
    def num_host_pages(self) -> int: ...

    def restore(self, restores: Sequence[Restore]) -> list[Answer]: ...

    def begin(self, batch: Sequence[Encode]) -> EncodeBatch: ...

    def issue(self, begun: EncodeBatch) -> None: ...

    def finish(self, begun: EncodeBatch) -> list[Answer]: ...

    def close(self) -> None: ...


class _Begun(NamedTuple):
    """A batch between the queue and its answers."""

    batch: EncodeBatch
    num_images: int
    epoch: Epoch | None  # of the scheduler that waits for it
    started_s: float


class EncodeStuck(VlmrtError):
    """The tower has not moved for step_timeout_s; only a new process can help."""


class VitActor:
    """The shell of a tower: two queues, one thread that encodes, one that restores, and the answers."""

    def __init__(self, context: ActorContext, load: Callable[[ActorContext], BatchEncoder] = load_encoder) -> None:
        self._context = context
        self._load = load
        self._queue = EncodeQueue(context.config.parallel.max_patches_per_batch, MAX_QUEUED)
        self._queued = asyncio.Event()
        self._none_follow = asyncio.Event()  # the image queued last came without others behind it
        self._restores: dict[int, Restore] = {}  # by encode_id, oldest first
        self._restores_queued = asyncio.Event()
        self._restoring: asyncio.Future[list[Answer]] | None = None  # what the thread was given last
        self._scheduler_epoch: Epoch | None = None
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode")
        self._restore_executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="restore")
        self._encoder: BatchEncoder | None = None
        self._profile = ProfileSession(lambda: TorchProfiler(context.device), self._in_tower_thread)

    async def start(self) -> VitReady:
        loop = asyncio.get_running_loop()
        self._encoder = await loop.run_in_executor(self._executor, self._load, self._context)
        self._context.create_task(self._encode_forever(self._encoder), "encode")
        self._context.create_task(self._restore_forever(self._encoder), "restore")
        if self._context.device != "cpu":
            export, told = self._encoder.export, partial(self._context.metrics.set, "device_memory_bytes")
            num_bytes = slab_bytes(export.num_pages, export.page_rows, export.width, export.dtype)
            self._context.create_task(watch_held_memory(self._context.device, num_bytes, told), "memory")
        return VitReady(self._encoder.export, self._encoder.num_host_pages)

    async def peer_up(self, peer: PeerUp) -> None:
        if peer.actor == SCHEDULER and peer.epoch != self._scheduler_epoch:
            self._forget_queued()
            self._scheduler_epoch = peer.epoch
            if self._restoring is not None:  # into pages that this scheduler gives out anew
                await asyncio.wait((self._restoring,))

    async def peer_down(self, peer: PeerDown) -> None:
        """Nobody waits for what that scheduler asked for; its successor gives the pages out anew."""
        if peer.actor == SCHEDULER and peer.epoch == self._scheduler_epoch:
            self._forget_queued()
            self._scheduler_epoch = None

    async def status(self, status: ServiceStatus) -> None:
        """Only edges are told."""

    async def handle(self, message: VitInbox, sender: ActorName) -> None:
        match message:
            case Encode():
                if self._queue.put(message):
                    self._queued.set()
                    if message.more_follow:
                        self._none_follow.clear()
                    else:
                        self._none_follow.set()
                else:
                    self._refuse(message.encode_id, f"{MAX_QUEUED} images are queued already", 503, "overloaded")
            case Restore():
                if len(self._restores) < MAX_QUEUED:
                    self._restores[message.encode_id] = message
                    self._restores_queued.set()
                else:
                    self._refuse(message.encode_id, f"{MAX_QUEUED} images are queued already", 503, "overloaded")
            case CancelEncode():
                restore = self._restores.pop(message.encode_id, None)
                if restore is not None or self._queue.cancel(message.encode_id):
                    self._refuse(message.encode_id, "nobody waits for this image any more", 499, "cancelled")
            case _:
                assert_never(message)

    async def answer(self, question: Question) -> Finding | None:
        match question:
            case StartProfile() | StopProfile():
                return await self._profile.answer(question)
            case _:
                return None

    async def stop(self, grace_s: float) -> None:
        self._forget_queued()
        for executor in (self._executor, self._restore_executor):
            executor.shutdown(wait=False, cancel_futures=True)
        if self._encoder is not None:
            self._encoder.close()

    def _forget_queued(self) -> None:
        self._queue.clear()
        self._restores.clear()

    async def _encode_forever(self, encoder: BatchEncoder) -> None:
        """One batch after the other; the next is read while the device works through the last layers of this one."""
        issued: _Begun | None = None
        while True:
            if issued is None:
                await self._queued.wait()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._none_follow.wait(), GATHER_S)
            begun = await self._begin(encoder)
            if issued is not None:
                await self._finish(encoder, issued)
            if begun is not None:
                await self._in_thread(encoder, encoder.issue, begun.batch)
            issued = begun

    async def _begin(self, encoder: BatchEncoder) -> _Begun | None:
        """The next batch, if any image is queued."""
        if not len(self._queue):
            self._queued.clear()
            return None
        await gate(self._context, "vit.encode")
        batch = self._queue.take()
        if not len(self._queue):
            self._queued.clear()
        if not batch:
            return None
        epoch, started_s = self._scheduler_epoch, time.perf_counter()
        return _Begun(await self._in_thread(encoder, encoder.begin, batch), len(batch), epoch, started_s)

    async def _finish(self, encoder: BatchEncoder, begun: _Begun) -> None:
        answers = await self._in_thread(encoder, encoder.finish, begun.batch)
        self._count(begun.num_images, answers, time.perf_counter() - begun.started_s)
        self._answer(begun.epoch, answers)

    async def _restore_forever(self, encoder: BatchEncoder) -> None:
        """A few images at a time, oldest first, beside whatever is being encoded.  Raises: EncodeStuck."""
        limit_s = self._context.config.supervision.step_timeout_s
        while True:
            await self._restores_queued.wait()
            await gate(self._context, "vit.restore")
            batch = [self._restores.pop(encode_id) for encode_id in list(self._restores)[:MAX_RESTORED_TOGETHER]]
            if not self._restores:
                self._restores_queued.clear()
            epoch = self._scheduler_epoch
            loop = asyncio.get_running_loop()
            self._restoring = loop.run_in_executor(self._restore_executor, encoder.restore, batch)
            done, _ = await asyncio.wait((self._restoring,), timeout=limit_s)
            if not done:
                raise EncodeStuck(f"{len(batch)} images are not restored after {limit_s:g} s (step_timeout_s)")
            self._answer(epoch, self._restoring.result())

    def _answer(self, epoch: Epoch | None, answers: Sequence[Answer]) -> None:
        """Tell the scheduler that asked, if it still lives."""
        if epoch == self._scheduler_epoch:
            for answer in answers:
                self._context.outbox.send(SCHEDULER, answer)

    async def _in_thread(self, encoder: BatchEncoder, work: Callable[[Given], Result], given: Given) -> Result:
        """Raises: EncodeStuck when the work no longer moves."""
        encoder.beat_s = time.monotonic()
        limit_s = self._context.config.supervision.step_timeout_s
        result = asyncio.get_running_loop().run_in_executor(self._executor, work, given)
        while True:
            done, _ = await asyncio.wait((result,), timeout=min(MAX_WATCH_INTERVAL_S, limit_s / 4))
            if done:
                return result.result()
            if time.monotonic() - encoder.beat_s > limit_s:
                raise EncodeStuck(f"the tower has not moved for {limit_s:g} s (step_timeout_s)")

    async def _in_tower_thread(self, work: Callable[[], None]) -> None:
        """Between two pieces of its work."""
        await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def _count(self, num_images: int, answers: Sequence[Answer], seconds: float) -> None:
        metrics = self._context.metrics
        metrics.add("images_encoded_total", sum(isinstance(answer, EmbedsReady) for answer in answers))
        metrics.observe("vit_batch_images", num_images)
        metrics.observe("encode_seconds", seconds)

    def _refuse(self, encode_id: int, problem: str, status: int, code: str) -> None:
        error = RequestError(problem, status=status, code=code)
        self._context.outbox.send(SCHEDULER, EncodeFailed(encode_id, error.to_wire()))
