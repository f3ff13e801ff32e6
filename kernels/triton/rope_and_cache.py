"""Bias, rotation of queries and keys, and the write of keys and values, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmrt.kernels.triton.compile_spec import CompileSpec
from vlmrt.kernels.triton.overlap import overlap

HEADS = 4
NUM_WARPS = 1


@triton.jit
def _rope_and_cache_kernel(
    qkv_ptr,
    bias_ptr,  # None: nothing is added
    cos_ptr,
    sin_ptr,
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_mapping_ptr,
    qkv_stride,
    k_block_stride,
    k_slot_stride,
    k_head_stride,
    v_block_stride,
    v_slot_stride,
    v_head_stride,
    BLOCK_SIZE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    ALL_HEADS: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    TILES: tl.constexpr = (ALL_HEADS + HEADS - 1) // HEADS
    token = (tl.program_id(0) // TILES).to(tl.int64)
    head = (tl.program_id(0) % TILES * HEADS + tl.arange(0, HEADS))[:, None]
    pair = tl.arange(0, BLOCK)[None, :]
    inside = (head < ALL_HEADS) & (pair < HALF)
    is_query = head < NUM_HEADS
    is_value = head >= NUM_HEADS + NUM_KV_HEADS

    column = head * (2 * HALF) + pair
    if bias_ptr is not None:
        bias_low = tl.load(bias_ptr + column, mask=inside, other=0.0)
        bias_high = tl.load(bias_ptr + column + HALF, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    slot = tl.load(slot_mapping_ptr + token)
    # The upper half of a table holds each pair's cosine and the sine with its own sign.
    table = token * 2 * HALF + HALF + pair
    cos = tl.load(cos_ptr + table, mask=pair < HALF, other=0.0)
    sin = tl.load(sin_ptr + table, mask=pair < HALF, other=0.0)
    low = tl.load(qkv_ptr + token * qkv_stride + column, mask=inside, other=0.0)
    high = tl.load(qkv_ptr + token * qkv_stride + column + HALF, mask=inside, other=0.0)
    dtype = low.dtype
    low, high = low.to(tl.float32), high.to(tl.float32)
    if bias_ptr is not None:
        low += bias_low.to(tl.float32)
        high += bias_high.to(tl.float32)
        low, high = low.to(dtype).to(tl.float32), high.to(dtype).to(tl.float32)  # as the projection's own would
    turned_low = tl.where(is_value, low, low * cos - high * sin).to(dtype)
    turned_high = tl.where(is_value, high, high * cos + low * sin).to(dtype)

    q = q_ptr + token * (NUM_HEADS * 2 * HALF) + column
    tl.store(q, turned_low, mask=inside & is_query)
    tl.store(q + HALF, turned_high, mask=inside & is_query)
    written = inside & (head < tl.where(slot >= 0, ALL_HEADS, 0))
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    k_head, v_head = head - NUM_HEADS, head - NUM_HEADS - NUM_KV_HEADS
    k = k_cache_ptr + block * k_block_stride + offset * k_slot_stride + k_head * k_head_stride + pair
    is_key = written & (k_head >= 0) & (v_head < 0)
    tl.store(k, turned_low.to(k_cache_ptr.dtype.element_ty), mask=is_key)
    tl.store(k + HALF, turned_high.to(k_cache_ptr.dtype.element_ty), mask=is_key)
    v = v_cache_ptr + block * v_block_stride + offset * v_slot_stride + v_head * v_head_stride + pair
    tl.store(v, turned_low.to(v_cache_ptr.dtype.element_ty), mask=written & is_value)
    tl.store(v + HALF, turned_high.to(v_cache_ptr.dtype.element_ty), mask=written & is_value)


def rope_and_cache_triton(
    qkv: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
) -> Tensor:
    block_size, num_kv_heads, head_dim = k_cache.shape[1:]
    num_tokens = qkv.shape[0]
    q = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    half = head_dim // 2
    _rope_and_cache_kernel[(num_tokens * triton.cdiv(num_heads + 2 * num_kv_heads, HEADS),)](
        qkv,
        bias,
        cos,
        sin,
        q,
        k_cache,
        v_cache,
        slot_mapping,
        qkv.stride(0),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        block_size,
        num_heads,
        num_kv_heads,
        half,
        triton.next_power_of_2(half),
        HEADS,
        num_warps=NUM_WARPS,
        **overlap(qkv.device),
    )
    return q


def compile_specs() -> list[CompileSpec]:
    pointers = ("qkv_ptr", "bias_ptr", "q_ptr", "k_cache_ptr", "v_cache_ptr")
    strides = ("block_stride", "slot_stride", "head_stride")
    signature = (
        dict.fromkeys(pointers, "*bf16")
        | {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "slot_mapping_ptr": "*i64", "qkv_stride": "i32:16"}
        | {f"{cache}_{stride}": "i32:16" for cache in "kv" for stride in strides}
    )
    shape = {"BLOCK_SIZE": 16, "HALF": 64, "BLOCK": 64, "HEADS": HEADS}
    return [
        CompileSpec(
            f"rope_and_cache {num_heads} heads",
            _rope_and_cache_kernel,
            signature,
            shape | {"NUM_HEADS": num_heads, "NUM_KV_HEADS": num_kv_heads},
            NUM_WARPS,
            3,
        )
        for num_heads, num_kv_heads in ((12, 2), (28, 4))
    ]
