"""A media worker: decodes pictures and clips off the event loop and lays their pixels into its arena."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar, assert_never

import numpy as np

from vlmrt.actors.media.clip import reader_words
from vlmrt.actors.media.image import Pixels, decode_image, limit_pillow
from vlmrt.actors.media.memory_limit import limit_memory
from vlmrt.actors.media.one_ahead import one_ahead
from vlmrt.actors.media.open_clips import OpenClips
from vlmrt.actors.media.resize import resize_frame
from vlmrt.runtime.actor import ActorContext
from vlmrt.runtime.control_messages import Capabilities, MediaReady, PeerDown, PeerUp, SchedulerReady, ServiceStatus
from vlmrt.runtime.errors import ChannelFull, RequestError, VlmrtError
from vlmrt.runtime.messages import (
    ActorName,
    ArenaRef,
    ClipInfo,
    Decode,
    DecodeFailed,
    DecodeFrames,
    FrameGroup,
    FreePixels,
    MediaInbox,
    Message,
    MmHash,
    PixelsReady,
    Probe,
    Probed,
)
from vlmrt.runtime.questions import Finding, Question
from vlmrt.runtime.shared_memory import PixelArena

NUM_THREADS = 2  # the decoders let go of the interpreter, and so does what resizes
MAX_QUEUED = 1024
ARENA_WAIT_S = 60.0  # for ViTs to read what fills the arena
ANSWER_WAIT_S = 60.0  # for an edge to take the answer to its Probe
CHANNEL_RETRY_S = 0.02

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class _GroupRead(NamedTuple):
    """The frames of a group as they are in the clip."""

    mm_hash: MmHash
    frames: list[Pixels]
    reader: str
    began_s: float  # of the monotonic clock
    read_s: float


class DecodeStuck(VlmrtError):
    """A decoder does not come back within step_timeout_s; only a new process can help."""


class MediaActor:
    """Decode and DecodeFrames -> PixelsReady or DecodeFailed; Probe -> Probed.

    Pixels lie in the arena until FreePixels or the scheduler's end.
    """

    def __init__(self, context: ActorContext, *, arena_wait_s: float = ARENA_WAIT_S) -> None:
        self._context = context
        self._max_pixels = context.config.server.max_pixels
        self._max_queued_bytes = context.config.server.max_media_mib << 20
        self._arena_wait_s = arena_wait_s
        self._clips = OpenClips(context.config.video)
        self._executor = ThreadPoolExecutor(NUM_THREADS, "decode")
        self._turn = asyncio.Semaphore(NUM_THREADS)  # bounds what is held decoded, in order of arrival
        self._num_queued = 0
        self._num_queued_bytes = 0
        self._freed = asyncio.Event()
        self._scheduler: PeerUp | None = None
        self._placed: dict[int, ArenaRef] = {}  # by offset
        self._early: list[Decode | DecodeFrames] = []  # came before word of the scheduler that wants them

    async def start(self) -> Capabilities:
        limit_pillow(self._max_pixels)
        logger.info("videos are read by %s", reader_words(self._context.config.video))
        memory = self._context.config.memory
        self._arena = PixelArena.create(self._context, memory.pixel_arena_mib << 20)
        if memory.media_worker_mib:
            limit_memory(memory.media_worker_mib << 20)
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
        match message:
            case FreePixels():
                self._free(message)
            case Decode() | DecodeFrames():
                self._take(message)
            case Probe():
                self._context.create_task(self._answer_probe(message, sender), name=f"probe {message.probe_id}")
            case _:
                assert_never(message)

    async def answer(self, question: Question) -> Finding | None:
        """Nothing that every process cannot answer by itself."""
        return None

    async def stop(self, grace_s: float) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._clips.close()

    def _take(self, message: Decode | DecodeFrames) -> None:
        """Nobody waits for what an earlier scheduler asked for; an edge may have heard of a later one first."""
        scheduler = self._scheduler
        if scheduler is None or message.scheduler_epoch > scheduler.epoch:
            if len(self._early) < MAX_QUEUED:
                self._early.append(message)
        elif message.scheduler_epoch == scheduler.epoch:
            self._queue(message, scheduler)

    def _queue(self, message: Decode | DecodeFrames, scheduler: PeerUp) -> None:
        """What is done only after this scheduler's end goes unanswered."""
        if isinstance(message, Decode):
            self._context.create_task(self._answer(message, scheduler), name=f"decode {message.mm_hash[:8]}")
        elif message.groups:
            name = f"decode frames {message.groups[0].mm_hash[:8]}"
            self._context.create_task(self._answer_groups(message, scheduler), name=name)

    # ------------------------------------------------------------ pictures

    async def _answer(self, message: Decode, scheduler: PeerUp) -> None:
        try:
            with self._queued(message.encoded):
                async with self._turn:
                    if self._scheduler is not scheduler:
                        return
                    begin_s = time.monotonic()
                    pixels = await self._decode(message)
                    await self._place(message.mm_hash, pixels, scheduler, begin_s, time.monotonic())
        except RequestError as error:
            await self._send(DecodeFailed(message.mm_hash, error.to_wire()), scheduler)

    async def _decode(self, message: Decode) -> Pixels:
        started_s = time.monotonic()
        pixels = await self._in_thread(
            "an image", decode_image, message.encoded, message.size, message.target_size, self._max_pixels
        )
        self._context.metrics.observe("decode_image_seconds", time.monotonic() - started_s)
        self._context.metrics.add("images_decoded_total")
        return pixels

    # ------------------------------------------------------------ clips

    async def _answer_probe(self, message: Probe, edge: ActorName) -> None:
        try:
            with self._queued(message.encoded):
                async with self._turn:
                    info = await self._in_thread("a video", self._probe, message.encoded)
            answer = Probed(message.probe_id, info)
        except RequestError as error:
            answer = Probed(message.probe_id, error=error.to_wire())
        give_up_s = time.monotonic() + ANSWER_WAIT_S
        while time.monotonic() < give_up_s:
            try:
                self._context.outbox.send(edge, answer)
                return
            except ChannelFull:
                await asyncio.sleep(CHANNEL_RETRY_S)

    def _probe(self, encoded: bytes) -> ClipInfo:
        with _enough_memory(), self._clips.use(encoded) as clip:
            return clip.info

    async def _answer_groups(self, message: DecodeFrames, scheduler: PeerUp) -> None:
        """In order: while a group is resized and placed, the next is read, if it has its turn.

        After a failure the rest fail alike.
        """
        done = 0
        jobs = [partial(self._read_in_turn, message, group) for group in message.groups]
        try:
            with self._queued(message.encoded):
                async with aclosing(one_ahead(jobs, drop=lambda _: self._turn.release())) as groups:
                    async for read in groups:
                        try:
                            if self._scheduler is not scheduler:
                                return
                            pixels = await self._resize_group(read, message.target_size)
                            await self._place(read.mm_hash, pixels, scheduler, read.began_s, time.monotonic())
                        finally:
                            self._turn.release()
                        done += 1
        except RequestError as error:
            for group in message.groups[done:]:
                await self._send(DecodeFailed(group.mm_hash, error.to_wire()), scheduler)

    async def _read_in_turn(self, message: DecodeFrames, group: FrameGroup) -> _GroupRead:
        """Has a turn when it is done, which whoever gets the frames gives back."""
        await self._turn.acquire()
        try:
            began_s = time.monotonic()
            frames, reader = await self._in_thread("a video", self._read_group, message, group.frame_indices)
            return _GroupRead(group.mm_hash, frames, reader, began_s, time.monotonic() - began_s)
        except BaseException:
            self._turn.release()
            raise

    def _read_group(self, message: DecodeFrames, indices: Sequence[int]) -> tuple[list[Pixels], str]:
        """Frames as they are in the clip, and which library has read them."""
        with _enough_memory(), self._clips.use(message.encoded) as clip:
            found = clip.info.width, clip.info.height
            if found != message.size:
                promised = f"{message.size[0]}x{message.size[1]}"
                raise RequestError(
                    f"the video's frames are {found[0]}x{found[1]}, not {promised}", code="video_mismatch"
                )
            return clip.read(indices), clip.reader_name

    async def _resize_group(self, read: _GroupRead, target_size: tuple[int, int]) -> Pixels:
        """Shapes: -> uint8 [frames, height, width, 3]."""
        started_s = time.monotonic()
        pixels = await self._in_thread("a video", _resized, read.frames, target_size)
        resize_s = time.monotonic() - started_s
        metrics = self._context.metrics
        metrics.observe("decode_frames_seconds", read.read_s + resize_s)
        metrics.observe("resize_frames_seconds", resize_s)
        metrics.add("frames_decoded_total", len(pixels), reader=read.reader)
        return pixels

    # ------------------------------------------------------------ both

    @contextmanager
    def _queued(self, encoded: bytes) -> Iterator[None]:
        """Raises: RequestError 503 where too much is queued already."""
        self._num_queued += 1
        self._num_queued_bytes += len(encoded)
        try:
            if self._num_queued > MAX_QUEUED or self._num_queued_bytes > self._max_queued_bytes:
                raise _busy("the media worker's queue is full")
            yield
        finally:
            self._num_queued -= 1
            self._num_queued_bytes -= len(encoded)

    async def _in_thread(self, what: str, work: Callable[..., Result], *arguments: Any) -> Result:
        """Raises: DecodeStuck, so that threads are not lost to files that a decoder does not come back from."""
        limit_s = self._context.config.supervision.step_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                return await asyncio.get_running_loop().run_in_executor(self._executor, work, *arguments)
        except TimeoutError:
            raise DecodeStuck(f"{what} is not decoded after {limit_s:g} s (step_timeout_s)") from None

    async def _place(self, mm_hash: MmHash, pixels: Pixels, scheduler: PeerUp, begin_s: float, end_s: float) -> None:
        """Into the arena as soon as there is room.  Raises: RequestError where there is none in time, or never.

        Args: begin_s and end_s: of their decoding.
        """
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
        frames, height, width = pixels.shape[:3]
        await self._send(PixelsReady(mm_hash, ref, (frames, height, width, 3), begin_s, end_s), scheduler)

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


def _resized(frames: Sequence[Pixels], target_size: tuple[int, int]) -> Pixels:
    with _enough_memory():
        return np.stack([resize_frame(frame, target_size) for frame in frames])


@contextmanager
def _enough_memory() -> Iterator[None]:
    """Raises: RequestError 503 in place of a MemoryError."""
    try:
        yield
    except MemoryError:
        raise RequestError(
            "not enough memory to decode the video", status=503, code="media_out_of_memory", retry_after_s=1
        ) from None


def _busy(message: str) -> RequestError:
    return RequestError(f"{message}; try again", status=503, code="media_worker_busy", retry_after_s=1)
