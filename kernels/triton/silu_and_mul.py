"""The SwiGLU gate over blocks of a row."""

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
def _silu_and_mul_kernel(gate_up_ptr, out_ptr, row_stride, width, BLOCK: tl.constexpr):
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up_ptr + row * row_stride + column, mask=inside).to(tl.float32)
    up = tl.load(gate_up_ptr + row * row_stride + width + column, mask=inside).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=inside)


def silu_and_mul_triton(gate_up: Tensor) -> Tensor:
    rows = as_rows(gate_up)
    num_rows, width = rows.shape[0], rows.shape[1] // 2
    out = torch.empty(*gate_up.shape[:-1], width, dtype=gate_up.dtype, device=gate_up.device)
    grid = (num_rows * triton.cdiv(width, BLOCK),)
    _silu_and_mul_kernel[grid](rows, out, rows.stride(0), width, BLOCK, num_warps=NUM_WARPS)
    return out


def compile_specs() -> list[CompileSpec]:
    signature = {"gate_up_ptr": "*bf16", "out_ptr": "*bf16", "row_stride": "i32:16", "width": "i32:16"}
    return [CompileSpec("silu_and_mul", _silu_and_mul_kernel, signature, {"BLOCK": BLOCK}, NUM_WARPS, 3)]
