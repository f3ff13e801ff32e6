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


# By queries per program. 8 x 1,024 patches of 16 heads of 80 on an H100: 134 us and 135 us; 8 warps and 128 queries
# take 169, two stages 154 to 239. Whole blocks of keys in a loop of their own, without masks, and the rest behind it
# take 127, but Triton 3.6 compiles that to reads beyond the shared memory.
LAUNCHES = {64: Launch(64, 4, 3), 128: Launch(64, 4, 3)}


@triton.jit
def _load(base, rows, stop, stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Columns [FIRST, FIRST + WIDTH) of rows of one head; rows from stop on are 0, as are columns past the head."""
    columns = FIRST + tl.arange(0, WIDTH)
    places = base + rows[:, None] * stride + columns[None, :]
    mask = (rows < stop)[:, None]
    if FIRST + WIDTH > HEAD_DIM:
        mask = mask & (columns < HEAD_DIM)[None, :]
    return tl.load(places, mask=mask, other=0.0)


@triton.jit
def _store(base, rows, stop, stride, values, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The counterpart of _load, for rows before stop."""
    columns = FIRST + tl.arange(0, WIDTH)
    places = base + rows[:, None] * stride + columns[None, :]
    inside = (rows < stop)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(places, values.to(base.dtype.element_ty), mask=inside)


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
    q_main = _load(q, rows, num_queries, q_stride, 0, MAIN, HEAD_DIM)
    main = tl.zeros([BLOCK_M, MAIN], tl.float32)
    q_rest = q_main
    rest = main
    if REST > 0:
        q_rest = _load(q, rows, num_queries, q_stride, MAIN, REST, HEAD_DIM)
        rest = tl.zeros([BLOCK_M, REST], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(0, num_keys, BLOCK_N):
        rows_of_keys = start + tl.arange(0, BLOCK_N)
        k_main = _load(k, rows_of_keys, num_keys, k_stride, 0, MAIN, HEAD_DIM)
        scores = tl.dot(q_main, tl.trans(k_main), input_precision="ieee")
        if REST > 0:
            k_rest = _load(k, rows_of_keys, num_keys, k_stride, MAIN, REST, HEAD_DIM)
            scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision="ieee")
        scores = tl.where((rows_of_keys < num_keys)[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        v_main = _load(v, rows_of_keys, num_keys, v_stride, 0, MAIN, HEAD_DIM)
        weights = weights.to(v_main.dtype)
        main = tl.dot(weights, v_main, main * shrink[:, None], input_precision="ieee")
        if REST > 0:
            v_rest = _load(v, rows_of_keys, num_keys, v_stride, MAIN, REST, HEAD_DIM)
            rest = tl.dot(weights, v_rest, rest * shrink[:, None], input_precision="ieee")
        top = new_top
    out = out_ptr + first_query * out_stride + head * HEAD_DIM
    _store(out, rows, num_queries, out_stride, main / total[:, None], 0, MAIN, HEAD_DIM)
    if REST > 0:
        _store(out, rows, num_queries, out_stride, rest / total[:, None], MAIN, REST, HEAD_DIM)


def head_parts(head_dim: int) -> tuple[int, int]:
    """Columns of a head in one power of two, or two that it fills: 80 -> (64, 16), 72 -> (128, 0), 20 -> (32, 0).

    Triton 3.6 gives wrong results where the second part is padded (72 as 64 + 16).
    """
    main = max(MIN_COLUMNS, 1 << (head_dim.bit_length() - 1))
    rest = head_dim - main
    if rest <= 0:
        return main, 0
    return (main, rest) if rest >= MIN_COLUMNS and rest & (rest - 1) == 0 and rest < main else (2 * main, 0)


def vision_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, tile: int, scale: float, launch: Launch | None = None
) -> Tensor:
    """See vision_attention. tiles: tile_table for this tile; launch: in place of the one in LAUNCHES.

    Tiles of (n, n, n) are empty: they read and write nothing. Rows outside all tiles stay as torch.empty has them.
    """
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
