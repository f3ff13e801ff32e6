"""Token ids, lengths and block tables of decode rows come from their slots, new blocks included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.places import ON_GPU
from vlmrt.kernels.decode_inputs import decode_inputs_reference
from vlmrt.kernels.triton.decode_inputs import decode_inputs

BLOCK_SIZE = 4
NUM_SLOTS = 7
NUM_COLUMNS = 300  # more than a program moves at once


def rows(contexts: list[int], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows of these lengths in slots of their own, the last of their blocks not yet in the tables; -1: padding."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(NUM_SLOTS, generator=generator)[: len(contexts)]
    last_tokens = torch.randint(0, 1000, (NUM_SLOTS + 1,), generator=generator)
    tables = torch.randint(0, 1000, (NUM_SLOTS + 1, NUM_COLUMNS), generator=generator, dtype=torch.int32)
    lens = torch.tensor(contexts, dtype=torch.int64)
    slot_mapping = torch.randint(0, 1000, (len(contexts),), generator=generator) * BLOCK_SIZE + (lens - 1) % BLOCK_SIZE
    slots[lens < 1] = NUM_SLOTS
    slot_mapping[lens < 1] = -1
    return slots, lens.clamp(min=0), slot_mapping, last_tokens, tables


@pytest.mark.parametrize("contexts", [[1], [4, 5, 8], [1200, 3, -1, 513, 512, -1], []])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_rows_get_their_slot_s_token_and_blocks(contexts: list[int], device: str) -> None:
    slots, lens, slot_mapping, last_tokens, tables = (x.to(device) for x in rows(contexts, len(contexts)))
    changed, expected = tables.clone(), tables.clone()
    for row, context in enumerate(contexts):
        if context > 0:
            expected[slots[row], (context - 1) // BLOCK_SIZE] = slot_mapping[row] // BLOCK_SIZE
    token_ids, context_lens, block_tables = decode_inputs(slots, lens, slot_mapping, last_tokens, changed, BLOCK_SIZE)
    assert torch.equal(token_ids, last_tokens[slots])
    assert context_lens.tolist() == [max(0, context) for context in contexts]
    assert torch.equal(changed, expected)
    for row, context in enumerate(contexts):
        num_blocks = -(-max(0, context) // BLOCK_SIZE)
        assert torch.equal(block_tables[row, :num_blocks], expected[slots[row], :num_blocks])
    found = decode_inputs_reference(slots, lens, slot_mapping, last_tokens, tables, BLOCK_SIZE)
    assert torch.equal(found[0], token_ids)
    assert torch.equal(found[1], context_lens)
    assert torch.equal(tables, expected)
