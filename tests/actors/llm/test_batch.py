"""What a plan becomes: the arrays of one forward pass."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest

from vlmrt.actors.llm import batch as batch_module
from vlmrt.actors.llm.batch import build_batch, part_of
from vlmrt.actors.llm.slots import PlanError, Slots
from vlmrt.actors.models.rope_index import MediaSpan, mrope_positions
from vlmrt.runtime.messages import (
    ActorName,
    EmbedSlice,
    Epoch,
    MediaItem,
    MmHash,
    NewSequence,
    RequestId,
    Sampling,
    StepPlan,
    StepRow,
)

BLOCK_SIZE = 4
IMAGE = MediaItem(MmHash("m"), 3, 6, (1, 4, 6))
SPAN = MediaSpan(3, 6, (1, 4, 6))


def sequence(slot: int, num_tokens: int, blocks: tuple[int, ...], **fields: Any) -> NewSequence:
    token_ids = tuple(range(100 * slot, 100 * slot + num_tokens))
    values: dict[str, Any] = {"num_prompt_tokens": num_tokens, "media": (), "rope_delta": 0}
    values |= fields
    return NewSequence(slot, RequestId(f"r{slot}"), token_ids, sampling=Sampling(), block_ids=blocks, **values)


def test_decode_rows_and_chunks_are_laid_out_in_plan_order() -> None:
    slots = Slots(4, 100, BLOCK_SIZE)
    admit = (sequence(1, 6, (7, 3), num_prompt_tokens=4), sequence(2, 9, (5,)), sequence(0, 3, (1,)))
    rows = (
        StepRow(1, 5, 1, (), True),
        StepRow(0, 2, 1, (), False),
        StepRow(2, 2, 5, (6,), False),
    )
    batch = build_batch(StepPlan(1, (), admit, rows), slots, 2)
    assert batch.token_ids.tolist() == [105, 2, 202, 203, 204, 205, 206]
    assert batch.positions.tolist() == [[5, 2, 2, 3, 4, 5, 6]] * 3
    assert batch.slot_mapping.tolist() == [3 * 4 + 1, 1 * 4 + 2, 22, 23, 24, 25, 26]
    assert batch.cu_seqlens.tolist() == [0, 1, 2, 7]
    assert batch.context_lens.tolist() == list(batch.context_lens_host) == [6, 3, 7]
    assert batch.query_lens == (1, 1, 5)
    assert batch.num_decodes == 0  # all three have only now entered their slots
    assert [table[:count].tolist() for table, count in zip(batch.block_tables, (2, 1, 2), strict=True)] == [
        [7, 3],
        [1],
        [5, 6],
    ]
    assert batch.sample_positions.tolist() == [0]
    assert batch.output_positions.tolist() == [2]
    assert batch.unknown_positions.tolist() == []


def test_only_a_token_that_was_sampled_in_its_slot_makes_a_decode_row() -> None:
    """The device has no other as the slot's last token: not the end of a prefill, nor what was sampled before."""
    slots = Slots(4, 100, BLOCK_SIZE)
    resumed = sequence(2, 6, (2, 3), num_prompt_tokens=3)
    admit = (sequence(1, 5, (0, 1)), resumed)
    build_batch(StepPlan(1, (), admit, (StepRow(1, 0, 4, (), False), StepRow(2, 0, 5, (), False))), slots, 2)
    ends = (StepRow(1, 4, 1, (), True), StepRow(2, 5, 1, (), True))
    assert build_batch(StepPlan(2, (), (), ends), slots, 2).num_decodes == 0
    decodes = (StepRow(1, 5, 1, (), True), StepRow(2, 6, 1, (), True))
    assert build_batch(StepPlan(3, (), (), decodes), slots, 2).num_decodes == 2


def test_a_token_that_is_still_on_its_way_is_taken_from_its_slot() -> None:
    slots = Slots(4, 100, BLOCK_SIZE)
    first = build_batch(StepPlan(1, (), (sequence(2, 4, (0, 1)),), (StepRow(2, 0, 4, (), True),)), slots, 2)
    ahead = StepPlan(2, (), (sequence(0, 2, (2,)),), (StepRow(0, 1, 1, (), True), StepRow(2, 4, 1, (), True)))
    second = build_batch(ahead, slots, 2)
    assert (second.unknown_positions.tolist(), second.unknown_slots.tolist()) == ([1], [2])
    slots.learn(first.sample_slots, first.sample_admissions, np.array([42]))
    slots.learn(second.sample_slots, second.sample_admissions, np.array([7, 43]))
    third = build_batch(StepPlan(3, (), (), (StepRow(2, 5, 1, (), True),)), slots, 2)
    assert third.token_ids.tolist() == [43]
    assert (first.num_decodes, second.num_decodes, third.num_decodes) == (0, 0, 1)
    assert third.output_positions.tolist() == [2]
    with pytest.raises(PlanError):  # two steps ahead: nobody has that token
        build_batch(StepPlan(4, (), (), (StepRow(2, 7, 1, (), True),)), slots, 2)


