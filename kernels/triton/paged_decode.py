"""Paged attention of decode rows on the GPU, each row's context split over programs.

The last program of a row and KV head to arrive combines the results of all, which another launch would take 2 to 3 us
for. Programs count their arrivals in zeros that all launches share, and the last one leaves a zero behind. Hence two
launches must not run side by side: those of one stream do not, nor do they where they overlap (overlap.py), since every
program waits for the kernels in front before it writes anything.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment"
from __future__ import annotations

import functools
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
from vlmrt.kernels.triton.overlap import overlap

PROGRAMS_PER_SM = 4
MAX_SPLITS = 64
VECTOR = tl.constexpr(4)  # 16 bytes of float32, the widest load


class DecodeTiling(NamedTuple):
    block_n: int
    num_warps: int
    num_stages: int
    usual_context: int  # tokens at which a decode step has one program with work for each SM


class Splits(NamedTuple):
    """How the context of a decode row is shared out."""

    num: int  # a power of two; more programs than have work where the context is short
    tokens_each: int  # a row takes another split for every so many tokens, as far as num goes


DECODE = DecodeTiling(block_n=64, num_warps=4, num_stages=2, usual_context=192)


@triton.jit
def _split_range(context, num_splits, tokens_each, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first key of the first split, tokens of a split) of a decode row, both multiples of BLOCK_N.

    A row of few tokens leaves splits without work. Where one takes the whole row, it writes the result itself.
    """
    first = context * 0
    if WINDOW > 0:
        first = tl.maximum(context - WINDOW, 0) // BLOCK_N * BLOCK_N
    num_used = tl.minimum(num_splits, tl.maximum(tl.cdiv(context - first, tokens_each), 1))
    return first, tl.cdiv(tl.cdiv(context - first, num_used), BLOCK_N) * BLOCK_N


