"""One launch for the inputs of a decode step; see kernels/decode_inputs.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmrt.kernels.triton.compile_spec import CompileSpec
from vlmrt.kernels.triton.overlap import overlap

TILE = 128  # table entries that a program moves at once


@triton.jit
def _decode_inputs(
    slots_ptr,
    context_lens_ptr,
    slot_mapping_ptr,
    last_tokens_ptr,
    tables_ptr,
    token_ids_ptr,
    lens_ptr,
    block_tables_ptr,
    num_columns,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    context = tl.load(context_lens_ptr + row)
    mapping = tl.load(slot_mapping_ptr + row)
    tl.store(token_ids_ptr + row, tl.load(last_tokens_ptr + slot))
    tl.store(lens_ptr + row, context.to(tl.int32))
    num_used = (context + BLOCK_SIZE - 1) // BLOCK_SIZE
    block = (mapping // BLOCK_SIZE).to(tl.int32)
    for first in range(0, num_used, TILE):
        column = first + tl.arange(0, TILE)
        used = column < num_used
        value = tl.load(tables_ptr + slot * num_columns + column, mask=used, other=0)
        value = tl.where((column == num_used - 1) & (mapping >= 0), block, value)
        tl.store(block_tables_ptr + row * num_columns + column, value, mask=used)
    tl.store(tables_ptr + slot * num_columns + num_used - 1, block, mask=mapping >= 0)


def decode_inputs(
    slots: Tensor, context_lens: Tensor, slot_mapping: Tensor, last_tokens: Tensor, tables: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As vlmrt.kernels.decode_inputs.decode_inputs."""
    rows, columns = slots.shape[0], tables.shape[1]
    token_ids = torch.empty_like(slots)
    lens = torch.empty(rows, dtype=torch.int32, device=slots.device)
    block_tables = torch.empty(rows, columns, dtype=torch.int32, device=slots.device)
    if rows:
        _decode_inputs[(rows,)](
            slots,
            context_lens,
            slot_mapping,
            last_tokens,
            tables,
            token_ids,
            lens,
            block_tables,
            columns,
            BLOCK_SIZE=block_size,
            TILE=TILE,
            num_warps=1,
            **overlap(slots.device),
        )
    return token_ids, lens, block_tables


def compile_specs() -> list[CompileSpec]:
    pointers = dict.fromkeys(("slots_ptr", "context_lens_ptr", "slot_mapping_ptr", "last_tokens_ptr"), "*i64")
    signature = {
        **pointers,
        "tables_ptr": "*i32",
        "token_ids_ptr": "*i64",
        "lens_ptr": "*i32",
        "block_tables_ptr": "*i32",
        "num_columns": "i32",
    }
    return [CompileSpec("decode_inputs", _decode_inputs, signature, {"BLOCK_SIZE": 16, "TILE": TILE}, 1, 3)]
