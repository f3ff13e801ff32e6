"""The way of an image that is wanted and not in a slab: asked of an edge, decoded, encoded; or restored.

One job per mm_hash, however many requests want it.  Scarce places (decodes at once, arena bytes, slab pages) go to jobs
in the order of their most urgent reader, and the most urgent job of all may take them from later ones: so it always
gets on.

Bytes are asked for through requests that have them.  A request that names an image by uuid alone holds its rows until
it ends, so that it can be computed again after a preemption; only where the most urgent job has waited for pages for
long are holds given up, youngest request first.  It fails once it needs rows that nobody can bring any more.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from typing import NamedTuple

from vlmrt.actors.scheduler.counters import Counters
from vlmrt.actors.scheduler.embed_cache import EmbedCache, Entry, Slab
from vlmrt.actors.scheduler.media_job import Job, Stage, died, not_cached, too_large
from vlmrt.actors.scheduler.media_workers import ClipWorkers, Worker, least_busy
from vlmrt.actors.scheduler.request import MediaKey, Request
from vlmrt.runtime.errors import WireError
from vlmrt.runtime.messages import (
    ActorName,
    CancelEncode,
    EmbedsReady,
    Encode,
    Epoch,
    FreePixels,
    MediaItem,
    Message,
    MmHash,
    NeedMedia,
    PixelsReady,
    RequestId,
    Restore,
)
from vlmrt.runtime.timeline import Span

UNSENT_RETRY_S = 0.02
DECODE_PATIENCE_S = 1.0
PAGES_PATIENCE_S = 5.0
GROUPS_PER_FILE = 8  # decodes asked for at once, on average, where files are clips: each message brings a whole one
_BYTES_PER_PATCH = 768  # 16 x 16 pixels of 3 bytes; raised when a worker's pixels are found to need more

Sender = Callable[[ActorName, Message], None]
RequestOf = Callable[[RequestId], Request]


class Arrived(NamedTuple):
    """Rows that are there: who waits for them, and how they came about."""

    mm_hash: MmHash
    readers: tuple[RequestId, ...]
    spans: tuple[Span, ...]


class MediaWork:
    """Jobs, media workers and ViTs.  `send` posts a message; `failures` gathers what the caller has to fail."""

    def __init__(self, embeds: EmbedCache, send: Sender, request_of: RequestOf, counters: Counters) -> None:
        self.embeds = embeds
        self.jobs: dict[MmHash, Job] = {}
        self.workers: dict[ActorName, Worker] = {}
        self.decoding: dict[MmHash, Job] = {}
        self.decoded: dict[MmHash, Job] = {}
        self.kept: dict[MmHash, Job] = {}
        self.encoding: dict[int, Job] = {}  # or restoring; by encode_id
        self.holders: dict[RequestId, Request] = {}  # those that hold what they name by uuid alone
        self.failures: list[tuple[list[RequestId], WireError]] = []
        self.retry_at_s: dict[MmHash, float] = {}  # needed, but not to be asked for before then
        self.unblock_at_s: float | None = None  # when to make room in an arena that may be full
        self.give_up_at_s: float | None = None  # when to give up holds for pages
        self._clip_workers = ClipWorkers()
        self._files_that_moved: set[MmHash] = set()  # clips of which a group has come since the last pump
        self._needed: list[tuple[MediaKey, MmHash]] = []  # a heap; entries whose job has moved on are skipped
        self._send = send
        self._request_of = request_of
        self._counters = counters
        self._next_encode_id = 1
        self._bytes_per_patch = float(_BYTES_PER_PATCH)

    # ------------------------------------------------------------ who wants what

    def is_known(self, mm_hash: MmHash) -> bool:
        """Whether a request without its bytes can have its rows: they are there, or on their way for another."""
        job = self.jobs.get(mm_hash)
        return self.embeds.is_known(mm_hash) or (job is not None and not job.is_cancelled)

    def hold(self, request: Request) -> None:
        """Keep what the request names by uuid alone until want_nothing."""
        if request.named_media:
            self.holders[request.request_id] = request
            for mm_hash in request.named_media:
                self.embeds.hold(mm_hash)

    def let_go(self, mm_hashes: Iterable[MmHash]) -> None:
        """Undo one hold of each."""
        for mm_hash in mm_hashes:
            self.embeds.let_go(mm_hash)
            job = self.jobs.get(mm_hash)
            if job is not None and mm_hash not in self.embeds.readers:
                self._drop_unread(job)

    def _stop_holding(self, request: Request) -> None:
        if self.holders.pop(request.request_id, None) is not None:
            self.let_go(request.named_media)

    def want(self, request: Request, num_covered_tokens: int) -> None:
        """Make this request a reader of exactly the items that end behind its first num_covered_tokens tokens."""
        wanted: dict[MmHash, MediaKey] = {}
        items: dict[MmHash, MediaItem] = {}
        for item in request.media:
            if item.start + item.num_tokens > num_covered_tokens and item.mm_hash not in wanted:
                wanted[item.mm_hash] = (*request.key, item.start)
                items[item.mm_hash] = item
        before, request.wanted_media = request.wanted_media, wanted
        for mm_hash, key in wanted.items():
            if before.get(mm_hash) != key:
                self.embeds.add_reader(mm_hash, request.request_id, key)
                self._begin_job(items[mm_hash], key)
        for mm_hash in before:
            if mm_hash not in wanted:
                self._leave(mm_hash, request.request_id)

    def want_nothing(self, request: Request) -> None:
        """This request has ended."""
        wanted, request.wanted_media = request.wanted_media, {}
        for mm_hash in wanted:
            self._leave(mm_hash, request.request_id)
        self._stop_holding(request)

    def _begin_job(self, item: MediaItem, key: MediaKey) -> None:
        job = self.jobs.get(item.mm_hash)
        if job is None:
            if self.embeds.ready_entry(item.mm_hash) is not None:
                self._counters.embed_hits += 1
                return
            job = self.jobs[item.mm_hash] = Job(item.mm_hash, item.grid_thw, item.num_tokens)
            self._line_up(job)
            if job.stage is Stage.KEPT:
                self._counters.embed_host_hits += 1
            else:
                self._counters.embed_misses += 1
        elif job.stage is Stage.NEEDED:
            self._push_needed(job, key)

    def _leave(self, mm_hash: MmHash, request_id: RequestId) -> None:
        is_unread = self.embeds.remove_reader(mm_hash, request_id)
        job = self.jobs.get(mm_hash)
        if job is None:
            return
        if is_unread:
            self._drop_unread(job)
        elif job.stage is Stage.DECODING and job.asked == request_id:  # its edge may not have handed it on
            self._ask_anew(job)
        elif job.stage is Stage.NEEDED and not self._givers(mm_hash):
            self._fail_without_bytes(job)

    def _drop_unread(self, job: Job) -> None:
        """Nobody reads it: only what has pages already goes on, and only for those who hold it."""
        if not job.is_at_vit:
            self._end_job(job)
        elif not job.is_cancelled and job.mm_hash not in self.embeds.holds:
            job.is_cancelled = True
            assert job.vit is not None
            self._send(job.vit, CancelEncode(job.encode_id))

    def _givers(self, mm_hash: MmHash) -> list[tuple[MediaKey, RequestId]]:
        """The readers whose edges have the bytes."""
        readers = self.embeds.readers[mm_hash].items()
        return [(key, reader) for reader, key in readers if mm_hash not in self._request_of(reader).named_media]

    def _push_needed(self, job: Job, key: MediaKey) -> None:
        """To be asked for, if there is anybody to ask."""
        if self._givers(job.mm_hash):
            heapq.heappush(self._needed, (key, job.mm_hash))
        else:
            self._fail_without_bytes(job)

    def _fail_without_bytes(self, job: Job) -> None:
        readers = list(self.embeds.readers[job.mm_hash])
        self._end_job(job)
        for reader in readers:
            self.failures.append(([reader], not_cached(self._request_of(reader), job.mm_hash)))

    # ------------------------------------------------------------ media workers

    def add_worker(self, name: ActorName, epoch: Epoch, arena_bytes: int) -> None:
        self.workers[name] = Worker(name, epoch, arena_bytes)

    def drop_worker(self, name: ActorName) -> None:
        """Its incarnation is gone, and its arena with it."""
        self._clip_workers.drop(name)
        for job in list(self.jobs.values()):
            if job.worker != name:
                continue
            job.worker, job.num_bytes, job.pixels = None, 0, None  # nothing left to give back
            if job.stage is Stage.DECODING:
                job.num_media_losses += 1
                if job.num_media_losses > 1:
                    self._fail(job, died("media worker", "media_worker_died", "decoding"))
                    continue
            if job.stage is not Stage.ENCODING:
                self._ask_anew(job)
        del self.workers[name]

    def on_unsent(self, mm_hash: MmHash, request_id: RequestId, now_s: float) -> None:
        """The edge knows that media worker to be gone: ask again, but not as fast as the two can exchange messages."""
        job = self.jobs.get(mm_hash)
        if job is not None and job.stage is Stage.DECODING and job.asked == request_id:
            self._reset(job)
            self.retry_at_s[mm_hash] = now_s + UNSENT_RETRY_S

    def on_pixels(self, sender: ActorName, message: PixelsReady) -> None:
        job = self.jobs.get(message.mm_hash)
        worker = self.workers.get(sender)
        if worker is None or worker.epoch != message.pixels.epoch:
            return
        if job is None or job.stage not in (Stage.NEEDED, Stage.DECODING):
            self._counters.unwanted_pixels += 1
            self._send(sender, FreePixels((message.pixels,)))
            return
        if job.file is not None:
            self._files_that_moved.add(job.file)
        self._reset(job)
        self._bytes_per_patch = max(self._bytes_per_patch, message.pixels.num_bytes / max(1, job.num_patches))
        job.stage, job.pixels, job.shape = Stage.DECODED, message.pixels, message.shape
        job.decoded = Span("decode_media", sender, message.begin_s, message.end_s)
        job.worker, job.num_bytes = sender, message.pixels.num_bytes
        worker.num_bytes += job.num_bytes
        self.decoded[job.mm_hash] = job

    def on_decode_failed(self, mm_hash: MmHash, sender: ActorName, error: WireError) -> None:
        """A 4xx is the image's fault and final; anything else is tried once more."""
        job = self.jobs.get(mm_hash)
        if job is None or job.stage is not Stage.DECODING or job.worker != sender:
            return
        job.num_media_losses += 1
        if error.status < 500 or job.num_media_losses > 1:
            self._fail(job, error)
        else:
            self._ask_anew(job)

    # ------------------------------------------------------------ ViTs

    def drop_vit(self, name: ActorName) -> None:
        """Its incarnation is gone: what it was encoding is done once more, what lay there is wanted anew."""
        for entry in self.embeds.drop_slab(name):
            job = self.jobs.get(entry.mm_hash)
            if job is not None:
                del self.encoding[job.encode_id]
                job.num_vit_losses += 1
                if job.num_vit_losses > 1:
                    self._fail(job, died("vision worker", "vision_worker_died", "encoding"))
                else:
                    self._encode_anew(job)
            elif entry.mm_hash in self.embeds.readers:
                self._begin_again(entry)
        for job in [job for job in self.kept.values() if self.embeds.host_slab(job.mm_hash) is None]:
            self._ask_anew(job)

    def on_embeds_ready(self, sender: ActorName, message: EmbedsReady) -> Arrived | None:
        job = self._answered(sender, message.encode_id)
        if job is None:
            return None
        entry = self.embeds.entries[job.mm_hash]
        if message.num_rows != job.num_rows:
            self.embeds.forget(entry)
            text = f"image {job.mm_hash} has {message.num_rows} rows where the prompt has {job.num_rows} places"
            self._fail(job, WireError(500, text, "vision_rows_mismatch"))
            return None
        self._counters.encodes += job.stage is Stage.ENCODING
        self.embeds.complete(entry)
        spans = job.spans_to_rows(sender, message.begin_s, message.end_s)
        self._end_job(job)
        return Arrived(job.mm_hash, tuple(self.embeds.readers.get(job.mm_hash, ())), spans)

    def on_encode_failed(self, sender: ActorName, encode_id: int, error: WireError) -> None:
        """A 4xx is the image's fault and final; anything else is tried once more.

        A restore that failed is not: its copy in host memory is forgotten, and the image is decoded afresh.
        """
        job = self._answered(sender, encode_id)
        if job is None:
            return
        entry = self.embeds.entries[job.mm_hash]
        if job.is_cancelled and error.code == "cancelled":
            self.embeds.remove(entry)
            self._encode_anew(job)
            return
        self.embeds.forget(entry)
        if job.stage is Stage.RESTORING:
            self._encode_anew(job)
        elif error.status >= 500 and job.num_encode_failures == 0 and job.mm_hash in self.embeds.readers:
            job.num_encode_failures += 1  # its arena may have vanished under the ViT: begin with fresh pixels
            self._ask_anew(job)
        else:
            self._fail(job, error)

    def _answered(self, sender: ActorName, encode_id: int) -> Job | None:
        job = self.encoding.get(encode_id)
        if job is None or job.vit != sender:
            return None
        del self.encoding[encode_id]
        if job.stage is Stage.ENCODING:
            self.embeds.slabs[sender].num_encoding_patches -= job.num_patches
        return job

    def _encode_anew(self, job: Job) -> None:
        """Back to its copy in host memory or its pixels, whatever still exists, if anybody still wants it."""
        if job.mm_hash not in self.embeds.readers:
            self._end_job(job)
            return
        if job.pixels is None:
            self._ask_anew(job)
        else:
            job.stage, job.is_cancelled, job.vit, job.encode_id = Stage.DECODED, False, None, -1
            self.decoded[job.mm_hash] = job

    def _begin_again(self, entry: Entry) -> None:
        """Rows that are gone from their slab although somebody has to read them."""
        job = self.jobs[entry.mm_hash] = Job(entry.mm_hash, entry.grid_thw, entry.num_rows)
        self._line_up(job)

    # ------------------------------------------------------------ stages of a job

    def _reset(self, job: Job) -> None:
        """Give back what the job holds of media workers; nobody has been asked."""
        worker = self.workers.get(job.worker) if job.worker is not None else None
        if worker is not None:
            worker.num_bytes -= job.num_bytes
            worker.num_decoding -= job.stage is Stage.DECODING
            if job.pixels is not None:
                self._send(worker.name, FreePixels((job.pixels,)))
        job.stage, job.asked, job.file = Stage.NEEDED, None, None
        job.worker, job.num_bytes, job.pixels = None, 0, None
        job.is_cancelled, job.vit, job.encode_id, job.no_pages_since_s = False, None, -1, None
        self.decoding.pop(job.mm_hash, None)
        self.decoded.pop(job.mm_hash, None)
        self.kept.pop(job.mm_hash, None)
        self.retry_at_s.pop(job.mm_hash, None)

    def _ask_anew(self, job: Job) -> None:
        self._reset(job)
        self._line_up(job)

    def _line_up(self, job: Job) -> None:
        """Where a job begins that holds nothing: at its copy in host memory, or at an edge."""
        if self.embeds.host_slab(job.mm_hash) is not None:
            job.stage = Stage.KEPT
            self.kept[job.mm_hash] = job
        else:
            self._push_needed(job, self.embeds.first_key(job.mm_hash))

    def _end_job(self, job: Job) -> None:
        self._reset(job)
        del self.jobs[job.mm_hash]

    def _fail(self, job: Job, error: WireError) -> None:
        readers = list(self.embeds.readers.get(job.mm_hash, ()))
        self._end_job(job)
        if readers:
            self.failures.append((readers, error))

    # ------------------------------------------------------------ what happens next

    def pump(self, now_s: float) -> None:
        """Start whatever can start: encodes and restores, then decodes, in the order of the most urgent reader."""
        for mm_hash, at_s in list(self.retry_at_s.items()):
            if at_s <= now_s:
                self._ask_anew(self.jobs[mm_hash])
        self.give_up_at_s = None
        if self.decoded or self.kept:
            self._fill_slabs(now_s)
        self._unblock_arena(now_s)
        if self._needed:
            self._start_decodes(now_s)

    def _fill_slabs(self, now_s: float) -> None:
        """Strictly in order for each slab: a large image is not starved by the small ones behind it."""
        closed: set[ActorName] = set()  # slabs that somebody waits for
        for key, mm_hash in sorted(
            (self.embeds.first_key(mm_hash), mm_hash) for mm_hash in (*self.decoded, *self.kept)
        ):
            if len(closed) == len(self.embeds.slabs):
                return
            job = self.jobs[mm_hash]
            slabs = self._slabs_for(job)
            if not slabs:
                self._fail(job, too_large(job, self.embeds.slabs.values()))
                continue
            slabs = [slab for slab in slabs if slab.vit not in closed]
            if (
                slabs
                and not self._allocate(job, slabs, None)
                and not (self._is_most_urgent(key) and self._allocate_from_others(job, slabs, key, now_s))
            ):
                closed.update(slab.vit for slab in slabs)

    def _allocate_from_others(self, job: Job, slabs: list[Slab], key: MediaKey, now_s: float) -> bool:
        """Pages that later readers wait for and, after a while, such as others hold."""
        while not self._allocate(job, slabs, key):
            if not self._give_up_holds(job, key, now_s):
                return False
        return True

    def _slabs_for(self, job: Job) -> list[Slab]:
        """Where its rows may go, the least loaded ViT first; a copy in host memory goes back to its own ViT's slab."""
        if job.stage is Stage.KEPT:
            slab = self.embeds.host_slab(job.mm_hash)
            assert slab is not None, f"the copy of {job.mm_hash} in host memory was dropped although it is wanted"
            return [slab]
        slabs = sorted(self.embeds.slabs.values(), key=lambda slab: slab.num_encoding_patches)
        return [slab for slab in slabs if slab.num_pages_for(job.num_rows) <= slab.export.num_pages]

    def _allocate(self, job: Job, slabs: list[Slab], displace_after: MediaKey | None) -> bool:
        """Pages in one of these slabs, and the message that fills them."""
        for slab in slabs:
            begun = self.embeds.begin(job.mm_hash, job.grid_thw, slab, job.num_rows, displace_after=displace_after)
            if begun is None:
                continue
            entry, displaced = begun
            for lost in displaced:
                self._counters.embed_displacements += 1
                self._begin_again(lost)
            job.vit, job.encode_id, job.no_pages_since_s = slab.vit, self._next_encode_id, None
            self._next_encode_id += 1
            self.encoding[job.encode_id] = job
            if job.stage is Stage.KEPT:
                self._restore(job, slab, entry)
            else:
                self._encode(job, slab, entry)
            return True
        return False

    def _give_up_holds(self, job: Job, key: MediaKey, now_s: float) -> bool:
        """Whether the most urgent job has waited long enough for pages, and a request no older has given up its holds.

        Older requests end without it; younger ones may never, since what they wait for comes after this job.
        """
        holders = [request for request in self.holders.values() if request.key >= key[:2]]
        if not holders:
            return False
        if job.no_pages_since_s is None:
            job.no_pages_since_s = now_s
        if now_s < job.no_pages_since_s + PAGES_PATIENCE_S:
            self.give_up_at_s = job.no_pages_since_s + PAGES_PATIENCE_S
            return False
        self._stop_holding(max(holders, key=lambda request: request.key))
        return True

    def _restore(self, job: Job, slab: Slab, entry: Entry) -> None:
        del self.kept[job.mm_hash]
        job.stage = Stage.RESTORING
        host_pages = slab.host.pages[job.mm_hash]
        self._send(slab.vit, Restore(job.encode_id, job.mm_hash, job.num_rows, host_pages, entry.pages))

    def _encode(self, job: Job, slab: Slab, entry: Entry) -> None:
        del self.decoded[job.mm_hash]
        job.stage = Stage.ENCODING
        slab.num_encoding_patches += job.num_patches
        assert job.pixels is not None
        encode = Encode(
            job.encode_id,
            job.mm_hash,
            job.grid_thw,
            job.pixels,
            job.shape,
            entry.pages,
            entry.host_pages,
            more_follow=bool(self.decoding),
        )
        self._send(slab.vit, encode)

    def _unblock_arena(self, now_s: float) -> None:
        """If the most urgent decode takes very long, free later pixels in its arena, one by one.

        An arena may be fuller than these books say: cut into pieces, or holding images that are decoded although the
        request they were asked through has ended.  The groups of a clip come one after the other: each waits from the
        one before it on.
        """
        self.unblock_at_s = None
        moved, self._files_that_moved = self._files_that_moved, set()
        for job in self.decoding.values() if moved else ():
            if job.file in moved:
                job.asked_at_s = now_s
        if not self.decoding or not self.decoded:
            return
        job = self.decoding[min(self.decoding, key=self.embeds.first_key)]
        key = self.embeds.first_key(job.mm_hash)
        later = [(self.embeds.first_key(h), h) for h, other in self.decoded.items() if other.worker == job.worker]
        if not later or max(later)[0] < key:
            return
        if now_s >= job.asked_at_s + DECODE_PATIENCE_S:
            self._counters.dropped_pixels += 1
            self._ask_anew(self.decoded[max(later)[1]])
            job.asked_at_s = now_s
        self.unblock_at_s = job.asked_at_s + DECODE_PATIENCE_S

    @property
    def wake_at_s(self) -> float | None:
        """When to pump although nothing has happened; None: not needed."""
        times = (*self.retry_at_s.values(), self.unblock_at_s, self.give_up_at_s)
        return min((at_s for at_s in times if at_s is not None), default=None)

    def _start_decodes(self, now_s: float) -> None:
        while self.workers:
            job = self._first_needed()
            if job is None:
                return
            key, (_, request_id) = self.embeds.first_key(job.mm_hash), min(self._givers(job.mm_hash))
            request = self._request_of(request_id)
            clip = request.clips.get(job.mm_hash)
            file = clip or job.mm_hash
            if not self._may_decode(file):
                return
            num_bytes = int(job.num_patches * self._bytes_per_patch)
            free = [worker for worker in self.workers.values() if worker.has_room(num_bytes)]
            if not free:
                if not self._is_most_urgent(key) or not self._drop_last_pixels(key):
                    return
                continue
            worker = self._clip_workers.choose(clip, free) if clip else least_busy(free)
            heapq.heappop(self._needed)
            job.stage, job.asked, job.file = Stage.DECODING, request_id, file
            job.worker, job.num_bytes = worker.name, num_bytes
            job.asked_at_s = now_s
            self.decoding[job.mm_hash] = job
            worker.num_decoding += 1
            worker.num_bytes += num_bytes
            self._send(request.edge, NeedMedia(request_id, job.mm_hash, worker.name, worker.epoch))

    def _may_decode(self, file: MmHash) -> bool:
        """So many files at once, of which a clip is one, whatever groups of it are asked for."""
        most = 2 * len(self.workers) + 2
        if len(self.decoding) < most:
            return True
        files = {job.file for job in self.decoding.values()}
        return (file in files or len(files) < most) and len(self.decoding) < GROUPS_PER_FILE * most

    def _first_needed(self) -> Job | None:
        """The most urgent job nobody has been asked for; it stays on top of the heap."""
        while self._needed:
            key, mm_hash = self._needed[0]
            job = self.jobs.get(mm_hash)
            if job is None or job.stage is not Stage.NEEDED or mm_hash in self.retry_at_s:
                heapq.heappop(self._needed)
            elif (now := self.embeds.first_key(mm_hash)) != key:
                heapq.heapreplace(self._needed, (now, mm_hash))
            else:
                return job
        return None

    def _is_most_urgent(self, key: MediaKey) -> bool:
        """Whether no job that has no pages yet has a more urgent reader."""
        first = self._first_needed()
        if first is not None and self.embeds.first_key(first.mm_hash) < key:
            return False
        waiting = (*self.decoding, *self.decoded, *self.kept, *self.retry_at_s)
        return all(self.embeds.first_key(mm_hash) >= key for mm_hash in waiting)

    def _drop_last_pixels(self, key: MediaKey) -> bool:
        """Make room in an arena: the least urgent decoded image behind key is to be decoded again later."""
        last = max(self.decoded, key=self.embeds.first_key, default=None)
        if last is None or self.embeds.first_key(last) <= key:
            return False
        self._counters.dropped_pixels += 1
        self._ask_anew(self.decoded[last])
        return True
