"""Quick GELU over blocks of a row, the bias added on the way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmrt.kernels.triton.compile_spec import CompileSpec
from vlmrt.kernels.triton.rows import as_rows

BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def _quick_gelu_kernel(x_ptr, bias_ptr, out_ptr, x_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    column = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    x = tl.load(x_ptr + row * x_stride + column, mask=inside).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + column, mask=inside).to(tl.float32)
    out = x * tl.sigmoid(1.702 * x)
    tl.store(out_ptr + row * WIDTH + column, out.to(out_ptr.dtype.element_ty), mask=inside)


def quick_gelu_triton(x: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = as_rows(x)
    num_rows, width = rows.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid = (num_rows * triton.cdiv(width, BLOCK),)
    _quick_gelu_kernel[grid](rows, bias, out, rows.stride(0), width, BLOCK, num_warps=NUM_WARPS)
    return out


def compile_specs() -> list[CompileSpec]:
    pointers = {"x_ptr": "*bf16", "out_ptr": "*bf16"}
    signature = pointers | {"bias_ptr": "*bf16", "x_stride": "i32:16"}
    shape = {"WIDTH": 5120, "BLOCK": BLOCK}
    return [CompileSpec("quick_gelu 5120 with bias", _quick_gelu_kernel, signature, shape, NUM_WARPS, 3)]
