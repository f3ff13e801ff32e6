"""Attention within segments of a packed batch: online softmax over tiles, every mix of lengths in one launch.

A head is cut into a power of two and a rest (80 = 64 + 16): padded to 128, it would cost 1.6 times the products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmrt.kernels.triton.compile_spec import CompileSpec

LOG2_E = 1.4426950408889634
MIN_COLUMNS = 16  # fewest that tl.dot takes


class Launch(NamedTuple):
    """What the compiler may vary: keys per step, warps, and stages of the loads."""

    block_n: int
    num_warps: int
    num_stages: int


# By queries per program. At 64 keys a step the 128 queries' program stays under 128 registers, so that two share a
# multiprocessor and one multiplies while the other takes exponentials; at 128 keys (196 registers) it is alone.
LAUNCHES = {64: Launch(64, 4, 2), 128: Launch(64, 8, 3)}


@triton.jit
def _load(
    base, rows, stop, stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr
):
    """Columns [FIRST, FIRST + WIDTH) of rows of one head; rows from stop on are 0 where MASKED."""
    columns = FIRST + tl.arange(0, WIDTH)
    places = base + rows[:, None] * stride + columns[None, :]
    if FIRST + WIDTH > HEAD_DIM:
        loaded = tl.load(places, mask=(rows < stop)[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
    elif MASKED:
        loaded = tl.load(places, mask=(rows < stop)[:, None], other=0.0)
    else:
        loaded = tl.load(places)
    return loaded


@triton.jit
def _store(base, rows, stop, stride, values, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The counterpart of _load, for rows before stop."""
    columns = FIRST + tl.arange(0, WIDTH)
    places = base + rows[:, None] * stride + columns[None, :]
    inside = (rows < stop)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(places, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _step(
    q_main,
    q_rest,
    k,
    v,
    start,
    num_keys,
    k_stride,
    v_stride,
    top,
    total,
    main,
    rest,
    scale,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block of keys and values into the running maximum, sum and output."""
    rows = start + tl.arange(0, BLOCK_N)
    k_main = _load(k, rows, num_keys, k_stride, 0, MAIN, HEAD_DIM, MASKED)
    scores = tl.dot(q_main, tl.trans(k_main), input_precision="ieee")
    if REST > 0:
        k_rest = _load(k, rows, num_keys, k_stride, MAIN, REST, HEAD_DIM, MASKED)
        scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision="ieee")
    if MASKED:
        scores = tl.where((rows < num_keys)[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, 1)
    v_main = _load(v, rows, num_keys, v_stride, 0, MAIN, HEAD_DIM, MASKED)
    weights = weights.to(v_main.dtype)
    main = tl.dot(weights, v_main, main * shrink[:, None], input_precision="ieee")
    if REST > 0:
        v_rest = _load(v, rows, num_keys, v_stride, MAIN, REST, HEAD_DIM, MASKED)
        rest = tl.dot(weights, v_rest, rest * shrink[:, None], input_precision="ieee")
    return new_top, total, main, rest


@triton.jit
def _vision_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    tiles_ptr,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    out_stride,
    scale,  # of the scores, times log2(e)
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,  # 0: MAIN holds the head
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of queries of one head against all keys of its segment."""
    tile = tiles_ptr + tl.program_id(0) * 3
    head = tl.program_id(1)
    first_query = tl.load(tile).to(tl.int64)
    first_key = tl.load(tile + 1).to(tl.int64)
    stop = tl.load(tile + 2).to(tl.int64)
    num_queries = (stop - first_query).to(tl.int32)  # to the end of the segment, which may lie beyond the tile
    num_keys = (stop - first_key).to(tl.int32)
    q = q_ptr + first_query * q_stride + head * q_head_stride
    k = k_ptr + first_key * k_stride + head * k_head_stride
    v = v_ptr + first_key * v_stride + head * v_head_stride
    rows = tl.arange(0, BLOCK_M)
    q_main = _load(q, rows, num_queries, q_stride, 0, MAIN, HEAD_DIM, True)
    main = tl.zeros([BLOCK_M, MAIN], tl.float32)
    q_rest = q_main
    rest = main
    if REST > 0:
        q_rest = _load(q, rows, num_queries, q_stride, MAIN, REST, HEAD_DIM, True)
        rest = tl.zeros([BLOCK_M, REST], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    whole = num_keys // BLOCK_N * BLOCK_N
    for start in tl.range(0, whole, BLOCK_N):
        top, total, main, rest = _step(
            q_main,
            q_rest,
            k,
            v,
            start,
            num_keys,
            k_stride,
            v_stride,
            top,
            total,
            main,
            rest,
            scale,
            HEAD_DIM,
            MAIN,
            REST,
            BLOCK_N,
            False,
        )
    if whole < num_keys:
        top, total, main, rest = _step(
            q_main,
            q_rest,
            k,
            v,
            whole,
            num_keys,
            k_stride,
            v_stride,
            top,
            total,
            main,
            rest,
            scale,
            HEAD_DIM,
            MAIN,
            REST,
            BLOCK_N,
            True,
        )
    out = out_ptr + first_query * out_stride + head * HEAD_DIM
    _store(out, rows, num_queries, out_stride, main / total[:, None], 0, MAIN, HEAD_DIM)
    if REST > 0:
        _store(out, rows, num_queries, out_stride, rest / total[:, None], MAIN, REST, HEAD_DIM)


def head_parts(head_dim: int) -> tuple[int, int]:
    """Columns of a head in two powers of two, the second 0 where one holds all: 80 -> (64, 16), 20 -> (32, 0)."""
    main = max(MIN_COLUMNS, 1 << (head_dim.bit_length() - 1))
    if head_dim <= main:
        return main, 0
    rest = max(MIN_COLUMNS, 1 << (head_dim - main - 1).bit_length())
    return (2 * main, 0) if rest == main else (main, rest)


def vision_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, tile: int, scale: float, launch: Launch | None = None
) -> Tensor:
    """See vision_attention. tiles: tile_table for this tile; launch: in place of the one in LAUNCHES."""
    num_patches, num_heads, head_dim = q.shape
    out = torch.empty((num_patches, num_heads, head_dim), dtype=q.dtype, device=q.device)
    if not len(tiles):
        return out
    main, rest = head_parts(head_dim)
    block_n, num_warps, num_stages = launch or LAUNCHES[tile]
    _vision_attention_kernel[(len(tiles), num_heads)](
        q,
        k,
        v,
        out,
        tiles,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        out.stride(0),
        scale * LOG2_E,
        HEAD_DIM=head_dim,
        MAIN=main,
        REST=rest,
        BLOCK_M=tile,
        BLOCK_N=block_n,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return out


def compile_specs() -> list[CompileSpec]:
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16") | {"tiles_ptr": "*i32"}
    strides = ("q_stride", "q_head_stride", "k_stride", "k_head_stride", "v_stride", "v_head_stride", "out_stride")
    scalars = dict.fromkeys(strides, "i32:16") | {"scale": "fp32"}
    main, rest = head_parts(80)
    return [
        CompileSpec(
            f"vision_attention 80, {tile} queries",
            _vision_attention_kernel,
            pointers | scalars,
            {"HEAD_DIM": 80, "MAIN": main, "REST": rest, "BLOCK_M": tile, "BLOCK_N": launch.block_n},
            launch.num_warps,
            launch.num_stages,
        )
        for tile, launch in LAUNCHES.items()
    ]
