"""Paged attention of prefill chunks on the GPU: the tiles of each chunk are found on the device."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmrt.kernels.paged_attention import PagedBatch
from vlmrt.kernels.triton.attend import (
    COMMON_SIGNATURE,
    MAX_GROUP,
    NOTHING_SEEN,
    attend,
    blocks,
    num_sms,
    served_constants,
)
from vlmrt.kernels.triton.compile_spec import CompileSpec


class PrefillTiling(NamedTuple):
    block_m: int  # rows: query tokens x the query heads of one KV head
    block_n: int
    num_warps: int
    num_stages: int


WIDE = PrefillTiling(block_m=128, block_n=64, num_warps=8, num_stages=3)
NARROW = PrefillTiling(block_m=64, block_n=64, num_warps=4, num_stages=3)  # while the wide tiles do not fill the GPU
EXACT = PrefillTiling(block_m=MAX_GROUP, block_n=32, num_warps=8, num_stages=1)  # float32: no tensor cores


@triton.jit(do_not_specialize=["table_stride", "num_decodes", "num_prefills", "num_rows"])
def _prefill_kernel(
    q,
    k_cache,
    v_cache,
    cu_seqlens,
    context_lens,
    block_tables,
    out,
    score_scale,
    table_stride,
    num_decodes,
    num_prefills,
    num_rows,
    Q_ROW_STRIDE: tl.constexpr,
    Q_HEAD_STRIDE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    KV_HEAD_STRIDE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_M // GROUP tokens of one sequence, for the query heads of one KV head.

    Sequence s, counted from the first that is not a decode row, has its tiles from
    (tokens before it) // tokens_per_tile + s on: at least as many as it needs, known without its length. The rows of
    padding are one more sequence, without context.
    """
    TILE_TOKENS: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # late tiles of a sequence have the most keys: start them first
    low = 0
    high = num_prefills
    while low < high:
        middle = (low + high + 1) // 2
        tokens_before = tl.load(cu_seqlens + num_decodes + middle) - num_decodes
        if tokens_before // TILE_TOKENS + middle <= tile:
            low = middle
        else:
            high = middle - 1
    sequence = num_decodes + low
    start = tl.load(cu_seqlens + sequence)
    stop = tl.load(cu_seqlens + sequence + 1, mask=low < num_prefills, other=num_rows)
    context = tl.load(context_lens + sequence, mask=low < num_prefills, other=0)
    first_token = start + (tile - (start - num_decodes) // TILE_TOKENS - low) * TILE_TOKENS
    if first_token >= stop:
        return

    row = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    token = first_token + row // GROUP
    head = kv_head * GROUP + row % GROUP
    in_tile = (row < TILE_TOKENS * GROUP) & (token < stop)
    inside = in_tile[:, None] & (dim < HEAD_DIM)[None, :]
    q_row = token.to(tl.int64) * Q_ROW_STRIDE + head * Q_HEAD_STRIDE
    queries = tl.load(q + q_row[:, None] + dim[None, :], mask=inside, other=0.0)

    query = context - stop + token  # the queries are the last tokens of their context
    first_query = context - stop + first_token
    end = context - stop + tl.minimum(first_token + TILE_TOKENS, stop)
    begin = 0
    masked_from = tl.maximum(first_query + 1, 0) // BLOCK_N * BLOCK_N  # every row sees all keys before
    if WINDOW > 0:
        begin = tl.maximum(first_query + 1 - WINDOW, 0)
        masked_from = begin // BLOCK_N * BLOCK_N
    k_head = k_cache + kv_head * KV_HEAD_STRIDE
    v_head = v_cache + kv_head * KV_HEAD_STRIDE
    block_table = block_tables + sequence.to(tl.int64) * table_stride
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], NOTHING_SEEN, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    block = blocks(block_table, begin // BLOCK_N * BLOCK_N, end, BLOCK_SIZE, BLOCK_N)
    if WINDOW == 0:
        for first_key in range(0, masked_from, BLOCK_N):
            next_block = blocks(block_table, first_key + BLOCK_N, end, BLOCK_SIZE, BLOCK_N)
            acc, peak, total = attend(
                acc,
                peak,
                total,
                queries,
                query,
                first_key,
                begin,
                end,
                block,
                k_head,
                v_head,
                score_scale,
                False,
                WINDOW,
                BLOCK_STRIDE,
                SLOT_STRIDE,
                BLOCK_SIZE,
                HEAD_DIM,
                BLOCK_D,
                BLOCK_N,
            )
            block = next_block
    for first_key in range(masked_from, end, BLOCK_N):
        next_block = blocks(block_table, first_key + BLOCK_N, end, BLOCK_SIZE, BLOCK_N)
        acc, peak, total = attend(
            acc,
            peak,
            total,
            queries,
            query,
            first_key,
            begin,
            end,
            block,
            k_head,
            v_head,
            score_scale,
            True,
            WINDOW,
            BLOCK_STRIDE,
            SLOT_STRIDE,
            BLOCK_SIZE,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_N,
        )
        block = next_block

    average = acc / tl.where(total > 0, total, 1.0)[:, None]
    out_row = token.to(tl.int64) * NUM_HEADS + head
    tl.store(out + out_row[:, None] * HEAD_DIM + dim[None, :], average.to(out.dtype.element_ty), mask=inside)


def choose_tiling(num_tokens: int, group: int, num_kv_heads: int, num_sms: int, dtype: torch.dtype) -> PrefillTiling:
    """num_tokens: of all prefill rows together, padding included."""
    if dtype == torch.float32:
        return EXACT
    return WIDE if num_tokens * group // WIDE.block_m * num_kv_heads >= num_sms else NARROW


def paged_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: PagedBatch,
    score_scale: float,
    out: Tensor,
    constants: dict[str, int],
) -> None:
    num_rows, num_kv_heads, group = q.shape[0], k_cache.shape[2], constants["GROUP"]
    num_tokens = num_rows - batch.num_decodes
    num_prefills = batch.context_lens.shape[0] - batch.num_decodes
    tiling = choose_tiling(num_tokens, group, num_kv_heads, num_sms(q.device), q.dtype)
    num_tiles = num_tokens // (tiling.block_m // group) + num_prefills + 1  # one more sequence: the padding
    _prefill_kernel[(num_kv_heads, num_tiles)](
        q,
        k_cache,
        v_cache,
        batch.cu_seqlens,
        batch.context_lens,
        batch.block_tables,
        out,
        score_scale,
        batch.block_tables.stride(0),
        batch.num_decodes,
        num_prefills,
        num_rows,
        **constants,
        BLOCK_M=tiling.block_m,
        BLOCK_N=tiling.block_n,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )


def compile_specs() -> list[CompileSpec]:
    """Both models in bfloat16, both tilings."""
    counts = {"cu_seqlens": "*i32", **dict.fromkeys(("num_decodes", "num_prefills", "num_rows"), "i32")}
    return [
        CompileSpec(
            f"paged_attention_prefill_{model}_{tiling.block_m}",
            _prefill_kernel,
            {**COMMON_SIGNATURE, **counts},
            {**constants, "BLOCK_M": tiling.block_m, "BLOCK_N": tiling.block_n},
            tiling.num_warps,
            tiling.num_stages,
        )
        for model, constants in served_constants().items()
        for tiling in (WIDE, NARROW)
    ]
