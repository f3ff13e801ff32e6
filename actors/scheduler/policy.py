"""What runs next: decode rows first, then prefill chunks and admissions in the order of (priority, arrival).

A prefill runs as far as its embeddings have arrived, within max_num_batched_tokens and, beside decode rows, within what
keeps the step short (pacing.py).  When KV blocks run out the
youngest running request is preempted: its blocks are freed and it is computed again later.  A request that waits for
media keeps its place only while nobody else could use it.  Of a prompt whose beginning lies in host memory that part is
loaded, a bounded number of blocks per step, before its first chunk runs.  All of it is decided from books: no clock, no
I/O.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from vlmrt.actors.scheduler.counters import Counters
from vlmrt.actors.scheduler.embed_cache import EmbedCache, Entry
from vlmrt.actors.scheduler.pacing import Pacing
from vlmrt.actors.scheduler.prefix_cache import Match, PrefixCache
from vlmrt.actors.scheduler.request import Request, Status
from vlmrt.runtime.messages import BlockCopy, EmbedSlice, NewSequence, StepPlan, StepRow

MAX_LOADS_PER_STEP = 64  # blocks; decode rows wait while they are copied
MIN_TOKENS_BEFORE_MEDIA = 64  # of a row that ends there, since the rows of an image are not there yet

_BY_KEY = attrgetter("key")

Want = Callable[[Request, int], None]  # MediaWork.want: read the items behind that many tokens


@dataclass(frozen=True, slots=True)
class Limits:
    max_num_seqs: int
    max_waiting: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    max_loads: int = MAX_LOADS_PER_STEP  # of a plan


class PlannedRow(NamedTuple):
    """A row of a step in flight.  It counts only while its request is still in the same run."""

    request: Request
    run: int
    num_tokens: int
    sample: bool

    @property
    def is_current(self) -> bool:
        return self.request.is_in_run(self.run)


class PlannedLoad(NamedTuple):
    """Host blocks that a step in flight loads for a request, pinned until its end.  It counts as a row does."""

    request: Request
    run: int
    host_block_ids: list[int]

    @property
    def is_current(self) -> bool:
        return self.request.is_in_run(self.run)


@dataclass(slots=True)
class Draft:
    """A plan in the making."""

    budget: int  # tokens left
    admit: list[NewSequence] = field(default_factory=list)
    decodes: list[tuple[StepRow, PlannedRow]] = field(default_factory=list)
    prefills: list[tuple[StepRow, PlannedRow]] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)  # from host memory, for the loads
    loads: list[PlannedLoad] = field(default_factory=list)
    planned: set[Request] = field(default_factory=set)  # those with a prefill row or a load
    entries: dict[int, Entry] = field(default_factory=dict)  # embeddings it reads, by id()
    has_preempted: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """A plan to send and what its result will mean."""

    plan: StepPlan
    rows: list[PlannedRow]
    loads: list[PlannedLoad]
    entries: list[Entry]
    num_decode_rows: int
    num_prefill_tokens: int


def _row_order(pair: tuple[StepRow, PlannedRow]) -> int:
    """Rows that are like a decode row come first, single tokens that are not come last."""
    row = pair[0]
    if row.num_tokens > 1:
        return 1
    return 0 if row.sample and not row.embeds else 2


def _take_new_blocks(request: Request) -> tuple[int, ...]:
    """The blocks that the ranks have to be told of with this row."""
    first, last = request.num_sent_blocks, len(request.block_ids)
    if first == last:
        return ()
    request.num_sent_blocks = last
    return tuple(request.block_ids[first:])


class Slots:
    """Places in the ranks' batch state.  A slot given back is free at once: the next plan sent releases it first."""

    def __init__(self, num_slots: int) -> None:
        self.free = list(range(num_slots - 1, -1, -1))
        self.to_release: list[int] = []

    def give_back(self, slot: int) -> None:
        self.free.append(slot)
        self.to_release.append(slot)


