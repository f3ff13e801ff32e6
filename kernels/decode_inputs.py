"""The inputs of a decode step, from a few numbers per row and what the device knows of each slot."""

import torch
from torch import Tensor


def decode_inputs_reference(
    slots: Tensor, context_lens: Tensor, slot_mapping: Tensor, last_tokens: Tensor, tables: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    written = slot_mapping >= 0
    column = ((context_lens - 1) // block_size).clamp(min=0)
    old = tables[slots, column]
    tables[slots, column] = torch.where(written, slot_mapping // block_size, old.long()).to(tables.dtype)
    return last_tokens[slots], context_lens.to(torch.int32), tables[slots]


def decode_inputs(
    slots: Tensor, context_lens: Tensor, slot_mapping: Tensor, last_tokens: Tensor, tables: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(token_ids, context_lens, block_tables) of a step that runs one token of each row: its slot's last token.

    The block that a row writes to, slot_mapping // block_size, enters its slot's table first, so new blocks need no
    message of their own. Rows with slot_mapping -1 are padding; no two others have one slot.
    Shapes: slots, context_lens (tokens after this step) and slot_mapping int64 [B], last_tokens int64 [N], tables int32
    [N, M], changed in place -> int64 [B], int32 [B], int32 [B, M], whose entries past a row's last block are anything.
    """
    if slots.device.type == "cuda":
        from vlmrt.kernels.triton.decode_inputs import decode_inputs as launch

        return launch(slots, context_lens, slot_mapping, last_tokens, tables, block_size)
    return decode_inputs_reference(slots, context_lens, slot_mapping, last_tokens, tables, block_size)
