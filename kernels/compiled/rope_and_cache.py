"""Rotation of queries and keys and the write into the cache on a CPU, in float32."""

import torch
from torch import Tensor

from vlmrt.kernels.compiled.jit import compiled, floats, longs
from vlmrt.kernels.compiled.rotary import rotate_heads, with_whole_tokens


def rope_and_cache_on_cpu(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> Tensor:
    (q, q_stride), (k, k_stride), (v, v_stride) = with_whole_tokens(q), with_whole_tokens(k), with_whole_tokens(v)
    cos, sin, slot_mapping = cos.contiguous(), sin.contiguous(), slot_mapping.contiguous()
    assert slot_mapping.dtype == torch.int64
    assert k_cache.is_contiguous()
    assert v_cache.is_contiguous()
    num_tokens, num_heads, head_dim = q.shape
    rotated = q.new_empty(q.shape)
    if num_tokens:
        _rope_and_cache(
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            slot_mapping.data_ptr(),
            rotated.data_ptr(),
            q_stride,
            k_stride,
            v_stride,
            num_tokens,
            num_heads,
            k.shape[1],
            head_dim,
        )
    return rotated


@compiled(16)
def _rope_and_cache(
    q: int,
    k: int,
    v: int,
    cos: int,
    sin: int,
    k_cache: int,
    v_cache: int,
    slot_mapping: int,
    rotated: int,
    q_stride: int,
    k_stride: int,
    v_stride: int,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> None:
    slots = longs(slot_mapping, 0)
    q_width, kv_width = num_heads * head_dim, num_kv_heads * head_dim
    for token in range(num_tokens):
        cos_row, sin_row = floats(cos, token * head_dim), floats(sin, token * head_dim)
        rotate_heads(
            floats(q, token * q_stride), cos_row, sin_row, floats(rotated, token * q_width), num_heads, head_dim
        )
        place = slots[token] * kv_width
        if place >= 0:
            key, value = floats(k, token * k_stride), floats(v, token * v_stride)
            rotate_heads(key, cos_row, sin_row, floats(k_cache, place), num_kv_heads, head_dim)
            stored = floats(v_cache, place)
            for i in range(kv_width):
                stored[i] = value[i]