class Planner:
    """Waiting and running requests of one TP group's life, its slots and blocks."""

    def __init__(
        self, limits: Limits, kv: PrefixCache, embeds: EmbedCache, want: Want, counters: Counters, pacing: Pacing
    ) -> None:
        self.limits = limits
        self.pacing = pacing
        self.kv = kv
        self.slots = Slots(limits.max_num_seqs)
        self.waiting: list[Request] = []  # both sorted by key
        self.running: list[Request] = []
        self._embeds = embeds
        self._want = want
        self._counters = counters

    # ------------------------------------------------------------ the queues

    def enqueue(self, request: Request) -> None:
        request.status = Status.WAITING
        insort(self.waiting, request, key=_BY_KEY)

    def end(self, request: Request) -> None:
        """Take a request out, wherever it is; its blocks and its slot are free."""
        if request.status is Status.RUNNING:
            self._stop_running(request)
        else:
            self.waiting.remove(request)
        request.status = Status.ENDED

    def preempt(self, request: Request) -> None:
        """Back to waiting; tokens in flight are forgotten.  What the prefix cache still knows is found again."""
        self._stop_running(request)
        self._counters.preemptions += 1
        self._wait_anew(request)

    def forget_kv(self, kv: PrefixCache) -> list[Request]:
        """The TP group is gone and another begins with these empty blocks.  Returns the requests that lost work."""
        interrupted, self.running = self.running, []
        self.kv = kv
        self.slots = Slots(self.limits.max_num_seqs)
        for request in self.waiting:
            request.awaits_media = False
            self._want(request, 0)
        for request in interrupted:
            self._wait_anew(request)
        return interrupted

    def _stop_running(self, request: Request) -> None:
        self.running.remove(request)
        self.slots.give_back(request.slot)
        self.kv.release(request.block_ids)
        self.kv.host.unpin(request.host_block_ids)

    def _wait_anew(self, request: Request) -> None:
        request.slot, request.block_ids, request.num_inserted_blocks = -1, [], 0
        request.host_block_ids, request.num_sent_blocks, request.num_found_tokens = [], 0, 0
        request.num_computed_tokens = request.num_planned_tokens = request.num_pending_samples = 0
        request.num_consumed_items, request.awaits_media = 0, False
        self.enqueue(request)
        self.look_up(request)

    def look_up(self, request: Request) -> Match:
        """The known beginning of a waiting request; media behind it become wanted, media within it not."""
        block_size = self.limits.block_size
        known = self.kv.match(request.block_hashes, len(request.token_ids), block_size)
        if request.media:
            self._want(request, known.num_blocks * block_size)
        return known

    # ------------------------------------------------------------ one plan

    def plan(self, step: int) -> Step | None:
        """The next step; None if nothing can run."""
        draft = Draft(self.limits.max_num_batched_tokens)
        self._plan_decodes(draft)
        most = self.pacing.max_prefill_tokens(len(draft.decodes))
        if most is not None:
            draft.budget = min(draft.budget, most)
        self._plan_prefills(draft)
        if not draft.decodes and not draft.prefills and not draft.loads:
            return None  # slots to release wait for a plan to send
        release, self.slots.to_release = tuple(self.slots.to_release), []
        draft.prefills.sort(key=_row_order)
        pairs = draft.decodes + draft.prefills
        plan = StepPlan(
            step,
            release,
            tuple(draft.admit),
            tuple([row for row, _ in pairs]),
            self.kv.take_saves(),
            tuple(draft.copies),
        )
        num_prefill_tokens = sum(planned.num_tokens for _, planned in draft.prefills)
        rows = [planned for _, planned in pairs]
        self.pacing.planned(len(draft.decodes), num_prefill_tokens)
        entries = list(draft.entries.values())
        return Step(plan, rows, draft.loads, entries, len(draft.decodes), num_prefill_tokens)

    def _plan_decodes(self, draft: Draft) -> None:
        block_size = self.limits.block_size
        for request in list(self.running):
            if request.status is not Status.RUNNING or draft.budget == 0:
                continue
            start = request.num_planned_tokens
            num_tokens = len(request.token_ids) + request.num_pending_samples
            if num_tokens - start != 1 or start < request.media_end:
                continue  # nothing to run, or a prefill
            if num_tokens - request.num_prompt_tokens >= request.max_tokens:
                continue  # its last token is in flight
            if start == len(request.block_ids) * block_size:
                block_ids = self._allocate_or_preempt(request, draft)
                if block_ids is None:
                    continue
                request.block_ids += block_ids
            new_block_ids = _take_new_blocks(request)
            request.num_planned_tokens = start + 1
            request.num_pending_samples += 1
            draft.budget -= 1
            row = StepRow(request.slot, start, 1, new_block_ids, True)
            draft.decodes.append((row, PlannedRow(request, request.run, 1, True)))

    def _allocate_or_preempt(self, request: Request, draft: Draft) -> list[int] | None:
        """One block, at the cost of the youngest; None if that is the request itself.

        Requests whose last token is in flight are spared: their blocks are about to be free, which the youngest can
        wait for.  Rows are planned oldest first, so the youngest never has one yet.
        """
        while (block_ids := self.kv.allocate(1)) is None:
            staying = [other for other in self.running if not other.is_fully_planned]
            victim = staying[-1]
            if victim is request and len(staying) < len(self.running):
                return None
            draft.has_preempted = True
            self.preempt(victim)
            if victim is request:
                return None
        return block_ids

    def _plan_prefills(self, draft: Draft) -> None:
        """Running prefills and admissions, merged by key, until the budget is spent."""
        prefills = deque([r for r in self.running if r.num_planned_tokens < len(r.token_ids)])
        for request in [r for r in self.waiting if not r.awaits_media]:
            while prefills and prefills[0].key < request.key:
                self._plan_chunk(prefills.popleft(), draft)
            if draft.has_preempted or draft.budget == 0 or not self._admit(request, draft):
                break
        for request in prefills:
            self._plan_chunk(request, draft)

    def _plan_chunk(self, request: Request, draft: Draft) -> None:
        """A row of as many tokens as budget, embeddings and blocks allow, if any."""
        if request.status is not Status.RUNNING:
            return  # preempted since it was found to be running
        if request.host_block_ids and not self._plan_loads(request, draft):
            return
        start, block_size = request.num_planned_tokens, self.limits.block_size
        end = self._runnable_end(request, start, start + draft.budget)
        if end <= start:
            return
        num_missing = -(-end // block_size) - len(request.block_ids)
        num_new = self._make_room(request, draft, num_missing)
        if num_new < num_missing:
            end = min(end, (len(request.block_ids) + num_new) * block_size)
            if end <= start:
                return
        request.block_ids += self.kv.allocate(num_new) or []
        sample = end == len(request.token_ids)
        embeds = self._embed_slices(request, start, end, draft) if start < request.media_end else ()
        request.num_planned_tokens = end
        request.num_pending_samples += sample
        draft.budget -= end - start
        draft.planned.add(request)
        row = StepRow(request.slot, start, end - start, _take_new_blocks(request), sample, embeds)
        draft.prefills.append((row, PlannedRow(request, request.run, end - start, sample)))

    def _plan_loads(self, request: Request, draft: Draft) -> bool:
        """Copies of what it found in host memory, as many as may be.  Returns whether it needs no more of them."""
        num_blocks = min(len(request.host_block_ids), self.limits.max_loads - len(draft.copies))
        num_blocks = self._make_room(request, draft, num_blocks)
        block_ids = self.kv.allocate(num_blocks)
        if not block_ids:
            return False
        host_block_ids = request.host_block_ids[:num_blocks]
        request.host_block_ids = request.host_block_ids[num_blocks:]
        draft.copies += map(BlockCopy, block_ids, host_block_ids)
        draft.loads.append(PlannedLoad(request, request.run, host_block_ids))  # which has their pins from now on
        draft.planned.add(request)
        request.block_ids += block_ids
        request.num_planned_tokens += num_blocks * self.limits.block_size
        return not request.host_block_ids

    def _make_room(self, request: Request, draft: Draft, num_blocks: int) -> int:
        """How many of these blocks can be had, preempting younger requests without a row here, youngest first."""
        if num_blocks > self.kv.pool.num_free:
            for other in list(reversed(self.running)):
                if other.key <= request.key or self.kv.pool.num_free >= num_blocks:
                    break
                has_row = other in draft.planned or any(row.request is other for _, row in draft.decodes)
                if not has_row and not other.is_fully_planned:
                    draft.has_preempted = True
                    self.preempt(other)
        return min(num_blocks, self.kv.pool.num_free)

    # ------------------------------------------------------------ media within a row

    def _runnable_end(self, request: Request, start: int, limit: int) -> int:
        """Up to which token a row from start on can run: before the first image whose rows are not there.

        A few tokens of text before it are left to run with it: alone they would cost a step as long as a decode step.
        Rows of another image are not, since their pages may be the ones that it waits for.
        """
        end = min(limit, len(request.token_ids))
        if start >= request.media_end:
            return end
        worthwhile = start + MIN_TOKENS_BEFORE_MEDIA
        for item in request.media[request.num_consumed_items :]:
            if item.start >= max(end, worthwhile):
                break
            if item.start + item.num_tokens <= start:
                continue
            if self._embeds.ready_entry(item.mm_hash) is None:
                return start if item.start < worthwhile else min(end, item.start)
            worthwhile = start
        return end

    def _embed_slices(self, request: Request, start: int, end: int, draft: Draft) -> tuple[EmbedSlice, ...]:
        slices = []
        for item in request.media[request.num_consumed_items :]:
            first, last = max(item.start, start), min(item.start + item.num_tokens, end)
            if item.start >= end:
                break
            if first < last:
                entry = self._embeds.ready_entry(item.mm_hash)
                assert entry is not None, f"{request.request_id}: rows of {item.mm_hash} vanished within a plan"
                draft.entries[id(entry)] = entry
                slices.append(
                    EmbedSlice(entry.vit, entry.epoch, entry.pages, first - item.start, last - first, first - start)
                )
        return tuple(slices)

    # ------------------------------------------------------------ admission

    def _admit(self, request: Request, draft: Draft) -> bool:
        """Give a waiting request a slot and its first row, if something of it can run.

        Returns False if it could run but there is no place, so that nobody younger overtakes it.
        """
        known = self.look_up(request)
        num_known_tokens = len(known.block_ids) * self.limits.block_size
        num_found_tokens = known.num_blocks * self.limits.block_size
        if self._runnable_end(request, num_found_tokens, num_found_tokens + 1) <= num_found_tokens:
            request.awaits_media = True
            return True
        self.kv.pool.acquire(known.block_ids)
        if not self._has_place(request, len(known.block_ids), draft):
            self.kv.release(known.block_ids)
            return False
        self.kv.host.pin(known.host_block_ids)
        self.waiting.remove(request)
        request.status = Status.RUNNING
        request.run += 1
        request.slot = self.slots.free.pop()
        request.block_ids, request.host_block_ids = known.block_ids, known.host_block_ids
        request.num_inserted_blocks = request.num_sent_blocks = len(known.block_ids)
        request.num_found_tokens = num_found_tokens
        request.num_computed_tokens = request.num_planned_tokens = num_known_tokens
        if request.num_cached_tokens is None:
            request.num_cached_tokens = num_found_tokens
            self._counters.prompt_tokens += request.num_prompt_tokens
            self._counters.prompt_tokens_cached += num_found_tokens
            self._counters.prompt_tokens_host_cached += num_found_tokens - num_known_tokens
        insort(self.running, request, key=_BY_KEY)
        draft.admit.append(
            NewSequence(
                request.slot,
                request.request_id,
                tuple(request.token_ids),
                request.num_prompt_tokens,
                request.media,
                request.rope_delta,
                request.sampling,
                tuple(known.block_ids),
            )
        )
        self._plan_chunk(request, draft)
        return True

    def _has_place(self, request: Request, num_known_blocks: int, draft: Draft) -> bool:
        """Whether there are a slot and blocks for all its known tokens, beside what running prefills still need.

        Requests that wait for media give way: younger ones always, older ones once in their life.
        """
        num_blocks = self._num_blocks(len(request.token_ids)) - num_known_blocks
        num_spare = self._num_unclaimed_blocks(self.running)
        if self.slots.free and num_spare >= num_blocks:
            return True
        idle = [r for r in self.running if (r.key > request.key or not r.num_yields) and self._is_idle(r, draft)]
        staying = [r for r in self.running if r not in idle]
        if not idle or self._num_unclaimed_blocks(staying) + sum(len(r.block_ids) for r in idle) < num_blocks:
            return False
        while idle and not (self.slots.free and num_spare >= num_blocks):
            victim = idle.pop()
            victim.num_yields += victim.key < request.key
            self.preempt(victim)
            num_spare = self._num_unclaimed_blocks(self.running)
        return bool(self.slots.free) and num_spare >= num_blocks

    def _is_idle(self, request: Request, draft: Draft) -> bool:
        """Running in name only: it waits for media."""
        start = request.num_planned_tokens
        return (
            start < request.media_end
            and start == request.num_computed_tokens
            and not request.host_block_ids
            and request not in draft.planned
            and self._runnable_end(request, start, start + 1) <= start
        )

    def _num_unclaimed_blocks(self, running: list[Request]) -> int:
        """Free blocks that none of these will need to finish its prefill, less one for each of the others to grow."""
        num_claimed = 0
        for request in running:
            num_claimed += max(1, self._num_blocks(len(request.token_ids)) - len(request.block_ids))
        return self.kv.pool.num_free - num_claimed

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.block_size)
