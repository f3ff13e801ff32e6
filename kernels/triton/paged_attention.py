"""Paged attention on the GPU: decode rows split over their context, prefill tiles found on the device.

In both kernels the query heads that share a KV head stand as rows of one matrix, so that K and V are read once for all
of them. Softmax runs in powers of two; a row that has seen nothing yet has the peak NOTHING_SEEN, which is finite: its
weights come out as 0 without the NaN of -inf - -inf.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmrt.kernels.paged_attention import PagedBatch
from vlmrt.kernels.triton.compile_spec import CompileSpec
from vlmrt.kernels.triton.overlap import overlap

LOG2_E = 1.4426950408889634
NOTHING_SEEN = tl.constexpr(-1.0e30)

DECODE_PROGRAMS_PER_SM = 4
MAX_SPLITS = 64
USUAL_CONTEXT = 384  # tokens at which a decode step has one program with work for each SM


class DecodeTiling(NamedTuple):
    block_n: int
    num_warps: int
    num_stages: int


class Splits(NamedTuple):
    """How the context of a decode row is shared out."""

    num: int  # a power of two; more programs than have work where the context is short
    tokens_each: int  # a row takes another split for every so many tokens, as far as num goes


class PrefillTiling(NamedTuple):
    block_m: int  # rows: query tokens x the query heads of one KV head
    block_n: int
    num_warps: int
    num_stages: int


WIDE = PrefillTiling(block_m=128, block_n=64, num_warps=8, num_stages=3)
NARROW = PrefillTiling(block_m=64, block_n=64, num_warps=4, num_stages=3)  # while the wide tiles do not fill the GPU
EXACT = PrefillTiling(block_m=16, block_n=32, num_warps=8, num_stages=1)  # float32: no tensor cores
DECODE = DecodeTiling(block_n=32, num_warps=4, num_stages=3)


@triton.jit
def _blocks(block_table, first_key, end, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Cache block of each key of a tile, as far as end. Read one tile ahead: as part of its own tile, a load on whose
    result the loads of K and V wait would take the place of one of their stages in the pipeline."""
    key = first_key + tl.arange(0, BLOCK_N)
    return tl.load(block_table + key // BLOCK_SIZE, mask=key < end, other=0)


@triton.jit
def _attend(
    acc,
    peak,
    total,
    q,
    query,  # [M] position of each row's token in its sequence
    first_key,
    begin,  # keys before begin or from end on are not read (MASKED only)
    end,
    block,  # [N] cache block of each key
    k_head,
    v_head,
    score_scale,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Take the tile of keys at first_key into the running softmax (acc, peak, total)."""
    key = first_key + tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)
    slot = block.to(tl.int64) * BLOCK_STRIDE + (key % BLOCK_SIZE) * SLOT_STRIDE
    offset = slot[:, None] + dim[None, :]
    if MASKED:  # what lies in unwritten slots may be NaN, and 0 * NaN is NaN
        read = (key >= begin) & (key < end)
        inside = read[:, None] & (dim < HEAD_DIM)[None, :]
        k = tl.load(k_head + offset, mask=inside, other=0.0)
        v = tl.load(v_head + offset, mask=inside, other=0.0)
    elif HEAD_DIM < BLOCK_D:
        k = tl.load(k_head + offset, mask=(dim < HEAD_DIM)[None, :], other=0.0)
        v = tl.load(v_head + offset, mask=(dim < HEAD_DIM)[None, :], other=0.0)
    else:
        k = tl.load(k_head + offset)
        v = tl.load(v_head + offset)

    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * score_scale
    if MASKED:
        seen = key[None, :] <= query[:, None]
        if WINDOW > 0:
            seen = seen & (key[None, :] > query[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    weight = tl.exp2(scores - new_peak[:, None])
    fade = tl.exp2(peak - new_peak)
    total = total * fade + tl.sum(weight, 1)
    acc = tl.dot(weight.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, new_peak, total


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


@triton.jit(do_not_specialize=["table_stride", "tokens_each"])
def _decode_kernel(
    q,
    k_cache,
    v_cache,
    context_lens,
    block_tables,
    out,  # written for rows of one split,
    partial_out,  # else [rows, heads, splits, BLOCK_D] float32, each split's own softmax average
    partial_lse,  # and [rows, heads, splits] float32, the base-2 logarithm of the sum of its weights
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
    PDL: tl.constexpr,
):
    """One split of the context of one row, for the query heads of one KV head."""
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
    block = _blocks(block_table, begin, end, BLOCK_SIZE, BLOCK_N)
    for first_key in range(begin, end, BLOCK_N):
        next_block = _blocks(block_table, first_key + BLOCK_N, end, BLOCK_SIZE, BLOCK_N)
        acc, peak, total = _attend(
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
    row_head = row.to(tl.int64) * NUM_HEADS + head
    if SPLIT and (split > 0 or end < context):
        part = row_head * num_splits + split
        tl.store(partial_out + part[:, None] * BLOCK_D + dim[None, :], average, mask=(member < GROUP)[:, None])
        tl.store(partial_lse + part, peak + tl.log2(total), mask=member < GROUP)
    else:
        rounded = average.to(out.dtype.element_ty)
        tl.store(out + row_head[:, None] * HEAD_DIM + dim[None, :], rounded, mask=inside)


@triton.jit(do_not_specialize=["tokens_each"])
def _combine_kernel(
    partial_out,
    partial_lse,
    context_lens,
    out,
    tokens_each,
    NUM_HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Average of one row's and head's splits by their weights; the splits that had nothing to read are left out, and so
    are the rows of one split."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    row_head = row.to(tl.int64) * NUM_HEADS + tl.program_id(1)
    context = tl.load(context_lens + row)
    first, split_tokens = _split_range(context, NUM_SPLITS, tokens_each, WINDOW, BLOCK_N)
    if context <= first + split_tokens:
        return
    split = tl.arange(0, NUM_SPLITS)
    dim = tl.arange(0, BLOCK_D)
    used = first + split * split_tokens < context
    part = row_head * NUM_SPLITS + split
    lse = tl.load(partial_lse + part, mask=used, other=NOTHING_SEEN)
    average = tl.load(partial_out + part[:, None] * BLOCK_D + dim[None, :], mask=used[:, None], other=0.0)
    weight = tl.exp2(lse - tl.max(lse, 0))
    combined = tl.sum(average * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + row_head * HEAD_DIM + dim, combined.to(out.dtype.element_ty), mask=dim < HEAD_DIM)


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
    block = _blocks(block_table, begin // BLOCK_N * BLOCK_N, end, BLOCK_SIZE, BLOCK_N)
    if WINDOW == 0:
        for first_key in range(0, masked_from, BLOCK_N):
            next_block = _blocks(block_table, first_key + BLOCK_N, end, BLOCK_SIZE, BLOCK_N)
            acc, peak, total = _attend(
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
        next_block = _blocks(block_table, first_key + BLOCK_N, end, BLOCK_SIZE, BLOCK_N)
        acc, peak, total = _attend(
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


def paged_attention_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: PagedBatch,
    scale: float,
    sliding_window: int | None = None,
    splits: Splits | None = None,
) -> Tensor:
    """As vlmrt.kernels.paged_attention.paged_attention; splits overrides the choice for decode.

    The launches depend on shapes, num_decodes and the number of sequences alone, and nothing is read from the device:
    a step can be captured in a CUDA graph and replayed with other lengths, up to what block_tables holds.
    """
    num_rows, num_heads, _ = q.shape
    num_kv_heads = k_cache.shape[2]
    assert num_heads % num_kv_heads == 0
    assert num_heads // num_kv_heads <= EXACT.block_m
    assert q.stride(2) == k_cache.stride(3) == 1
    assert k_cache.stride() == v_cache.stride()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    constants = _constants(q, k_cache, sliding_window)
    if batch.num_decodes:
        bound = batch.block_tables.shape[1] * k_cache.shape[1]
        if splits is None:
            splits = choose_splits(batch.num_decodes, num_kv_heads, bound, _num_sms(q.device))
        _launch_decode(q, k_cache, v_cache, batch, scale * LOG2_E, out, splits, constants)
    if num_rows > batch.num_decodes:
        _launch_prefill(q, k_cache, v_cache, batch, scale * LOG2_E, out, constants)
    return out


def choose_splits(num_decodes: int, num_kv_heads: int, max_context: int, num_sms: int) -> Splits:
    """Splits that fill the GPU with programs where contexts are long, as far as the longest has work for them.

    With many rows a short context fills the GPU in few splits: more would cost their partial results and gain nothing.
    """
    programs = num_decodes * num_kv_heads
    tokens_each = triton.cdiv(USUAL_CONTEXT * programs, num_sms * DECODE.block_n) * DECODE.block_n
    wanted = min(DECODE_PROGRAMS_PER_SM * num_sms // programs, triton.cdiv(max_context, tokens_each), MAX_SPLITS)
    return Splits(1 << max(0, wanted.bit_length() - 1), tokens_each)


def choose_tiling(num_tokens: int, group: int, num_kv_heads: int, num_sms: int, dtype: torch.dtype) -> PrefillTiling:
    """num_tokens: of all prefill rows together, padding included."""
    if dtype == torch.float32:
        return EXACT
    return WIDE if num_tokens * group // WIDE.block_m * num_kv_heads >= num_sms else NARROW


def _launch_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: PagedBatch,
    score_scale: float,
    out: Tensor,
    splits: Splits,
    constants: dict[str, int],
) -> None:
    rows, num_heads, num_kv_heads = batch.num_decodes, q.shape[1], k_cache.shape[2]
    partial_out, partial_lse = out, out
    if splits.num > 1:
        parts = (rows, num_heads, splits.num)
        partial_out = torch.empty((*parts, constants["BLOCK_D"]), dtype=torch.float32, device=q.device)
        partial_lse = torch.empty(parts, dtype=torch.float32, device=q.device)
    _decode_kernel[(splits.num, num_kv_heads, rows)](
        q,
        k_cache,
        v_cache,
        batch.context_lens,
        batch.block_tables,
        out,
        partial_out,
        partial_lse,
        score_scale,
        batch.block_tables.stride(0),
        splits.tokens_each,
        **constants,
        BLOCK_M=max(16, triton.next_power_of_2(constants["GROUP"])),
        BLOCK_N=DECODE.block_n,
        SPLIT=splits.num > 1,
        num_warps=DECODE.num_warps,
        num_stages=DECODE.num_stages,
        **overlap(q.device),
    )
    if splits.num > 1:
        _combine_kernel[(rows, num_heads)](
            partial_out,
            partial_lse,
            batch.context_lens,
            out,
            splits.tokens_each,
            **_combine_constants(constants),
            NUM_SPLITS=splits.num,
            num_warps=4,
            **overlap(q.device),
        )


def _launch_prefill(
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
    tiling = choose_tiling(num_tokens, group, num_kv_heads, _num_sms(q.device), q.dtype)
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


def _constants(q: Tensor, k_cache: Tensor, sliding_window: int | None) -> dict[str, int]:
    """What is the same in every step of a model, compiled into both kernels."""
    _, num_heads, head_dim = q.shape
    block_stride, slot_stride, kv_head_stride, _ = k_cache.stride()
    return {
        "Q_ROW_STRIDE": q.stride(0),
        "Q_HEAD_STRIDE": q.stride(1),
        "BLOCK_STRIDE": block_stride,
        "SLOT_STRIDE": slot_stride,
        "KV_HEAD_STRIDE": kv_head_stride,
        "NUM_HEADS": num_heads,
        "GROUP": num_heads // k_cache.shape[2],
        "WINDOW": sliding_window or 0,
        "BLOCK_SIZE": k_cache.shape[1],
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
    }


def _combine_constants(constants: dict[str, int]) -> dict[str, int]:
    """Those that the combination of splits shares with the decode kernel."""
    kept = {key: constants[key] for key in ("NUM_HEADS", "WINDOW", "HEAD_DIM", "BLOCK_D")}
    return {**kept, "BLOCK_N": DECODE.block_n}


@functools.cache
def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":  # the interpreter
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def compile_specs() -> list[CompileSpec]:
    """Both models in bfloat16: a split of a decode row, the combination of the splits, both tilings of prefill."""
    common = {
        **dict.fromkeys(("q", "k_cache", "v_cache", "out"), "*bf16"),
        **dict.fromkeys(("context_lens", "block_tables"), "*i32"),
        "score_scale": "fp32",
        "table_stride": "i32",
    }
    partials = {"partial_out": "*fp32", "partial_lse": "*fp32"}
    counts = {"cu_seqlens": "*i32", **dict.fromkeys(("num_decodes", "num_prefills", "num_rows"), "i32")}
    specs = []
    for model, num_heads, num_kv_heads in (("2b", 12, 2), ("7b", 28, 4)):
        q = torch.empty(1, num_heads, 128, device="meta")
        constants = _constants(q, torch.empty(1, 16, num_kv_heads, 128, device="meta"), None)
        tile = {"BLOCK_M": 16, "BLOCK_N": DECODE.block_n, "SPLIT": True}
        decode = CompileSpec(
            f"paged_attention_decode_{model}",
            _decode_kernel,
            {**common, **partials, "tokens_each": "i32"},
            {**constants, **tile},
            DECODE.num_warps,
            DECODE.num_stages,
        )
        specs.append(decode)
        for tiling in (WIDE, NARROW):
            prefill = CompileSpec(
                f"paged_attention_prefill_{model}_{tiling.block_m}",
                _prefill_kernel,
                {**common, **counts},
                {**constants, "BLOCK_M": tiling.block_m, "BLOCK_N": tiling.block_n},
                tiling.num_warps,
                tiling.num_stages,
            )
            specs.append(prefill)
    combine = CompileSpec(
        "paged_attention_combine",
        _combine_kernel,
        {**partials, "context_lens": "*i32", "out": "*bf16", "tokens_each": "i32"},
        {**_combine_constants(constants), "NUM_SPLITS": MAX_SPLITS},
        4,
        3,
    )
    return [*specs, combine]
