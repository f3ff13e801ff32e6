# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Triton kernels of the products of a few rows with a weight that is streamed once.

Two ways to multiply: on CUDA cores for up to 4 rows (registers hold the next chunk of weight while one is multiplied),
on tensor cores with the rows padded to 16, 32 or 64 (chunks of weight go through shared memory, num_stages deep). Both
may share out K among programs; the last of a tile to arrive adds the parts in their order, so that no run differs.

Programmatic dependent launch: a program asks for its weight before it waits for the kernel in front of it. The weight
must therefore be older than that kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 64
MAX_VECTOR_ROWS = 4
MAX_SPLITS = tl.constexpr(8)
MAX_GATHERED = tl.constexpr(1024)  # values of a tile up to which 8 parts of it fit in registers
VECTOR = tl.constexpr(8)  # 16 bytes of bfloat16, the widest load
LINE = tl.constexpr(64)  # bfloat16 values of a cache line


class Config(NamedTuple):
    """How one product is cut: tile_n weight rows (of each half, where gated) and tile_k columns at a time."""

    tensor_cores: bool
    tile_n: int
    tile_k: int
    num_splits: int
    num_warps: int
    num_stages: int = 1
    prefetch_k: int = 0  # columns whose lines are asked into L2 before the kernel in front has ended


