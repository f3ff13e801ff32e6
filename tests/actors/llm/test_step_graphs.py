"""The inputs of a recorded step are a batch's own among padding that writes and sees nothing."""

from __future__ import annotations

import numpy as np
import torch

from tests.actors.llm.test_batch import BLOCK_SIZE, IMAGE, sequence
from vlmrt.actors.llm.batch import build_batch
from vlmrt.actors.llm.slots import Slots
from vlmrt.actors.llm.step_graphs import HostInputs, StepShape, input_shapes, step_shapes, views
from vlmrt.runtime.messages import ActorName, EmbedSlice, Epoch, StepPlan, StepRow

NUM_SLOTS = 6
NUM_COLUMNS = 7
SHAPE = StepShape(num_decodes=3, num_tokens=10, num_chunks=3)


def test_decode_rows_come_first_and_chunks_behind_their_padding() -> None:
    slots = Slots(NUM_SLOTS, 100, BLOCK_SIZE)
    running = build_batch(StepPlan(1, (), (sequence(2, 4, (0, 1)),), (StepRow(2, 0, 4, (), True),)), slots, 2)
    slots.learn(running.sample_slots, running.sample_admissions, np.array([42]))
    embeds = (EmbedSlice(ActorName("vit:0"), Epoch(1), (4,), 0, 3, 2),)
    plan = StepPlan(
        2,
        (),
        (sequence(5, 10, (9, 8, 3), media=(IMAGE,)), sequence(1, 2, (6,))),
        (StepRow(2, 4, 1, (), True), StepRow(5, 1, 5, (), False, embeds), StepRow(1, 0, 2, (), True)),
    )
    batch = build_batch(plan, slots, 2)
    inputs = HostInputs(SHAPE, NUM_COLUMNS, NUM_SLOTS, is_pinned=False)
    found = inputs.fields
    padding = inputs.buffer.clone()
    inputs.buffer.fill_(-77)  # every number is set
    inputs.fill(batch)
    pad = NUM_SLOTS
    assert found["slots"].tolist() == [2, pad, pad, pad, 1, pad]
    assert found["output_positions"].tolist() == [1, 0, 0, 0, 0, 0]
    assert found["cu_seqlens"].tolist() == [0, 1, 2, 3, 8, 10, 10]
    assert found["context_lens"].tolist() == [5, 0, 0, 6, 2, 0]
    assert found["token_ids"].tolist()[3:] == [501, 502, 503, 504, 505, 100, 101, 0, 0, 0]
    assert found["slot_mapping"].tolist() == [
        *(1 * 4 + 0, -1, -1),
        *(9 * 4 + 1, 9 * 4 + 2, 9 * 4 + 3, 8 * 4, 8 * 4 + 1, 6 * 4, 6 * 4 + 1, -1, -1, -1),
    ]
    assert found["is_image"].tolist() == [0] * 3 + [0, 0, 1, 1, 1, 0, 0, 0, 0, 0]
    assert found["chunk_slots"].tolist() == [5, 1, pad]
    assert found["block_tables"].tolist() == [[9, 8, 0, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0, 0], [0] * 7]
    assert np.array_equal(found["positions"][:, :1], batch.positions[:, :1])
    assert np.array_equal(found["positions"][:, 3:10], batch.positions[:, 1:])
    assert not (inputs.buffer == -77).any()
    slots.learn(batch.sample_slots, batch.sample_admissions, np.array([43, 44]))
    decodes = build_batch(StepPlan(3, (), (), (StepRow(2, 5, 1, (), True),)), slots, 2)
    inputs.fill(decodes)  # nothing of the step before is left
    assert (found["slots"][0], found["output_positions"][0], found["context_lens"][0]) == (2, 2, 6)
    assert (found["slot_mapping"][0], found["positions"][:, 0].tolist()) == (1 * 4 + 1, [5, 5, 5])
    for name in ("slots", "output_positions", "context_lens", "slot_mapping"):
        found[name][0] = views(padding.numpy(), input_shapes(SHAPE, NUM_COLUMNS))[name][0]
    found["positions"][:, 0] = 0
    assert torch.equal(inputs.buffer, padding)


def test_shapes_hold_every_number_of_running_requests_and_no_more() -> None:
    for max_num_seqs in (1, 3, 16, 64, 100, 256):
        shapes = step_shapes(max_num_seqs, 2048)
        assert max(shape.num_decodes for shape in shapes) == max_num_seqs
        assert len(set(shapes)) == len(shapes)
        decodes = [shape.num_decodes for shape in shapes if not shape.num_tokens]
        assert decodes == sorted(decodes)
    assert all(shape.num_tokens <= 100 for shape in step_shapes(8, 100))
