"""RMSNorm with one program per row, which stays in registers between its passes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmrt.kernels.triton.compile_spec import CompileSpec
from vlmrt.kernels.triton.overlap import overlap
from vlmrt.kernels.triton.rows import as_rows, row_block


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,  # None: nothing is added and no sum is written
    weight_ptr,
    shift_ptr,  # None: nothing is added
    out_ptr,
    sum_ptr,
    x_stride,
    residual_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    # Loads stay in this order: what comes from HBM is on its way while the row is waited for.
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + column, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * WIDTH + column, rounded, mask=inside)
        x = rounded.to(tl.float32)
    if shift_ptr is not None:
        x += shift
    normed = x * tl.rsqrt(tl.sum(x * x) / WIDTH + eps) * weight.to(tl.float32)
    tl.store(out_ptr + row * WIDTH + column, normed.to(out_ptr.dtype.element_ty), mask=inside)


def _normed(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, shift: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(the norm, the sum of x and the residual; None without one)."""
    rows = as_rows(x)
    residual_rows = None if residual is None else as_rows(residual)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(out)
    width = x.shape[-1]
    block, num_warps = row_block(width)
    _rms_norm_kernel[(rows.shape[0],)](
        rows,
        residual_rows,
        weight,
        shift,
        out,
        total,
        rows.stride(0),
        0 if residual_rows is None else residual_rows.stride(0),
        eps,
        width,
        block,
        num_warps=num_warps,
        **overlap(x.device),
    )
    return out, total


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float, shift: Tensor | None = None) -> Tensor:
    return _normed(x, None, weight, eps, shift)[0]


def add_rms_norm_triton(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, total = _normed(x, residual, weight, eps, None)
    assert total is not None
    return out, total


def compile_specs() -> list[CompileSpec]:
    specs = []
    pointers = dict.fromkeys(("x_ptr", "weight_ptr", "out_ptr"), "*bf16")
    scalars = {"x_stride": "i32:16", "eps": "fp32"}
    alone: dict[str, object] = {"residual_ptr": None, "sum_ptr": None, "residual_stride": 0}
    added = {"residual_ptr": "*bf16", "sum_ptr": "*bf16", "residual_stride": "i32:16"}
    for width in (1536, 3584, 8192):
        block, num_warps = row_block(width)
        shape: dict[str, object] = {"WIDTH": width, "BLOCK": block, "shift_ptr": None}
        specs += [
            CompileSpec(f"rms_norm {width}", _rms_norm_kernel, pointers | scalars, shape | alone, num_warps, 3),
            CompileSpec(f"add_rms_norm {width}", _rms_norm_kernel, pointers | scalars | added, shape, num_warps, 3),
        ]
    block, num_warps = row_block(1280)
    shape = {"WIDTH": 1280, "BLOCK": block} | alone
    signature = pointers | scalars | {"shift_ptr": "*fp32"}
    return [*specs, CompileSpec("rms_norm 1280 with shift", _rms_norm_kernel, signature, shape, num_warps, 3)]
