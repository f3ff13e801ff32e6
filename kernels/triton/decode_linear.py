"""Products of a few rows with a weight that is streamed once: on CUDA cores for 1 or 2 rows, else on tensor cores.

A program asks for its weight before it waits for the kernel in front (overlap.py).
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmrt.kernels.triton.compile_spec import CompileSpec
from vlmrt.kernels.triton.overlap import overlap

MAX_ROWS = 64
MAX_VECTOR_ROWS = 2  # those of vector_kernel
VECTOR = tl.constexpr(8)  # 16 bytes of bfloat16, the widest load


class Tiling(NamedTuple):
    """What a program takes: tile_n weight rows (of each half, where gated), tile_k columns at a time."""

    tile_n: int
    tile_k: int
    num_warps: int
    num_stages: int = 1  # of tensor_kernel; vector_kernel has two, in registers


@triton.jit(do_not_specialize=["num_columns"])
def vector_kernel(
    x,
    weight,
    out,
    num_columns,
    K,
    x_stride,
    ROWS: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    # loads are [rows, TILE_K], products [ROWS, TILE_N, TILE_K / VECTOR, VECTOR]: with TILE_K = 256 num_warps a thread
    # holds one vector of every row, so that all have one layout and threads exchange sums only once, at the end
    VECTORS: tl.constexpr = TILE_K // VECTOR
    rows = tl.arange(0, ROWS)
    columns = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    offsets_k = tl.arange(0, TILE_K)

    of_weight = weight + tl.minimum(columns, num_columns - 1).to(tl.int64)[:, None] * K + offsets_k[None, :]
    of_up = of_weight + num_columns.to(tl.int64) * K
    inside = (offsets_k < K)[None, :]
    w = tl.load(of_weight, mask=inside, other=0.0, eviction_policy="evict_first")
    up = w
    if GATED:
        up = tl.load(of_up, mask=inside, other=0.0, eviction_policy="evict_first")
    if PDL:
        tl.extra.cuda.gdc_wait()

    of_x = x + rows[:, None] * x_stride + offsets_k[None, :]
    chunk = tl.load(of_x, mask=inside, other=0.0)
    sums = tl.zeros((ROWS, TILE_N, VECTORS), tl.float32)
    up_sums = tl.zeros((ROWS, TILE_N, VECTORS), tl.float32)
    for k in range(0, K, TILE_K):
        k_next = k + TILE_K
        inside_next = (k_next + offsets_k < K)[None, :]
        w_next = tl.load(of_weight + k_next, mask=inside_next, other=0.0, eviction_policy="evict_first")
        up_next = w_next
        if GATED:
            up_next = tl.load(of_up + k_next, mask=inside_next, other=0.0, eviction_policy="evict_first")
        chunk_next = tl.load(of_x + k_next, mask=inside_next, other=0.0)
        values = tl.reshape(chunk.to(tl.float32), (ROWS, 1, VECTORS, VECTOR))
        sums += tl.sum(values * tl.reshape(w.to(tl.float32), (1, TILE_N, VECTORS, VECTOR)), axis=3)
        if GATED:
            up_sums += tl.sum(values * tl.reshape(up.to(tl.float32), (1, TILE_N, VECTORS, VECTOR)), axis=3)
        w = w_next
        up = up_next
        chunk = chunk_next
    product = tl.sum(sums, axis=2)
    if GATED:
        product = product * tl.sigmoid(product) * tl.sum(up_sums, axis=2)
    written = (columns < num_columns)[None, :]
    tl.store(out + rows[:, None] * num_columns + columns[None, :], product.to(out.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=["num_rows", "num_columns"])
def tensor_kernel(
    x,
    weight,
    out,
    num_rows,
    num_columns,
    K,
    x_stride,
    ROWS: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    rows = tl.arange(0, ROWS)
    in_batch = (rows < num_rows)[:, None]
    columns = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    offsets_k = tl.arange(0, TILE_K)

    of_weight = weight + tl.minimum(columns, num_columns - 1).to(tl.int64)[None, :] * K + offsets_k[:, None]
    of_up = of_weight + num_columns.to(tl.int64) * K
    if PDL:
        tl.extra.cuda.gdc_wait()

    of_x = x + rows[:, None] * x_stride + offsets_k[None, :]
    product = tl.zeros((ROWS, TILE_N), tl.float32)
    up_product = tl.zeros((ROWS, TILE_N), tl.float32)
    for k in range(0, K, TILE_K):
        if EVEN_K:
            chunk = tl.load(of_x + k, mask=in_batch, other=0.0, eviction_policy="evict_last")
            w = tl.load(of_weight + k, eviction_policy="evict_first")
        else:
            inside = k + offsets_k < K
            chunk = tl.load(of_x + k, mask=in_batch & inside[None, :], other=0.0, eviction_policy="evict_last")
            w = tl.load(of_weight + k, mask=inside[:, None], other=0.0, eviction_policy="evict_first")
        product = tl.dot(chunk, w, product, input_precision="ieee")
        if GATED:
            if EVEN_K:
                up = tl.load(of_up + k, eviction_policy="evict_first")
            else:
                up = tl.load(of_up + k, mask=(k + offsets_k < K)[:, None], other=0.0, eviction_policy="evict_first")
            up_product = tl.dot(chunk, up, up_product, input_precision="ieee")
    if GATED:
        product = product * tl.sigmoid(product) * up_product
    written = in_batch & (columns < num_columns)[None, :]
    tl.store(out + rows[:, None] * num_columns + columns[None, :], product.to(out.dtype.element_ty), mask=written)


def choose_tiling(num_rows: int, num_columns: int, is_gated: bool) -> Tiling:
    """Timed on an H100 over the shapes of Qwen2-VL 2B and 7B (benchmarks/results/2026-11-22-h100-kernels.md)."""
    if num_rows <= MAX_VECTOR_ROWS:
        if is_gated:
            return Tiling(4, 512, 2)
        if num_columns <= 2048:
            return Tiling(4, 2048, 8)
        if num_rows == 1:
            return Tiling(8, 1024, 4)
        return Tiling(4, 1024, 4) if num_columns <= 4096 else Tiling(8, 512, 2)
    if is_gated:  # us at 8 rows, of wide and narrow: 2B 22.6 and 23.4, 7B 96.5 and 95.3
        return Tiling(32, 256, 4, 3) if num_columns <= 2 * 8192 else Tiling(32, 128, 4, 4)
    return Tiling(64, 128, 4, 4) if num_rows <= 32 else Tiling(128, 64, 4, 5)


def decode_linear(x: Tensor, weight: Tensor, *, is_gated: bool = False, tiling: Tiling | None = None) -> Tensor:
    """As vlmrt.kernels.linear.linear, or gated_linear where is_gated, for 1 to MAX_ROWS rows."""
    num_rows, K = x.shape
    num_columns = weight.shape[0] // 2 if is_gated else weight.shape[0]
    assert 1 <= num_rows <= MAX_ROWS
    assert weight.is_contiguous()
    if x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty((num_rows, num_columns), dtype=x.dtype, device=x.device)
    if tiling is None:
        tiling = choose_tiling(num_rows, num_columns, is_gated)
    grid = (triton.cdiv(num_columns, tiling.tile_n),)
    constants: dict[str, object] = {"TILE_N": tiling.tile_n, "TILE_K": tiling.tile_k, "GATED": is_gated}
    options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages, **overlap(x.device)}
    if num_rows <= MAX_VECTOR_ROWS:
        vector_kernel[grid](x, weight, out, num_columns, K, x.stride(0), ROWS=num_rows, **constants, **options)
    else:
        constants |= {"ROWS": max(16, triton.next_power_of_2(num_rows)), "EVEN_K": K % tiling.tile_k == 0}
        tensor_kernel[grid](x, weight, out, num_rows, num_columns, K, x.stride(0), **constants, **options)
    return out


def compile_specs() -> list[CompileSpec]:
    pointers = dict.fromkeys(("x", "weight", "out"), "*bf16")
    sizes = {"num_rows": "i32", "num_columns": "i32", "K": "i32:16", "x_stride": "i32:16"}
    signature = {**pointers, **sizes}
    specs = []
    for num_rows, num_columns, is_gated in (
        *((1, 1536, False), (2, 1536, False), (1, 3584, False), (2, 3584, False), (2, 152064, False)),
        *((1, 8960, True), (2, 8960, True)),
        *((num_rows, 152064, False) for num_rows in (16, 32, 64)),
        (16, 8960, True),
        *((num_rows, 18944, True) for num_rows in (16, 32, 64)),
    ):
        tiling = choose_tiling(num_rows, num_columns, is_gated)
        constants = {"ROWS": num_rows, "TILE_N": tiling.tile_n, "TILE_K": tiling.tile_k, "GATED": is_gated}
        kernel = vector_kernel if num_rows <= MAX_VECTOR_ROWS else tensor_kernel
        specs.append(
            CompileSpec(
                f"decode_linear {'gated ' if is_gated else ''}{num_rows} {num_columns}",
                kernel,
                {name: kind for name, kind in signature.items() if name in kernel.arg_names},
                constants if kernel is vector_kernel else {**constants, "EVEN_K": True},
                tiling.num_warps,
                tiling.num_stages,
            )
        )
    return specs
