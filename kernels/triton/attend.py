"""What paged decode and prefill share: a tile of keys taken into the running softmax of a tile of queries.

The query heads that share a KV head stand as rows of one matrix, so that K and V are read once for all of them. Softmax
runs in powers of two; a row that has seen nothing yet has the peak NOTHING_SEEN, which is finite: its weights come out
as 0 without the NaN of -inf - -inf.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
NOTHING_SEEN = tl.constexpr(-1.0e30)
MAX_GROUP = 16  # query heads of one KV head: the rows of the smallest tile

# Of both kernels as they are served.
COMMON_SIGNATURE = {
    **dict.fromkeys(("q", "k_cache", "v_cache", "out"), "*bf16"),
    **dict.fromkeys(("context_lens", "block_tables"), "*i32"),
    "score_scale": "fp32",
    "table_stride": "i32",
}


@triton.jit
def blocks(block_table, first_key, end, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Cache block of each key of a tile, as far as end. Read one tile ahead: as part of its own tile, a load on whose
    result the loads of K and V wait would take the place of one of their stages in the pipeline."""
    key = first_key + tl.arange(0, BLOCK_N)
    return tl.load(block_table + key // BLOCK_SIZE, mask=key < end, other=0)


@triton.jit
def attend(
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


def attention_constants(q: Tensor, k_cache: Tensor, sliding_window: int | None) -> dict[str, int]:
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


def served_constants() -> dict[str, dict[str, int]]:
    """The constants of both models."""
    served = {}
    for model, num_heads, num_kv_heads in (("2b", 12, 2), ("7b", 28, 4)):
        q = torch.empty(1, num_heads, 128, device="meta")
        served[model] = attention_constants(q, torch.empty(1, 16, num_kv_heads, 128, device="meta"), None)
    return served


@functools.cache
def num_sms(device: torch.device) -> int:
    if device.type != "cuda":  # the interpreter
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
