"""Rotary tables, and the rotation of heads without a table-sized or head-sized intermediate."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmrt.kernels.triton.compile_spec import CompileSpec

HEADS = 8
ROTATE_WARPS = 2


# The strides of positions vary with the step's length: specialised, each kind of length would compile again.
@triton.jit(do_not_specialize=["component_stride", "token_stride"])
def _mrope_tables_kernel(
    positions_ptr,
    inverse_frequency_ptr,
    component_of_pair_ptr,
    cos_ptr,
    sin_ptr,
    component_stride,
    token_stride,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, BLOCK)
    inside = pair < HALF
    component = tl.load(component_of_pair_ptr + pair, mask=inside, other=0)
    position = tl.load(positions_ptr + component * component_stride + token * token_stride, mask=inside, other=0)
    angle = position.to(tl.float32) * tl.load(inverse_frequency_ptr + pair, mask=inside, other=0.0)
    cos, sin = tl.cos(angle), tl.sin(angle)
    first = token * 2 * HALF + pair
    tl.store(cos_ptr + first, cos, mask=inside)
    tl.store(cos_ptr + first + HALF, cos, mask=inside)
    tl.store(sin_ptr + first, -sin, mask=inside)
    tl.store(sin_ptr + first + HALF, sin, mask=inside)


def mrope_tables_triton(
    positions: Tensor, inverse_frequency: Tensor, component_of_pair: Tensor
) -> tuple[Tensor, Tensor]:
    num_tokens, half = positions.shape[1], inverse_frequency.shape[0]
    cos, sin = (torch.empty(num_tokens, 2 * half, dtype=torch.float32, device=positions.device) for _ in range(2))
    _mrope_tables_kernel[(num_tokens,)](
        positions,
        inverse_frequency,
        component_of_pair,
        cos,
        sin,
        *positions.stride(),
        half,
        triton.next_power_of_2(half),
        num_warps=2,
    )
    return cos, sin


@triton.jit
def _rotate_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    token_stride,
    head_stride,
    num_heads,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    tiles = tl.cdiv(num_heads, HEADS)
    token = (tl.program_id(0) // tiles).to(tl.int64)
    head = (tl.program_id(0) % tiles * HEADS + tl.arange(0, HEADS))[:, None]
    pair = tl.arange(0, BLOCK)[None, :]
    inside = (head < num_heads) & (pair < HALF)
    # The upper half of a table holds each pair's cosine and the sine with its own sign.
    table = token * 2 * HALF + HALF + pair
    cos = tl.load(cos_ptr + table, mask=pair < HALF, other=0.0)
    sin = tl.load(sin_ptr + table, mask=pair < HALF, other=0.0)
    source = x_ptr + token * token_stride + head * head_stride + pair
    low = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    target = out_ptr + (token * num_heads + head) * (2 * HALF) + pair
    dtype = out_ptr.dtype.element_ty
    tl.store(target, (low * cos - high * sin).to(dtype), mask=inside)
    tl.store(target + HALF, (high * cos + low * sin).to(dtype), mask=inside)


def rotate_triton(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    num_tokens, num_heads, head_dim = x.shape
    if x.stride(2) != 1:
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half = head_dim // 2
    _rotate_kernel[(num_tokens * triton.cdiv(num_heads, HEADS),)](
        x,
        cos,
        sin,
        out,
        x.stride(0),
        x.stride(1),
        num_heads,
        half,
        triton.next_power_of_2(half),
        HEADS,
        num_warps=ROTATE_WARPS,
    )
    return out


def compile_specs() -> list[CompileSpec]:
    tables = {"cos_ptr": "*fp32", "sin_ptr": "*fp32"}
    positions = {
        "positions_ptr": "*i64",
        "inverse_frequency_ptr": "*fp32",
        "component_of_pair_ptr": "*i64",
        "component_stride": "i32",
        "token_stride": "i32",
    }
    heads = {
        "x_ptr": "*bf16",
        "out_ptr": "*bf16",
        "token_stride": "i32:16",
        "head_stride": "i32:16",
        "num_heads": "i32:16",
    }
    vision = {"HALF": 40, "BLOCK": 64, "HEADS": HEADS}
    return [
        CompileSpec("mrope_tables 128", _mrope_tables_kernel, tables | positions, {"HALF": 64, "BLOCK": 64}, 2, 3),
        CompileSpec("rotate 80", _rotate_kernel, tables | heads, vision, ROTATE_WARPS, 3),
    ]
