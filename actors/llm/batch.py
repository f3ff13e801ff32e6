"""StepPlan -> the arrays of one forward pass: token_ids, positions, slot_mapping, cu_seqlens, block_tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlmrt.actors.llm.slots import PlanError, Slots
from vlmrt.actors.models.rope_index import mrope_positions
from vlmrt.runtime.messages import EmbedSlice, StepPlan, StepRow

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class MergePart:
    """Image rows of one slice and where they go among the step's tokens."""

    source: EmbedSlice
    first_position: int


@dataclass(frozen=True, slots=True)
class HostBatch:
    """One step on the host.  T tokens, S sequences in plan order, R rows that sample."""

    token_ids: Ints  # [T]; anything where unknown_positions points
    positions: Ints  # [3, T]
    slot_mapping: Ints  # [T]
    cu_seqlens: NDArray[np.int32]  # [S + 1]
    context_lens: NDArray[np.int32]  # [S]
    slots: Ints  # [S]
    block_tables: NDArray[np.int32]  # [S, most blocks of any sequence]
    num_decodes: int  # leading rows that run the last token sampled for their slot, and sample the next
    query_lens: tuple[int, ...]
    context_lens_host: tuple[int, ...]
    unknown_positions: Ints  # tokens sampled by a step that has not ended: the device has them, by slot
    unknown_slots: Ints
    sample_sequences: Ints  # [R] index of each sequence that samples
    sample_positions: Ints  # [R] index of the last token of each row that samples
    sample_slots: Ints  # [R]
    sample_admissions: Ints  # [R]
    output_positions: Ints  # [R] tokens generated before this one
    merges: tuple[MergePart, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


def build_batch(plan: StepPlan, slots: Slots, merge_size: int) -> HostBatch:
    """Apply a plan to the slots and lay out its rows; a sampled token is counted in its sequence from here on.

    Raises: PlanError if a row runs tokens that its sequence does not have or that its blocks do not cover.
    """
    for released in plan.release:
        slots.release(released)
    for sequence in plan.admit:
        slots.admit(sequence)
    for row in plan.rows:
        if row.new_block_ids:
            slots.extend_blocks(row.slot, row.new_block_ids)

    slot = np.array([row.slot for row in plan.rows], np.int64)
    start = np.array([row.start for row in plan.rows], np.int64)
    count = np.array([row.num_tokens for row in plan.rows], np.int64)
    samples = np.array([row.sample for row in plan.rows], np.bool_)
    stop = start + count
    _check_rows(plan, slots, slot, start, stop, samples)

    cu_seqlens = np.zeros(len(slot) + 1, np.int64)
    np.cumsum(count, out=cu_seqlens[1:])
    num_tokens = int(cu_seqlens[-1])
    if num_tokens == len(slot):  # decode only: one token each
        slot_of, index = slot, start
    else:
        slot_of = np.repeat(slot, count)
        index = np.arange(num_tokens) + np.repeat(start - cu_seqlens[:-1], count)
    num_blocks = -(-int(stop.max(initial=0)) // slots.block_size)
    block = slots.block_table[slot_of, index // slots.block_size]
    unknown = np.flatnonzero(index >= slots.num_known[slot_of])
    sampled = np.flatnonzero(samples)
    sample_slots = slot[sampled]
    is_decode = ((count == 1) & samples & (start >= slots.num_given[slot])).tolist()
    batch = HostBatch(
        token_ids=slots.token_ids[slot_of, index],
        positions=_positions(plan.rows, slots, slot, slot_of, index, start, cu_seqlens, merge_size),
        slot_mapping=block.astype(np.int64) * slots.block_size + index % slots.block_size,
        cu_seqlens=cu_seqlens.astype(np.int32),
        context_lens=stop.astype(np.int32),
        slots=slot,
        block_tables=slots.block_table[slot, :num_blocks],
        num_decodes=is_decode.index(False) if False in is_decode else len(slot),
        query_lens=tuple(count.tolist()),
        context_lens_host=tuple(stop.tolist()),
        unknown_positions=unknown,
        unknown_slots=slot_of[unknown],
        sample_sequences=sampled,
        sample_positions=cu_seqlens[1:][sampled] - 1,
        sample_slots=sample_slots,
        sample_admissions=slots.admissions[sample_slots],
        output_positions=slots.num_tokens[sample_slots] - slots.num_prompt_tokens[sample_slots],
        merges=tuple(_merges(plan.rows, cu_seqlens)),
    )
    slots.num_tokens[sample_slots] += 1
    return batch


def part_of(batch: HostBatch, keep: NDArray[np.bool_]) -> HostBatch:
    """The rows of a batch that keep [S] names, as a batch of their own; the slots have counted their tokens already."""
    query_lens = np.array(batch.query_lens, np.int64)
    keep_tokens = np.repeat(keep, query_lens)
    new_position = np.cumsum(keep_tokens) - 1
    keep_unknown = keep_tokens[batch.unknown_positions]
    keep_samples = keep[batch.sample_sequences]
    cu_seqlens = np.zeros(int(keep.sum()) + 1, np.int32)
    np.cumsum(query_lens[keep], out=cu_seqlens[1:])
    return HostBatch(
        token_ids=batch.token_ids[keep_tokens],
        positions=batch.positions[:, keep_tokens],
        slot_mapping=batch.slot_mapping[keep_tokens],
        cu_seqlens=cu_seqlens,
        context_lens=batch.context_lens[keep],
        slots=batch.slots[keep],
        block_tables=batch.block_tables[keep],
        num_decodes=int(keep[: batch.num_decodes].sum()),
        query_lens=tuple(query_lens[keep].tolist()),
        context_lens_host=tuple(batch.context_lens[keep].tolist()),
        unknown_positions=new_position[batch.unknown_positions[keep_unknown]],
        unknown_slots=batch.unknown_slots[keep_unknown],
        sample_sequences=(np.cumsum(keep) - 1)[batch.sample_sequences[keep_samples]],
        sample_positions=new_position[batch.sample_positions[keep_samples]],
        sample_slots=batch.sample_slots[keep_samples],
        sample_admissions=batch.sample_admissions[keep_samples],
        output_positions=batch.output_positions[keep_samples],
        merges=tuple(
            MergePart(part.source, int(new_position[part.first_position]))
            for part in batch.merges
            if keep_tokens[part.first_position]
        ),
    )


def _check_rows(plan: StepPlan, slots: Slots, slot: Ints, start: Ints, stop: Ints, samples: NDArray[np.bool_]) -> None:
    if not len(slot):
        return
    if slot.min() < 0 or slot.max() >= len(slots):
        raise PlanError(f"step {plan.step}: slots {slot.tolist()} are not all within the {len(slots)} there are")
    num_tokens = slots.num_tokens[slot]
    bad = (start < 0) | (stop <= start) | (stop > num_tokens) | (stop > slots.num_blocks[slot] * slots.block_size)
    bad |= samples & ((stop != num_tokens) | (num_tokens + 1 > slots.max_tokens))
    bad |= stop - 1 > slots.num_known[slot]  # at most one token, the last, is still on its way
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise PlanError(
            f"step {plan.step}, row {row}: tokens [{start[row]}, {stop[row]}) of slot {slot[row]} "
            f"{'(to sample) ' if samples[row] else ''}do not fit its {num_tokens[row]} tokens "
            f"and {slots.num_blocks[slot[row]]} blocks"
        )


def _positions(
    rows: Sequence[StepRow],
    slots: Slots,
    slot: Ints,
    slot_of: Ints,
    index: Ints,
    start: Ints,
    cu_seqlens: Ints,
    merge_size: int,
) -> Ints:
    """[3, T]: generated tokens by their slot's rope_delta, all at once; only rows within a prompt with media alone."""
    generated = index >= slots.num_prompt_tokens[slot_of]
    text = index + np.where(generated, slots.rope_delta[slot_of], 0)
    positions = np.repeat(text[None], 3, axis=0)
    with_media = np.flatnonzero(slots.has_spans[slot] & (start < slots.num_prompt_tokens[slot]))
    for row in with_media.tolist():
        at = int(slot[row])
        positions[:, cu_seqlens[row] : cu_seqlens[row + 1]] = mrope_positions(
            rows[row].start,
            rows[row].start + rows[row].num_tokens,
            slots.spans[at],
            int(slots.num_prompt_tokens[at]),
            int(slots.rope_delta[at]),
            merge_size,
        )
    return positions


def _merges(rows: Sequence[StepRow], cu_seqlens: Ints) -> list[MergePart]:
    merges = []
    for number, row in enumerate(rows):
        for part in row.embeds:
            if part.offset < 0 or part.num_rows < 1 or part.offset + part.num_rows > row.num_tokens:
                raise PlanError(
                    f"slot {row.slot}: {part.num_rows} image rows at offset {part.offset} do not fit "
                    f"a row of {row.num_tokens} tokens"
                )
            merges.append(MergePart(part, int(cu_seqlens[number]) + part.offset))
    return merges
