"""The scheduler's peers as pure Python: they compute with the real contents of blocks and pages, and check every read.

The value of a position is a digest of everything before it, so that a token read from a wrong or stale slot cannot go
unnoticed: it would not be the value that the sequence's own history gives.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from vlmrt.runtime.errors import WireError
from vlmrt.runtime.messages import (
    ActorName,
    ArenaRef,
    AttachSlab,
    CancelEncode,
    Decode,
    DecodeFailed,
    DecodeFrames,
    DetachSlab,
    EmbedSlice,
    EmbedsReady,
    Encode,
    EncodeFailed,
    Epoch,
    FailedRow,
    FinishReason,
    FreePixels,
    LlmInbox,
    MediaItem,
    Message,
    MmHash,
    NewSequence,
    PixelsReady,
    Restore,
    StepPlan,
    StepResult,
    StopRule,
    Submit,
    TokenLogprobs,
)

IMAGE_TOKEN = 0
STOP_TOKEN = 1
VOCABULARY = 14  # tokens 1..13 are sampled
BYTES_PER_PATCH = 700
MASK = (1 << 61) - 1

Row = tuple[MmHash, int]  # which image, which of its rows


def extend(value: int, token_or_row: int) -> int:
    return (value * 1_000_003 + token_or_row + 7) % MASK


def row_value(row: Row) -> int:
    return zlib.crc32(f"{row[0]}/{row[1]}".encode()) + (1 << 33)


def prompt_rows(media: tuple[MediaItem, ...]) -> dict[int, Row]:
    """Position -> the image row that belongs there."""
    return {item.start + row: (item.mm_hash, row) for item in media for row in range(item.num_tokens)}


def fake_logprobs(token_id: int, num_output_tokens: int) -> TokenLogprobs:
    return TokenLogprobs(-float(token_id), ((num_output_tokens, -0.5),))


def sample(value: int, seed: int, num_output_tokens: int) -> int:
    return 1 + (value ^ (seed * 7919 + num_output_tokens * 104_729)) % 65_521 % (VOCABULARY - 1)


def tokens_alone(submit: Submit, max_tokens: int) -> tuple[list[int], FinishReason]:
    """What this request gets when nothing else runs and nothing is cached."""
    rows, value = prompt_rows(submit.media), 0
    for position, token_id in enumerate(submit.prompt_token_ids):
        value = extend(value, row_value(rows[position]) if position in rows else token_id)
    token_ids: list[int] = []
    while True:
        token_id = sample(value, submit.sampling.seed, len(token_ids))
        token_ids.append(token_id)
        if token_id in submit.stop.stop_token_ids and len(token_ids) >= submit.stop.min_tokens:
            return token_ids, "stop"
        if len(token_ids) >= max_tokens:
            return token_ids, "length"
        value = extend(value, token_id)


def stop_rule(max_tokens: int, min_tokens: int = 0) -> StopRule:
    return StopRule(max_tokens, min_tokens, (STOP_TOKEN,))


class FakeMedia:
    """Decodes in order; waits while its arena is full."""

    def __init__(self, name: ActorName, epoch: Epoch, arena_bytes: int, send: Callable[[Message], None]) -> None:
        self.name, self.epoch, self.arena_bytes = name, epoch, arena_bytes
        self.queue: deque[Decode | DecodeFrames] = deque()
        self.clips: set[MmHash] = set()  # decoded here, by their groups
        self.pixels: dict[ArenaRef, MmHash] = {}
        self._send = send
        self._next_offset = 0

    def receive(self, message: Message) -> None:
        if isinstance(message, Decode | DecodeFrames):
            self.queue.append(message)
        else:
            assert isinstance(message, FreePixels)
            for ref in message.pixels:
                del self.pixels[ref]  # a KeyError is a double free

    def work(self) -> bool:
        """Decode the next image or group of a clip.  False if there is none or no room for it."""
        if not self.queue:
            return False
        decode = self.queue[0]
        mm_hash = decode.mm_hash if isinstance(decode, Decode) else decode.groups[0].mm_hash
        if mm_hash.startswith("bad"):
            self._done()
            self._send(DecodeFailed(mm_hash, WireError(400, "not an image", "bad_image")))
            return True
        num_bytes = decode.target_size[0] * decode.target_size[1] * BYTES_PER_PATCH
        if num_bytes > self.arena_bytes:
            self._done()
            self._send(DecodeFailed(mm_hash, WireError(400, "larger than the arena", "image_too_large")))
            return True
        if sum(ref.num_bytes for ref in self.pixels) + num_bytes > self.arena_bytes:
            return False
        self._done()
        if isinstance(decode, DecodeFrames):
            self.clips.add(mm_hash)
        self._next_offset += num_bytes  # never reused, so that a stale reference is found out
        ref = ArenaRef(self.name, self.epoch, self._next_offset, num_bytes)
        self.pixels[ref] = mm_hash
        self._send(PixelsReady(mm_hash, ref, (1, 2, 2, 3), 0.0, 0.0))
        return True

    def _done(self) -> None:
        """With what is first in the queue, or with its first group."""
        first = self.queue.popleft()
        if isinstance(first, DecodeFrames) and len(first.groups) > 1:
            self.queue.appendleft(msgspec.structs.replace(first, groups=first.groups[1:]))


class FakeVit:
    """Encodes and restores in any order; its slab and its host memory hold (mm_hash, row) per row."""

    def __init__(
        self,
        name: ActorName,
        epoch: Epoch,
        num_pages: int,
        num_host_pages: int,
        page_rows: int,
        send: Callable[[Message], None],
        pixels_of: Callable[[ArenaRef], MmHash | None],
        fails_to_restore: Callable[[], bool] = lambda: False,
    ) -> None:
        """fails_to_restore: asked for each Restore."""
        self.name, self.epoch, self.page_rows = name, epoch, page_rows
        self.slab: list[Row | None] = [None] * (num_pages * page_rows)
        self.host: list[Row | None] = [None] * (num_host_pages * page_rows)
        self.queue: list[Encode | Restore] = []
        self.num_encoded = 0
        self.num_restored = 0
        self._send = send
        self._pixels_of = pixels_of
        self._fails_to_restore = fails_to_restore
        self._answered: set[int] = set()

    def receive(self, message: Message) -> None:
        if isinstance(message, Encode | Restore):
            self.queue.append(message)
            return
        assert isinstance(message, CancelEncode)
        for queued in self.queue:
            if queued.encode_id == message.encode_id:
                self.queue.remove(queued)
                self._fail(queued.encode_id, WireError(500, "dropped", "cancelled"))
                return
        assert message.encode_id in self._answered, "an encode that never was is cancelled"

    def work(self, index: int) -> None:
        message = self.queue.pop(index)
        if isinstance(message, Restore):
            self._restore(message)
        else:
            self._encode(message)

    def _encode(self, encode: Encode) -> None:
        pixels = self._pixels_of(encode.pixels)
        if pixels is None:
            self._fail(encode.encode_id, WireError(500, "the arena is gone", "no_pixels"))
            return
        assert pixels == encode.mm_hash, "pixels of another image"
        rows: list[Row | None] = [(encode.mm_hash, row) for row in range(num_rows_of(encode.grid_thw))]
        self._write(self.slab, encode.pages, rows)
        if encode.host_pages:
            self._write(self.host, encode.host_pages, rows)
        self.num_encoded += 1
        self._answer(encode.encode_id, EmbedsReady(encode.encode_id, len(rows), 0.0, 0.0))

    def _restore(self, restore: Restore) -> None:
        if self._fails_to_restore():
            self._fail(restore.encode_id, WireError(500, "not today", "bad_restore"))
            return
        places = [self._place(restore.host_pages, row) for row in range(restore.num_rows)]
        self._write(self.slab, restore.pages, [self.host[place] for place in places])
        self.num_restored += 1
        self._answer(restore.encode_id, EmbedsReady(restore.encode_id, restore.num_rows, 0.0, 0.0))

    def _write(self, memory: list[Row | None], pages: tuple[int, ...], rows: list[Row | None]) -> None:
        assert len(pages) == -(-len(rows) // self.page_rows)
        for index, row in enumerate(rows):
            memory[self._place(pages, index)] = row

    def _place(self, pages: tuple[int, ...], row: int) -> int:
        return pages[row // self.page_rows] * self.page_rows + row % self.page_rows

    def _fail(self, encode_id: int, error: WireError) -> None:
        self._answer(encode_id, EncodeFailed(encode_id, error))

    def _answer(self, encode_id: int, answer: Message) -> None:
        assert encode_id not in self._answered
        self._answered.add(encode_id)
        self._send(answer)


def num_rows_of(grid_thw: tuple[int, int, int]) -> int:
    return grid_thw[0] * grid_thw[1] * grid_thw[2]


@dataclass
class Sequence:
    """What a slot of the ranks holds."""

    new: NewSequence
    token_ids: list[int]
    rows: dict[int, Row]
    block_ids: list[int] = field(default_factory=list)
    values: list[int] = field(default_factory=list)  # by position, from the token ids alone

    def value_of(self, position: int) -> int:
        """The digest of tokens 0..position: what the slot of that position must hold."""
        while len(self.values) <= position:
            at = len(self.values)
            own = row_value(self.rows[at]) if at in self.rows else self.token_ids[at]
            self.values.append(extend(self.values[-1] if self.values else 0, own))
        return self.values[position]


class FakeLlm:
    """All ranks of one incarnation; a step runs when every rank has its plan."""

    def __init__(
        self,
        tp: int,
        epoch: Epoch,
        num_blocks: int,
        num_host_blocks: int,
        block_size: int,
        max_num_seqs: int,
        send: Callable[[Message], None],
        slab_of: Callable[[ActorName, Epoch], FakeVit],
        finds_no_memory: Callable[[], bool] = lambda: False,
    ) -> None:
        """finds_no_memory: asked for each row of a step."""
        self.tp, self.epoch, self.num_blocks = tp, epoch, num_blocks
        self.lost: set[int] = set()  # slots whose sequence found no memory
        self._finds_no_memory = finds_no_memory
        self.block_size, self.max_num_seqs = block_size, max_num_seqs
        self.queues: list[deque[LlmInbox]] = [deque() for _ in range(tp)]
        self.attached: list[set[tuple[ActorName, Epoch]]] = [set() for _ in range(tp)]
        self.kv: dict[tuple[int, int], int] = {}  # (block, place in it) -> value
        self.num_host_blocks = num_host_blocks
        self.host: dict[int, list[int]] = {}  # host block -> values, in order
        self.num_loads = 0
        self.sequences: dict[int, Sequence] = {}
        self.num_steps = 0
        self.num_unanswered = 0
        self._send = send
        self._slab_of = slab_of
        self._last_step = 0

    def receive(self, rank: int, message: Message) -> None:
        assert isinstance(message, AttachSlab | DetachSlab | StepPlan)
        self.queues[rank].append(message)

    def work(self) -> bool:
        """Run the next step.  False if not every rank has one."""
        for queue, attached in zip(self.queues, self.attached, strict=True):
            while queue and not isinstance(queue[0], StepPlan):
                message = queue.popleft()
                assert isinstance(message, AttachSlab | DetachSlab)
                if isinstance(message, AttachSlab):
                    assert (message.vit, message.epoch) not in attached
                    attached.add((message.vit, message.epoch))
                else:
                    attached.remove((message.vit, message.epoch))
        if not all(self.queues):
            return False
        plans = [queue.popleft() for queue in self.queues]
        assert all(plan == plans[0] for plan in plans)
        assert isinstance(plans[0], StepPlan)
        self._run(plans[0])
        return True

    def _run(self, plan: StepPlan) -> None:
        assert plan.step > self._last_step
        assert plan.rows or plan.loads, "a plan without rows and loads"
        self._last_step = plan.step
        self.num_steps += 1
        self._copy(plan)
        for slot in plan.release:
            del self.sequences[slot]  # a KeyError: released twice
            self.lost.discard(slot)
        for new in plan.admit:
            assert new.slot not in self.sequences, "the slot is taken"
            assert 0 <= new.slot < self.max_num_seqs
            rows = prompt_rows(new.media)
            self.sequences[new.slot] = Sequence(new, list(new.token_ids), rows, list(new.block_ids))
        assert len({row.slot for row in plan.rows}) == len(plan.rows)
        orders = [1 if row.num_tokens > 1 else 0 if row.sample and not row.embeds else 2 for row in plan.rows]
        assert orders == sorted(orders), "decode rows come first, other single tokens last"
        token_ids, logprobs, failed = [], [], []
        for index, row in enumerate(plan.rows):
            sequence = self.sequences[row.slot]
            sequence.block_ids += row.new_block_ids
            if row.slot in self.lost or self._finds_no_memory():
                self.lost.add(row.slot)
                failed.append(FailedRow(index, "out_of_memory"))
                continue
            self._compute(sequence, row.start, row.num_tokens, row.embeds)
            end = row.start + row.num_tokens
            if row.sample:
                assert end == len(sequence.token_ids)
                num_output_tokens = end - sequence.new.num_prompt_tokens
                token_id = sample(self._at(sequence, end - 1), sequence.new.sampling.seed, num_output_tokens)
                sequence.token_ids.append(token_id)
                token_ids.append(token_id)
                wants = sequence.new.sampling.num_logprobs >= 0
                logprobs.append(fake_logprobs(token_id, num_output_tokens) if wants else None)
        found = tuple(logprobs) if any(logprobs) else ()
        self._send(StepResult(plan.step, tuple(token_ids), 1.0, tuple(failed), found))

    def _copy(self, plan: StepPlan) -> None:
        """Saves, then loads; the copies of either kind may run in any order."""
        saved_to = [save.host_block_id for save in plan.saves]
        assert len(set(saved_to)) == len(saved_to), "two saves to one host block"
        assert all(0 <= host_block_id < self.num_host_blocks for host_block_id in saved_to)
        for save in plan.saves:  # a KeyError: the block was never full
            self.host[save.host_block_id] = [self.kv[save.block_id, place] for place in range(self.block_size)]
        loaded_to = [load.block_id for load in plan.loads]
        assert len(set(loaded_to)) == len(loaded_to), "two loads to one block"
        assert all(0 <= block_id < self.num_blocks for block_id in loaded_to)
        for load in plan.loads:
            for place, value in enumerate(self.host[load.host_block_id]):
                self.kv[load.block_id, place] = value
        self.num_loads += len(plan.loads)

    def _compute(self, sequence: Sequence, start: int, num_tokens: int, embeds: tuple[EmbedSlice, ...]) -> None:
        """Write the row's slots from what lies in the slots before it and in the slabs, checking both."""
        assert 0 <= start < start + num_tokens <= len(sequence.token_ids)
        for position in range(start):
            assert self._at(sequence, position) == sequence.value_of(position), (
                f"{sequence.new.request_id}: the slot of position {position} holds something else"
            )
        merged = self._merged(start, embeds)
        for position in range(start, start + num_tokens):
            assert merged.get(position) == sequence.rows.get(position), (
                f"{sequence.new.request_id}: position {position} is given {merged.get(position)}"
            )
            before = self._at(sequence, position - 1) if position else 0
            row = merged.get(position)
            own = row_value(row) if row is not None else sequence.token_ids[position]
            block, place = divmod(position, self.block_size)
            self.kv[sequence.block_ids[block], place] = extend(before, own)

    def _merged(self, start: int, embeds: tuple[EmbedSlice, ...]) -> dict[int, Row | None]:
        """Position -> what the slab holds for it."""
        merged: dict[int, Row | None] = {}
        for part in embeds:
            assert all((part.vit, part.epoch) in attached for attached in self.attached), "a slab nobody attached"
            vit = self._slab_of(part.vit, part.epoch)
            for index in range(part.num_rows):
                page, place = divmod(part.first_row + index, vit.page_rows)
                position = start + part.offset + index
                assert position not in merged
                merged[position] = vit.slab[part.pages[page] * vit.page_rows + place]
        return merged

    def _at(self, sequence: Sequence, position: int) -> int:
        block, place = divmod(position, self.block_size)
        return self.kv[sequence.block_ids[block], place]
