"""Image rows over placeholder rows, a block of a row per program."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vlmrt.kernels.triton.compile_spec import CompileSpec
from vlmrt.kernels.triton.rows import as_rows

BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def _embed_merge_kernel(
    hidden_ptr, rows_ptr, positions_ptr, hidden_stride, rows_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    column = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    position = tl.load(positions_ptr + row)
    values = tl.load(rows_ptr + row * rows_stride + column, mask=inside)
    tl.store(hidden_ptr + position * hidden_stride + column, values.to(hidden_ptr.dtype.element_ty), mask=inside)


def embed_merge_triton(hidden: Tensor, rows: Tensor, positions: Tensor) -> None:
    """hidden's columns must be side by side, since it is written in place."""
    assert hidden.stride(1) == 1
    rows = as_rows(rows)
    num_rows, width = rows.shape
    grid = (num_rows * triton.cdiv(width, BLOCK),)
    _embed_merge_kernel[grid](
        hidden, rows, positions, hidden.stride(0), rows.stride(0), width, BLOCK, num_warps=NUM_WARPS
    )


def compile_specs() -> list[CompileSpec]:
    pointers = {"hidden_ptr": "*bf16", "rows_ptr": "*bf16", "positions_ptr": "*i64"}
    signature = pointers | dict.fromkeys(("hidden_stride", "rows_stride"), "i32:16")
    shape = {"WIDTH": 1536, "BLOCK": BLOCK}
    return [CompileSpec("embed_merge 1536", _embed_merge_kernel, signature, shape, NUM_WARPS, 3)]
