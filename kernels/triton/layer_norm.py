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
    residual_ptr,  # None: nothing is added and no sum is written
    weight_ptr,
    bias_ptr,
    out_ptr,
    sum_ptr,
    x_stride,
    residual_stride,
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
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * WIDTH + column, rounded, mask=inside)
        x = rounded.to(tl.float32)
    centred = tl.where(inside, x - tl.sum(x) / WIDTH, 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred) / WIDTH + eps)
    normed = centred * inverse * weight + bias
    tl.store(out_ptr + row * WIDTH + column, normed.to(out_ptr.dtype.element_ty), mask=inside)


def _normed(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor | None]:
    """(the norm, the sum that it is of; None without a residual)."""
    rows = as_rows(x)
    residual_rows = None if residual is None else as_rows(residual)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(out)
    width = x.shape[-1]
    block, num_warps = row_block(width)
    _layer_norm_kernel[(rows.shape[0],)](
        rows,
        residual_rows,
        weight,
        bias,
        out,
        total,
        rows.stride(0),
        0 if residual_rows is None else residual_rows.stride(0),
        eps,
        width,
        block,
        num_warps=num_warps,
    )
    return out, total


def layer_norm_triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return _normed(x, None, weight, bias, eps)[0]


def add_layer_norm_triton(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    out, total = _normed(x, residual, weight, bias, eps)
    assert total is not None
    return out, total


def compile_specs() -> list[CompileSpec]:
    pointers = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "out_ptr"), "*bf16")
    scalars = {"x_stride": "i32:16", "eps": "fp32"}
    block, num_warps = row_block(1280)
    shape: dict[str, object] = {"WIDTH": 1280, "BLOCK": block}
    alone: dict[str, object] = {"residual_ptr": None, "sum_ptr": None, "residual_stride": 0}
    added = {"residual_ptr": "*bf16", "sum_ptr": "*bf16", "residual_stride": "i32:16"}
    return [
        CompileSpec("layer_norm 1280", _layer_norm_kernel, pointers | scalars, shape | alone, num_warps, 3),
        CompileSpec("add_layer_norm 1280", _layer_norm_kernel, pointers | scalars | added, shape, num_warps, 3),
    ]
