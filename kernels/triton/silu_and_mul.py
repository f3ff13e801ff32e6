"""The SwiGLU gate over blocks of a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmrt.kernels.triton.compile_spec import CompileSpec
from vlmrt.kernels.triton.overlap import overlap
from vlmrt.kernels.triton.rows import as_rows

BLOCK = 1024
NUM_WARPS = 4


# Width and stride are constants of a model. Known to the compiler, a width like 3420, a multiple of 4 and not of 16,
# still gets loads of 8 bytes; an argument would get loads of 2.
@triton.jit
def _silu_and_mul_kernel(
    gate_up_ptr,
    out_ptr,
    ROW_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    column = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate = tl.load(gate_up_ptr + row * ROW_STRIDE + column, mask=inside).to(tl.float32)
    up = tl.load(gate_up_ptr + row * ROW_STRIDE + WIDTH + column, mask=inside).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * WIDTH + column, out.to(out_ptr.dtype.element_ty), mask=inside)


def silu_and_mul_triton(gate_up: Tensor) -> Tensor:
    rows = as_rows(gate_up)
    num_rows, width = rows.shape[0], rows.shape[1] // 2
    out = torch.empty(*gate_up.shape[:-1], width, dtype=gate_up.dtype, device=gate_up.device)
    grid = (num_rows * triton.cdiv(width, BLOCK),)
    options = overlap(rows.device)
    _silu_and_mul_kernel[grid](rows, out, rows.stride(0), width, BLOCK, num_warps=NUM_WARPS, **options)
    return out


def compile_specs() -> list[CompileSpec]:
    signature = {"gate_up_ptr": "*bf16", "out_ptr": "*bf16"}
    return [
        CompileSpec(
            f"silu_and_mul {width}",
            _silu_and_mul_kernel,
            signature,
            {"ROW_STRIDE": 2 * width, "WIDTH": width, "BLOCK": BLOCK},
            NUM_WARPS,
            3,
        )
        for width in (8960, 3420)
    ]
