"""How a kernel sees a tensor as rows, and how many warps a row keeps busy."""

from __future__ import annotations

import triton
from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """x as [T, D] with neighbouring columns side by side; a copy only where no stride between rows describes it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def row_block(width: int) -> tuple[int, int]:
    """(block that holds a row, warps): 16 elements, two loads of 16 bytes in bfloat16, for each thread."""
    block: int = triton.next_power_of_2(width)
    return block, max(1, min(16, block // 512))
