"""A media worker: decodes pictures off the event loop and lays their pixels into its arena."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor

from vlmrt.actors.media.image import Pixels, decode_image, limit_pillow
from vlmrt.runtime.actor import ActorContext
from vlmrt.runtime.errors import ChannelFull, RequestError, VlmrtError
from vlmrt.runtime.messages import (
    ActorName,
    ArenaRef,
    Capabilities,
    Decode,
    DecodeFailed,
    FreePixels,
    MediaInbox,
    MediaReady,
    Message,
    PeerDown,
    PeerUp,
    PixelsReady,
    SchedulerReady,
    ServiceStatus,
)
from vlmrt.runtime.shared_memory import PixelArena

NUM_THREADS = 2  # Pillow lets go of the interpreter while it decodes and resizes
MAX_QUEUED = 1024
ARENA_WAIT_S = 60.0  # for ViTs to read what fills the arena
CHANNEL_RETRY_S = 0.02

logger = logging.getLogger(__name__)


class DecodeStuck(VlmrtError):
    """A decoder does not come back within step_timeout_s; only a new process can help."""


class MediaActor:
    """Decode -> PixelsReady or DecodeFailed; pixels lie in the arena until FreePixels or the scheduler's end."""

    def __init__(self, context: ActorContext, *, arena_wait_s: float = ARENA_WAIT_S) -> None:
        self._context = context
        self._max_pixels = context.config.server.max_pixels
        self._arena_wait_s = arena_wait_s
        self._executor = ThreadPoolExecutor(NUM_THREADS, "decode")
        self._turn = asyncio.Semaphore(NUM_THREADS)  # bounds the pictures held decoded, in order of arrival
        self._num_queued = 0
        self._freed = asyncio.Event()
        self._scheduler: PeerUp | None = None
        self._placed: dict[int, ArenaRef] = {}  # by offset
        self._early: list[Decode] = []  # came before word of the scheduler that wants them

    async def start(self) -> Capabilities:
        limit_pillow(self._max_pixels)
        num_bytes = self._context.config.memory.pixel_arena_mib << 20
        self._arena = PixelArena.create(self._context, num_bytes)
        return MediaReady(arena_bytes=self._arena.num_bytes)

    async def peer_up(self, peer: PeerUp) -> None:
        if isinstance(peer.capabilities, SchedulerReady):
            if self._scheduler is not None:
                self._forget_all()
            self._scheduler = peer
            early, self._early = self._early, []
            for message in early:
                self._take(message)

    async def peer_down(self, peer: PeerDown) -> None:
        """With the scheduler go its books: nobody will free these pixels any more."""
        scheduler = self._scheduler
        if scheduler is not None and (scheduler.actor, scheduler.epoch) == (peer.actor, peer.epoch):
            self._scheduler = None
            self._forget_all()

    async def status(self, status: ServiceStatus) -> None: ...

    async def handle(self, message: MediaInbox, sender: ActorName) -> None:
        if isinstance(message, FreePixels):
            self._free(message)
        else:
            self._take(message)

    async def stop(self, grace_s: float) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _take(self, message: Decode) -> None:
        """Nobody waits for what an earlier scheduler asked for; an edge may have heard of a later one first."""
        scheduler = self._scheduler
        if scheduler is None or message.scheduler_epoch > scheduler.epoch:
            if len(self._early) < MAX_QUEUED:
                self._early.append(message)
        elif message.scheduler_epoch == scheduler.epoch:
            self._queue(message, scheduler)

    def _queue(self, message: Decode, scheduler: PeerUp) -> None:
        """What is done only after this scheduler's end goes unanswered."""
        self._num_queued += 1
        self._context.create_task(self._answer(message, scheduler), name=f"decode {message.mm_hash[:8]}")

    async def _answer(self, message: Decode, scheduler: PeerUp) -> None:
        try:
            if self._num_queued > MAX_QUEUED:
                raise _busy("the media worker's queue is full")
            async with self._turn:
                if self._scheduler is not scheduler:
                    return
                pixels = await self._decode(message)
                await self._place(message, pixels, scheduler)
        except RequestError as error:
            await self._send(DecodeFailed(message.mm_hash, error.to_wire()), scheduler)
        finally:
            self._num_queued -= 1

    async def _decode(self, message: Decode) -> Pixels:
        """Raises: DecodeStuck, so that threads are not lost to pictures that a decoder does not come back from."""
        started_s = time.monotonic()
        limit_s = self._context.config.supervision.step_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                pixels = await asyncio.get_running_loop().run_in_executor(
                    self._executor, decode_image, message.encoded, message.size, message.target_size, self._max_pixels
                )
        except TimeoutError:
            raise DecodeStuck(f"an image is not decoded after {limit_s:g} s (step_timeout_s)") from None
        self._context.metrics.observe("decode_image_seconds", time.monotonic() - started_s)
        self._context.metrics.add("images_decoded_total")
        return pixels

    async def _place(self, message: Decode, pixels: Pixels, scheduler: PeerUp) -> None:
        """Into the arena as soon as there is room.  Raises: RequestError where there is none in time, or never."""
        if pixels.nbytes > self._arena.num_bytes:
            raise RequestError(
                f"the image takes {pixels.nbytes} bytes of pixels, more than the {self._arena.num_bytes} set aside",
                code="image_too_large",
            )
        try:
            async with asyncio.timeout(self._arena_wait_s):
                while (ref := self._arena.write(pixels)) is None:
                    self._freed.clear()
                    await self._freed.wait()
        except TimeoutError:
            raise _busy("the memory for decoded pictures stays full") from None
        if self._scheduler is not scheduler:
            self._arena.free(ref)
            return
        self._placed[ref.offset] = ref
        self._show_use()
        height, width = pixels.shape[1:3]
        await self._send(PixelsReady(message.mm_hash, ref, (1, height, width, 3)), scheduler)

    async def _send(self, message: Message, scheduler: PeerUp) -> None:
        """Wait for room in the channel, as long as this is the scheduler that asked."""
        while self._scheduler is scheduler:
            try:
                self._context.outbox.send(scheduler.actor, message)
                return
            except ChannelFull:
                await asyncio.sleep(CHANNEL_RETRY_S)

    def _free(self, message: FreePixels) -> None:
        for ref in message.pixels:
            if self._placed.get(ref.offset) != ref:
                logger.warning("asked to free pixels that are not placed: %s", ref)
                continue
            del self._placed[ref.offset]
            self._arena.free(ref)
        self._freed.set()
        self._show_use()

    def _forget_all(self) -> None:
        self._free(FreePixels(tuple(self._placed.values())))

    def _show_use(self) -> None:
        self._context.metrics.set("pixel_arena_bytes", self._arena.used_bytes)


def _busy(message: str) -> RequestError:
    return RequestError(f"{message}; try again", status=503, code="media_worker_busy", retry_after_s=1)