def test_only_rows_within_a_prompt_with_media_ask_for_their_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def counted(start: int, stop: int, *rest: Any) -> Any:
        asked.append((start, stop))
        return mrope_positions(start, stop, *rest)

    monkeypatch.setattr(batch_module, "mrope_positions", counted)
    slots = Slots(4, 100, BLOCK_SIZE)
    with_image = sequence(0, 14, (0, 1, 2, 3), num_prompt_tokens=12, media=(IMAGE,), rope_delta=-3)
    admit = (with_image, sequence(1, 9, (4, 5, 6)), sequence(2, 5, (7, 8), num_prompt_tokens=3))
    rows = (
        StepRow(0, 13, 1, (), True),
        StepRow(2, 4, 1, (), True),
        StepRow(1, 0, 9, (), True),
    )
    batch = build_batch(StepPlan(1, (), admit, rows), slots, 2)
    assert asked == []
    assert batch.positions.tolist() == [[10, 4, *range(9)]] * 3
    again = StepPlan(2, (0,), (with_image,), (StepRow(0, 2, 11, (), False),))
    batch = build_batch(again, slots, 2)
    assert asked == [(2, 13)]
    expected = mrope_positions(2, 13, [SPAN], 12, -3, 2)
    assert batch.positions.tolist() == expected.tolist()


def test_image_rows_go_where_their_row_s_tokens_lie() -> None:
    slots = Slots(4, 100, BLOCK_SIZE)
    part = EmbedSlice(ActorName("vit:0"), Epoch(1), (4, 2), 1, 5, 2)
    admit = (sequence(0, 1, (0,)), sequence(1, 12, (1, 2, 3), media=(IMAGE,)))
    rows = (StepRow(0, 0, 1, (), True), StepRow(1, 2, 7, (), False, (part,)))
    batch = build_batch(StepPlan(1, (), admit, rows), slots, 2)
    assert [(merge.source, merge.first_position) for merge in batch.merges] == [(part, 3)]


@pytest.mark.parametrize(("num_rows", "offset"), [(6, 2), (0, 0), (1, -1), (8, 0)])
def test_image_rows_outside_their_row_s_tokens_are_refused(num_rows: int, offset: int) -> None:
    part = EmbedSlice(ActorName("vit:0"), Epoch(1), (4, 2), 0, num_rows, offset)
    plan = StepPlan(1, (), (sequence(1, 12, (1, 2, 3), media=(IMAGE,)),), (StepRow(1, 2, 7, (), False, (part,)),))
    with pytest.raises(PlanError, match="image rows"):
        build_batch(plan, Slots(4, 100, BLOCK_SIZE), 2)


def test_a_plan_without_rows_only_releases_and_admits() -> None:
    slots = Slots(4, 100, BLOCK_SIZE)
    build_batch(StepPlan(1, (), (sequence(0, 3, (0,)),), ()), slots, 2)
    batch = build_batch(StepPlan(2, (0,), (sequence(0, 5, (1, 2)),), ()), slots, 2)
    assert batch.num_tokens == 0
    assert slots.num_tokens[0] == 5


def test_part_of_a_batch_is_the_batch_of_those_rows() -> None:
    """Every subset of decode rows whose tokens are unknown, chunks with image rows and a chunk that does not sample."""

    def ready() -> Slots:
        slots = Slots(6, 100, BLOCK_SIZE)
        first = (sequence(0, 5, (1, 2)), sequence(1, 7, (3, 4)))
        rows = (StepRow(0, 0, 5, (), True), StepRow(1, 0, 7, (), True))
        build_batch(StepPlan(1, (), first, rows), slots, 2)
        more = (
            sequence(2, 11, (5, 6, 7), media=(IMAGE,), rope_delta=-3),
            sequence(3, 14, (8, 9, 10, 11), media=(IMAGE,)),
        )
        build_batch(StepPlan(2, (), more, ()), slots, 2)
        return slots

    def embeds(offset: int, first_row: int) -> tuple[EmbedSlice, ...]:
        return (EmbedSlice(ActorName("vit:0"), Epoch(1), (4, 5), first_row, 6 - first_row, offset),)

    rows = (
        StepRow(0, 5, 1, (), True),
        StepRow(1, 7, 1, (), True),
        StepRow(2, 0, 11, (), True, embeds(3, 0)),
        StepRow(3, 4, 8, (), False, embeds(0, 1)),
    )
    whole = build_batch(StepPlan(3, (), (), rows), ready(), 2)
    for keep in itertools.product((False, True), repeat=len(rows)):
        kept = tuple(itertools.compress(rows, keep))
        expected = dataclasses.asdict(build_batch(StepPlan(3, (), (), kept), ready(), 2))
        part = dataclasses.asdict(part_of(whole, np.array(keep)))
        part["block_tables"] = part["block_tables"][:, : expected["block_tables"].shape[1]]
        for name, value in expected.items():
            np.testing.assert_equal(part[name], value, err_msg=f"{name} of {keep}")
