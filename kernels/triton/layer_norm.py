"""LayerNorm with one program per row, which stays in registers between its passes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmrt.kernels.triton.compile_spec import CompileSpec
from vlmrt.kernels.triton.rows import as_rows, row_block


@triton.jit
def _layer_norm_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    shift_ptr,  # None: nothing is added
    out_ptr,
    x_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    # Loads stay in this order: these are on their way while the row, which is needed first, is waited for.
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + column, mask=inside, other=0.0)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        x += shift
    centred = tl.where(inside, x - tl.sum(x) / WIDTH, 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred) / WIDTH + eps)
    normed = centred * inverse * weight + bias
    tl.store(out_ptr + row * WIDTH + column, normed.to(out_ptr.dtype.element_ty), mask=inside)


def layer_norm_triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float, shift: Tensor | None = None) -> Tensor:
    rows = as_rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width = x.shape[-1]
    block, num_warps = row_block(width)
    _layer_norm_kernel[(rows.shape[0],)](
        rows, weight, bias, shift, out, rows.stride(0), eps, width, block, num_warps=num_warps
    )
    return out


def compile_specs() -> list[CompileSpec]:
    pointers = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "out_ptr"), "*bf16") | {"shift_ptr": "*fp32"}
    scalars = {"x_stride": "i32:16", "eps": "fp32"}
    block, num_warps = row_block(1280)
    shape: dict[str, object] = {"WIDTH": 1280, "BLOCK": block}
    return [CompileSpec("layer_norm 1280 with shift", _layer_norm_kernel, pointers | scalars, shape, num_warps, 3)]
