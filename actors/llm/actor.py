"""One tensor-parallel rank: StepPlan -> StepResult.

The event loop only passes work to the step thread and results to the scheduler; what a step does is in runner.py.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, assert_never

from vlmrt.actors.llm.rank import load_rank
from vlmrt.actors.llm.step_thread import Aside, EndOfEpoch, OpenedSlab, Rank, StepThread, Work
from vlmrt.actors.models.gpu_memory import watch_held_memory
from vlmrt.actors.models.torch_profile import TorchProfiler
from vlmrt.runtime.actor import ActorContext
from vlmrt.runtime.control_messages import LlmReady, PeerDown, PeerUp, ServiceStatus
from vlmrt.runtime.errors import ChannelFull, VlmrtError
from vlmrt.runtime.messages import ActorName, AttachSlab, DetachSlab, Epoch, LlmInbox, StepPlan, StepResult
from vlmrt.runtime.profiling import ProfileSession
from vlmrt.runtime.questions import Finding, Question, StartProfile, StopProfile
from vlmrt.runtime.slab import open_slab

SCHEDULER = ActorName("scheduler:0")
MAX_QUEUED = 64  # pieces of work in the thread's queue: a scheduler plans one step ahead, the rest are slabs
MAX_WATCH_INTERVAL_S = 1.0
# The step thread computes in Python for milliseconds while the loop has a result to send; Python's default is 5 ms.
SWITCH_INTERVAL_S = 0.0005

LoadRank = Callable[[ActorContext], Rank[Any]]

logger = logging.getLogger(__name__)


class StepStuck(VlmrtError):
    """A step runs longer than step_timeout_s; only a new process can help."""


class LlmActor:
    """The shell of a rank.  index is its tp_rank; rank 0 answers the scheduler."""

    def __init__(self, context: ActorContext, load: LoadRank = load_rank) -> None:
        self._context = context
        self._load = load
        self._scheduler_epoch: Epoch | None = None
        self._room = asyncio.Semaphore(MAX_QUEUED)
        self._thread: StepThread[Any] | None = None
        self._unsent: asyncio.Future[None] | None = None  # fails when the scheduler takes no more results
        self._profile = ProfileSession(lambda: TorchProfiler(context.device), self._in_step_thread)

    async def start(self) -> LlmReady:
        loop = asyncio.get_running_loop()
        sys.setswitchinterval(SWITCH_INTERVAL_S)

        def finished(epoch: Epoch, work: Work, result: StepResult | None) -> None:
            loop.call_soon_threadsafe(self._finished, epoch, work, result)

        self._thread = StepThread(partial(self._load, self._context), finished)
        self._thread.start()
        self._unsent = loop.create_future()
        ready = await asyncio.wrap_future(self._thread.ready)
        self._context.create_task(self._watch(self._thread, self._unsent), "step watch")
        if self._context.device != "cpu":
            told = partial(self._context.metrics.set, "device_memory_bytes")
            self._context.create_task(watch_held_memory(self._context.device, 0, told), "memory")
        return ready

    async def peer_up(self, peer: PeerUp) -> None:
        if peer.actor == SCHEDULER:
            if self._scheduler_epoch not in (None, peer.epoch):
                await self._end_epoch()
            self._scheduler_epoch = peer.epoch

    async def peer_down(self, peer: PeerDown) -> None:
        if peer.actor == SCHEDULER and peer.epoch == self._scheduler_epoch:
            await self._end_epoch()

    async def status(self, status: ServiceStatus) -> None:
        """Only edges are told."""

    async def handle(self, message: LlmInbox, sender: ActorName) -> None:
        match message:
            case AttachSlab():
                await self._attach(message)
            case StepPlan() | DetachSlab():
                await self._put(message)
            case _:
                assert_never(message)

    async def answer(self, question: Question) -> Finding | None:
        match question:
            case StartProfile() | StopProfile():
                return await self._profile.answer(question)
            case _:
                return None

    async def stop(self, grace_s: float) -> None:
        if self._thread is not None:
            await asyncio.to_thread(self._thread.stop, grace_s)

    async def _end_epoch(self) -> None:
        """What that scheduler had planned and not seen end is dropped, its sequences and slabs are forgotten."""
        assert self._thread is not None
        assert self._scheduler_epoch is not None
        self._thread.oldest_epoch = Epoch(self._scheduler_epoch + 1)
        await self._put(EndOfEpoch())
        self._scheduler_epoch = None

    async def _attach(self, message: AttachSlab) -> None:
        """Opened at once, attached in its turn: that ViT may die while plans that read its rows are queued."""
        try:
            slab = await asyncio.to_thread(open_slab, self._context, self._context.device, message.slab)
        except KeyError:  # it has died already; a plan with rows of it would end this rank
            logger.warning("the slab of %s, epoch %d, is gone already", message.vit, message.epoch)
            return
        await self._put(OpenedSlab(message.vit, message.epoch, slab))

    async def _put(self, work: Work) -> None:
        """Waits while the queue is full, so the scheduler's channel fills and it notices."""
        assert self._thread is not None
        await self._room.acquire()
        self._thread.put(self._scheduler_epoch or Epoch(0), work)

    async def _in_step_thread(self, work: Callable[[], None]) -> None:
        """Between two steps."""
        aside = Aside(work)
        await self._put(aside)
        await asyncio.wrap_future(aside.done)

    def _finished(self, epoch: Epoch, work: Work, result: StepResult | None) -> None:
        self._room.release()
        if result is None or not isinstance(work, StepPlan):
            return
        self._context.metrics.observe("step_seconds", result.duration_ms / 1e3)
        self._context.metrics.observe("step_tokens", sum(row.num_tokens for row in work.rows))
        if self._context.index == 0 and epoch == (self._scheduler_epoch or 0):
            self._send(result)

    def _send(self, result: StepResult) -> None:
        """In a callback, where an exception would go unseen."""
        try:
            self._context.outbox.send(SCHEDULER, result)
        except ChannelFull as error:
            if self._unsent is not None and not self._unsent.done():
                self._unsent.set_exception(error)

    async def _watch(self, thread: StepThread[Any], unsent: asyncio.Future[None]) -> None:
        """End the process when a step fails or does not end: raising here ends the actor."""
        limit_s = self._context.config.supervision.step_timeout_s
        failure = asyncio.wrap_future(thread.failure)
        failed: set[asyncio.Future[None]] = set()
        while not failed:
            failed, _ = await asyncio.wait((failure, unsent), timeout=min(MAX_WATCH_INTERVAL_S, limit_s / 4))
            if thread.busy_s() > limit_s:
                raise StepStuck(f"a step has been running for {thread.busy_s():.1f} s; step_timeout_s is {limit_s:g}")
        for each in failed:
            await each