@triton.jit
def _prefetch(weight, columns, K, k_begin, k_end, TILE_N: tl.constexpr, PREFETCH_K: tl.constexpr):
    k = k_begin + tl.arange(0, PREFETCH_K // LINE) * LINE
    lines = weight + columns.to(tl.int64)[:, None] * K + tl.minimum(k, k_end - 1)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [lines.to(tl.int64, bitcast=True)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _inverse_rms(x, num_rows, K, x_stride, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.arange(0, ROWS)
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for k in range(0, K, BLOCK):
        columns = k + tl.arange(0, BLOCK)
        inside = (rows < num_rows)[:, None] & (columns < K)[None, :]
        values = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        squares += values * values
    return tl.rsqrt(tl.sum(squares, axis=1) / K + eps)


@triton.jit
def _write(
    first,
    second,
    out,
    residual,
    rows,
    columns,
    inside,
    num_columns,
    residual_stride,
    GATED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    dtype = out.dtype.element_ty
    if GATED:
        first = first / (1 + tl.exp(-first)) * second
    if HAS_RESIDUAL:
        added = tl.load(residual + rows[:, None] * residual_stride + columns[None, :], mask=inside, other=0.0)
        first = first.to(dtype).to(tl.float32) + added.to(tl.float32)
    tl.store(out + rows[:, None] * num_columns + columns[None, :], first.to(dtype), mask=inside)


@triton.jit
def _finish(
    first,
    second,
    out,
    residual,
    partials,
    semaphores,
    num_rows,
    num_columns,
    residual_stride,
    num_splits,
    ROWS: tl.constexpr,
    TILE_N: tl.constexpr,
    SPLIT: tl.constexpr,
    GATED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Writes first and second, float32 [ROWS, TILE_N] (second is for gated), or leaves them to the last of the tile."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    rows = tl.arange(0, ROWS)
    offsets_n = tl.arange(0, TILE_N)
    columns = tile * TILE_N + offsets_n
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    if SPLIT:
        HALVES: tl.constexpr = 2 if GATED else 1
        SIZE: tl.constexpr = ROWS * TILE_N
        offsets = rows[:, None] * TILE_N + offsets_n[None, :]
        of_tile = partials + tile.to(tl.int64) * num_splits * (HALVES * SIZE) + offsets
        tl.store(of_tile + split * (HALVES * SIZE), first, mask=inside)
        if GATED:
            tl.store(of_tile + split * (HALVES * SIZE) + SIZE, second, mask=inside)
        tl.debug_barrier()  # every thread's part is written before one of them says so
        arrived = tl.atomic_add(semaphores + tile, 1, sem="acq_rel", scope="gpu")
        if arrived == num_splits - 1:
            first = tl.zeros((ROWS, TILE_N), tl.float32)
            second = tl.zeros((ROWS, TILE_N), tl.float32)
            if SIZE <= MAX_GATHERED:
                for part in tl.static_range(MAX_SPLITS):  # all loads in flight at once
                    at = of_tile + part * (HALVES * SIZE)
                    written = inside & (tl.full((1, 1), part, tl.int32) < num_splits)
                    first += tl.load(at, mask=written, other=0.0, cache_modifier=".cg")
                    if GATED:
                        second += tl.load(at + SIZE, mask=written, other=0.0, cache_modifier=".cg")
            else:
                for part in range(num_splits):
                    at = of_tile + part * (HALVES * SIZE)
                    first += tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
                    if GATED:
                        second += tl.load(at + SIZE, mask=inside, other=0.0, cache_modifier=".cg")
            _write(
                first, second, out, residual, rows, columns, inside, num_columns, residual_stride, GATED, HAS_RESIDUAL
            )
            tl.store(semaphores + tile, 0)
    else:
        _write(first, second, out, residual, rows, columns, inside, num_columns, residual_stride, GATED, HAS_RESIDUAL)


@triton.jit(do_not_specialize=["num_rows", "num_columns", "num_splits"])
def vector_kernel(
    x,
    weight,
    out,
    residual,
    norm_weight,
    partials,
    semaphores,
    num_rows,
    num_columns,
    K,
    x_stride,
    residual_stride,
    num_splits,
    eps,
    ROWS: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    PREFETCH_K: tl.constexpr,
    SPLIT: tl.constexpr,
    GATED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    # loads are [rows, TILE_K], products [ROWS, TILE_N, TILE_K / VECTOR, VECTOR]: with TILE_K = 256 num_warps a thread
    # holds one vector of every row, so that all have one layout and threads exchange sums only once, at the end
    VECTORS: tl.constexpr = TILE_K // VECTOR
    rows = tl.arange(0, ROWS)
    in_batch = (rows < num_rows)[:, None]
    columns = tl.minimum(tl.program_id(0) * TILE_N + tl.arange(0, TILE_N), num_columns - 1)
    offsets_k = tl.arange(0, TILE_K)
    k_per_split = tl.cdiv(tl.cdiv(K, TILE_K), num_splits) * TILE_K
    k_begin = tl.program_id(1) * k_per_split
    k_end = tl.minimum(k_begin + k_per_split, K)

    of_weight = weight + columns.to(tl.int64)[:, None] * K + offsets_k[None, :]
    of_up = of_weight + num_columns.to(tl.int64) * K
    if PREFETCH_K:
        _prefetch(weight, columns, K, k_begin, k_end, TILE_N, PREFETCH_K)
        if GATED:
            _prefetch(weight + num_columns.to(tl.int64) * K, columns, K, k_begin, k_end, TILE_N, PREFETCH_K)
    inside = (k_begin + offsets_k < k_end)[None, :]
    w = tl.load(of_weight + k_begin, mask=inside, other=0.0, eviction_policy="evict_first")
    up = w
    if GATED:
        up = tl.load(of_up + k_begin, mask=inside, other=0.0, eviction_policy="evict_first")
    if PDL:
        tl.extra.cuda.gdc_wait()

    of_x = x + rows[:, None] * x_stride + offsets_k[None, :]
    chunk = tl.load(of_x + k_begin, mask=inside & in_batch, other=0.0)
    if HAS_NORM:
        inverse_rms = _inverse_rms(x, num_rows, K, x_stride, eps, ROWS, TILE_K)[:, None]
    sums = tl.zeros((ROWS, TILE_N, VECTORS), tl.float32)
    up_sums = tl.zeros((ROWS, TILE_N, VECTORS), tl.float32)
    for k in range(k_begin, k_end, TILE_K):
        k_next = k + TILE_K
        inside_next = (k_next + offsets_k < k_end)[None, :]
        w_next = tl.load(of_weight + k_next, mask=inside_next, other=0.0, eviction_policy="evict_first")
        up_next = w_next
        if GATED:
            up_next = tl.load(of_up + k_next, mask=inside_next, other=0.0, eviction_policy="evict_first")
        chunk_next = tl.load(of_x + k_next, mask=inside_next & in_batch, other=0.0)
        values = chunk.to(tl.float32)
        if HAS_NORM:
            scale = tl.load(norm_weight + k + offsets_k, mask=k + offsets_k < k_end, other=0.0).to(tl.float32)
            values = (values * inverse_rms * scale[None, :]).to(chunk.dtype).to(tl.float32)
        values = tl.reshape(values, (ROWS, 1, VECTORS, VECTOR))
        sums += tl.sum(values * tl.reshape(w.to(tl.float32), (1, TILE_N, VECTORS, VECTOR)), axis=3)
        if GATED:
            up_sums += tl.sum(values * tl.reshape(up.to(tl.float32), (1, TILE_N, VECTORS, VECTOR)), axis=3)
        w = w_next
        up = up_next
        chunk = chunk_next
    first = tl.sum(sums, axis=2)
    second = first
    if GATED:
        second = tl.sum(up_sums, axis=2)
    _finish(
        first,
        second,
        out,
        residual,
        partials,
        semaphores,
        num_rows,
        num_columns,
        residual_stride,
        num_splits,
        ROWS,
        TILE_N,
        SPLIT,
        GATED,
        HAS_RESIDUAL,
    )


@triton.jit(do_not_specialize=["num_rows", "num_columns", "num_splits"])
def tensor_kernel(
    x,
    weight,
    out,
    residual,
    norm_weight,
    partials,
    semaphores,
    num_rows,
    num_columns,
    K,
    x_stride,
    residual_stride,
    num_splits,
    eps,
    ROWS: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    PREFETCH_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,
    GATED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    rows = tl.arange(0, ROWS)
    in_batch = (rows < num_rows)[:, None]
    columns = tl.minimum(tl.program_id(0) * TILE_N + tl.arange(0, TILE_N), num_columns - 1)
    offsets_k = tl.arange(0, TILE_K)
    k_per_split = tl.cdiv(tl.cdiv(K, TILE_K), num_splits) * TILE_K
    k_begin = tl.program_id(1) * k_per_split
    k_end = tl.minimum(k_begin + k_per_split, K)

    of_weight = weight + columns.to(tl.int64)[None, :] * K + offsets_k[:, None]
    of_up = of_weight + num_columns.to(tl.int64) * K
    if PREFETCH_K:
        _prefetch(weight, columns, K, k_begin, k_end, TILE_N, PREFETCH_K)
        if GATED:
            _prefetch(weight + num_columns.to(tl.int64) * K, columns, K, k_begin, k_end, TILE_N, PREFETCH_K)
    if PDL:
        tl.extra.cuda.gdc_wait()

    of_x = x + rows[:, None] * x_stride + offsets_k[None, :]
    if HAS_NORM:
        inverse_rms = _inverse_rms(x, num_rows, K, x_stride, eps, ROWS, TILE_K)[:, None]
    sums = tl.zeros((ROWS, TILE_N), tl.float32)
    up_sums = tl.zeros((ROWS, TILE_N), tl.float32)
    for k in range(k_begin, k_end, TILE_K):
        if EVEN_K:
            chunk = tl.load(of_x + k, mask=in_batch, other=0.0, eviction_policy="evict_last")
            w = tl.load(of_weight + k, eviction_policy="evict_first")
        else:
            inside = k + offsets_k < k_end
            chunk = tl.load(of_x + k, mask=in_batch & inside[None, :], other=0.0, eviction_policy="evict_last")
            w = tl.load(of_weight + k, mask=inside[:, None], other=0.0, eviction_policy="evict_first")
        if HAS_NORM:
            scale = tl.load(norm_weight + k + offsets_k, mask=k + offsets_k < k_end, other=0.0).to(tl.float32)
            chunk = (chunk.to(tl.float32) * inverse_rms * scale[None, :]).to(w.dtype)
        sums = tl.dot(chunk, w, sums, input_precision="ieee")
        if GATED:
            if EVEN_K:
                up = tl.load(of_up + k, eviction_policy="evict_first")
            else:
                up = tl.load(of_up + k, mask=(k + offsets_k < k_end)[:, None], other=0.0, eviction_policy="evict_first")
            up_sums = tl.dot(chunk, up, up_sums, input_precision="ieee")
    _finish(
        sums,
        up_sums,
        out,
        residual,
        partials,
        semaphores,
        num_rows,
        num_columns,
        residual_stride,
        num_splits,
        ROWS,
        TILE_N,
        SPLIT,
        GATED,
        HAS_RESIDUAL,
    )


def choose_config(num_rows: int, num_columns: int, K: int, gated: bool) -> Config:
    if num_rows <= 2:
        return Config(False, 4, 1024, 1, 4)
    if num_columns <= 8192:
        return Config(True, 32, 128, min(4, triton.cdiv(K, 128)), 4, 4)
    return Config(True, 32, 128, 1, 4, 4)


def decode_linear(
    x: Tensor,
    weight: Tensor,
    semaphores: Tensor,
    *,
    gated: bool = False,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    config: Config | None = None,
) -> Tensor:
    num_rows, K = x.shape
    num_columns = weight.shape[0] // 2 if gated else weight.shape[0]
    out = torch.empty((num_rows, num_columns), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    if config is None:
        config = choose_config(num_rows, num_columns, K, gated)
    num_tiles = triton.cdiv(num_columns, config.tile_n)
    num_k_tiles = triton.cdiv(K, config.tile_k)
    num_splits = triton.cdiv(num_k_tiles, triton.cdiv(num_k_tiles, config.num_splits))  # none without a tile
    is_split = num_splits > 1
    rows = triton.next_power_of_2(num_rows) if not config.tensor_cores else max(16, triton.next_power_of_2(num_rows))
    partials = out
    if is_split:
        if num_tiles > semaphores.numel() or num_splits > MAX_SPLITS.value:
            raise ValueError(
                f"{num_tiles} tiles in {num_splits} splits, expected at most {semaphores.numel()} in {MAX_SPLITS.value}"
            )
        size = num_tiles * num_splits * (2 if gated else 1) * rows * config.tile_n
        partials = torch.empty(size, dtype=torch.float32, device=x.device)
    options: dict[str, object] = {}
    pdl = has_dependent_launch(x.device)
    if pdl:
        options["launch_pdl"] = True
    if config.tensor_cores:
        options["EVEN_K"] = K % config.tile_k == 0
    kernel = tensor_kernel if config.tensor_cores else vector_kernel
    kernel[(num_tiles, num_splits)](
        x,
        weight,
        out,
        out if residual is None else residual,
        weight if norm_weight is None else norm_weight,
        partials,
        semaphores,
        num_rows,
        num_columns,
        K,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        num_splits,
        eps,
        ROWS=rows,
        TILE_N=config.tile_n,
        TILE_K=config.tile_k,
        PREFETCH_K=config.prefetch_k if pdl else 0,
        SPLIT=is_split,
        GATED=gated,
        HAS_RESIDUAL=residual is not None,
        HAS_NORM=norm_weight is not None,
        PDL=pdl,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **options,
    )
    return out


def has_dependent_launch(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