@triton.jit
def _combine(
    partial_out,
    partial_lse,
    num_parts,
    out,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COMBINED: tl.constexpr,
):
    """Average of the splits of one row by their weights, for the query heads of one KV head.

    In the order of the splits, whichever program comes last. COMBINED splits are read at once, past the L1 cache: other
    multiprocessors have written them. A thread has its vectors and the weights of their heads to itself, so that none
    waits for another.
    """
    NUM_VECTORS: tl.constexpr = GROUP * BLOCK_D // VECTOR
    vector = tl.arange(0, triton.next_power_of_2(NUM_VECTORS))
    head = vector // (BLOCK_D // VECTOR)
    element = vector[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    acc = tl.zeros(element.shape, tl.float32)
    peak = tl.full(vector.shape, NOTHING_SEEN, tl.float32)
    total = tl.zeros(vector.shape, tl.float32)
    for first_split in range(0, num_parts, COMBINED):
        averages = ()
        for index in tl.static_range(COMBINED):
            split = first_split + index
            inside = vector < tl.where(split < num_parts, NUM_VECTORS, 0)
            of_split = partial_out + split * (GROUP * BLOCK_D)
            average = tl.load(of_split + element, mask=inside[:, None], other=0.0, cache_modifier=".cg")
            averages = averages + (average,)  # noqa: RUF005 - Triton has no unpacking
        # Loads do not cross it: ptxas would move most of those above down between the sums, one wait after the other.
        tl.debug_barrier()
        lses = ()
        new_peak = peak
        for index in tl.static_range(COMBINED):
            split = first_split + index
            inside = vector < tl.where(split < num_parts, NUM_VECTORS, 0)
            lse = tl.load(partial_lse + split * GROUP + head, mask=inside, other=NOTHING_SEEN, cache_modifier=".cg")
            new_peak = tl.maximum(new_peak, lse)
            lses = lses + (lse,)  # noqa: RUF005
        fade = tl.exp2(peak - new_peak)
        total = total * fade
        acc = acc * fade[:, None]
        for index in tl.static_range(COMBINED):
            weight = tl.exp2(lses[index] - new_peak)
            total += weight
            acc += averages[index] * weight[:, None]
        peak = new_peak
    combined = (acc / total[:, None]).to(out.dtype.element_ty)
    dim = element % BLOCK_D
    of_out = out + head[:, None] * HEAD_DIM + dim
    tl.store(of_out, combined, mask=(vector < NUM_VECTORS)[:, None] & (dim < HEAD_DIM))


@triton.jit(do_not_specialize=["table_stride", "tokens_each"])
def _decode_kernel(
    q,
    k_cache,
    v_cache,
    context_lens,
    block_tables,
    out,
    partial_out,  # [rows, KV heads, splits, GROUP, BLOCK_D] float32, each split's own softmax average
    partial_lse,  # [rows, KV heads, splits, GROUP] float32, the base-2 logarithm of the sum of its weights
    arrivals,  # [rows, KV heads] int32, 0: the splits that have stored theirs; all three None unless SPLIT
    score_scale,
    table_stride,
    tokens_each,
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
    SPLIT: tl.constexpr,
    COMBINED: tl.constexpr,
    PDL: tl.constexpr,
):
    """One split of the context of one row, for the query heads of one KV head, and all of its splits where this program
    is the last of them."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    split = tl.program_id(0)
    num_splits = tl.num_programs(0)
    kv_head = tl.program_id(1)
    row = tl.program_id(2)
    context = tl.load(context_lens + row)
    first, split_tokens = _split_range(context, num_splits, tokens_each, WINDOW, BLOCK_N)
    begin = first + split * split_tokens
    end = tl.minimum(begin + split_tokens, context)
    if split > 0 and begin >= end:
        return

    member = tl.arange(0, BLOCK_M)
    head = kv_head * GROUP + member
    dim = tl.arange(0, BLOCK_D)
    inside = (member < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    q_row = q + row.to(tl.int64) * Q_ROW_STRIDE
    queries = tl.load(q_row + head[:, None] * Q_HEAD_STRIDE + dim[None, :], mask=inside, other=0.0)
    query = tl.full([BLOCK_M], 0, tl.int32) + (context - 1)
    seen_from = begin
    if WINDOW > 0:
        seen_from = tl.maximum(begin, context - WINDOW)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], NOTHING_SEEN, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    block_table = block_tables + row.to(tl.int64) * table_stride
    block = blocks(block_table, begin, end, BLOCK_SIZE, BLOCK_N)
    for first_key in range(begin, end, BLOCK_N):
        next_block = blocks(block_table, first_key + BLOCK_N, end, BLOCK_SIZE, BLOCK_N)
        acc, peak, total = attend(
            acc,
            peak,
            total,
            queries,
            query,
            first_key,
            seen_from,
            end,
            block,
            k_cache + kv_head * KV_HEAD_STRIDE,
            v_cache + kv_head * KV_HEAD_STRIDE,
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
    out_head = row.to(tl.int64) * NUM_HEADS + head
    if SPLIT and (split > 0 or end < context):
        row_kv_head = row.to(tl.int64) * tl.num_programs(1) + kv_head
        first_part = row_kv_head * num_splits * GROUP
        lse_parts = partial_lse + first_part
        out_parts = partial_out + first_part * BLOCK_D
        part = split * GROUP + member
        tl.store(out_parts + part[:, None] * BLOCK_D + dim[None, :], average, mask=(member < GROUP)[:, None])
        tl.store(lse_parts + part, peak + tl.log2(total), mask=member < GROUP)
        # The barriers carry the order from the program's threads to the one that counts, and from it back to them.
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals + row_kv_head, 1, sem="acq_rel", scope="gpu")
        num_used = tl.cdiv(context - first, split_tokens)
        if arrived == num_used - 1:
            tl.debug_barrier()
            first_head = row.to(tl.int64) * NUM_HEADS + kv_head * GROUP
            _combine(
                out_parts,
                lse_parts,
                num_used,
                out + first_head * HEAD_DIM,
                GROUP,
                HEAD_DIM,
                BLOCK_D,
                COMBINED,
            )
            tl.store(arrivals + row_kv_head, 0)
    else:
        rounded = average.to(out.dtype.element_ty)
        tl.store(out + out_head[:, None] * HEAD_DIM + dim[None, :], rounded, mask=inside)


def choose_splits(
    num_decodes: int, num_kv_heads: int, max_context: int, num_sms: int, tiling: DecodeTiling = DECODE
) -> Splits:
    """Splits that fill the GPU with programs where contexts are long, as far as the longest has work for them.

    With many rows a short context fills the GPU in few splits: more would cost their partial results and gain nothing.
    """
    programs = num_decodes * num_kv_heads
    tokens_each = triton.cdiv(tiling.usual_context * programs, num_sms * tiling.block_n) * tiling.block_n
    wanted = min(PROGRAMS_PER_SM * num_sms // programs, triton.cdiv(max_context, tokens_each), MAX_SPLITS)
    return Splits(1 << max(0, wanted.bit_length() - 1), tokens_each)


def arrival_counters(device: torch.device, num_programs: int) -> Tensor:
    """The zeros in which num_programs rows and KV heads count their splits: as many as choose_splits ever splits."""
    return _zeros(device, max(PROGRAMS_PER_SM * num_sms(device) // 2, triton.next_power_of_2(num_programs)))


@functools.cache
def _zeros(device: torch.device, size: int) -> Tensor:
    """Stay where they are, for captured launches; zeros of a capture would be written by its replay alone."""
    assert device.type != "cuda" or not torch.cuda.is_current_stream_capturing()
    return torch.zeros(size, dtype=torch.int32, device=device)


def paged_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: PagedBatch,
    score_scale: float,
    out: Tensor,
    constants: dict[str, int],
    splits: Splits | None,
    tiling: DecodeTiling,
) -> None:
    rows, num_kv_heads, group = batch.num_decodes, k_cache.shape[2], constants["GROUP"]
    if splits is None:
        bound = batch.block_tables.shape[1] * k_cache.shape[1]
        splits = choose_splits(rows, num_kv_heads, bound, num_sms(q.device), tiling)
    partial_out, partial_lse, arrivals = None, None, None
    if splits.num > 1:
        parts = (rows, num_kv_heads, splits.num, group)
        partial_out = torch.empty((*parts, constants["BLOCK_D"]), dtype=torch.float32, device=q.device)
        partial_lse = torch.empty(parts, dtype=torch.float32, device=q.device)
        arrivals = arrival_counters(q.device, rows * num_kv_heads)
    _decode_kernel[(splits.num, num_kv_heads, rows)](
        q,
        k_cache,
        v_cache,
        batch.context_lens,
        batch.block_tables,
        out,
        partial_out,
        partial_lse,
        arrivals,
        score_scale,
        batch.block_tables.stride(0),
        splits.tokens_each,
        **constants,
        **_tile(tiling),
        SPLIT=splits.num > 1,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        **overlap(q.device),
    )


def _tile(tiling: DecodeTiling) -> dict[str, int]:
    """COMBINED goes by the registers that a thread has for the splits: 64 with 8 heads of 128."""
    return {"BLOCK_M": MAX_GROUP, "BLOCK_N": tiling.block_n, "COMBINED": 2 * tiling.num_warps}


def compile_specs() -> list[CompileSpec]:
    """Both models in bfloat16."""
    partials = {"partial_out": "*fp32", "partial_lse": "*fp32", "arrivals": "*i32"}
    return [
        CompileSpec(
            f"paged_attention_decode_{model}",
            _decode_kernel,
            {**COMMON_SIGNATURE, **partials, "tokens_each": "i32"},
            {**constants, **_tile(DECODE), "SPLIT": True},
            DECODE.num_warps,
            DECODE.num_stages,
        )
        for model, constants in served_constants().items()
    ]
