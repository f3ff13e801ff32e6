"""Bias, rotary position embedding of queries and keys, and the write of keys and values into their cache slots."""

from torch import Tensor

from vlmrt.kernels.rotary import rotate_reference


def write_cache_reference(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write row i of k and v into slot slot_mapping[i]; rows with slot -1 are skipped."""
    if slot_mapping.shape[0] and int(slot_mapping.min()) < 0:
        kept = slot_mapping >= 0
        k, v, slot_mapping = k[kept], v[kept], slot_mapping[kept]
    for cache, rows in ((k_cache, k), (v_cache, v)):
        cache.view(-1, *cache.shape[2:]).index_copy_(0, slot_mapping, rows.to(cache.dtype))


def rope_and_cache_reference(
    qkv: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
) -> Tensor:
    if bias is not None:
        qkv = qkv + bias
    num_kv_heads, head_dim = k_cache.shape[2:]
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
    # One rotation of both: on a CPU the calls are what takes time.
    rotated = rotate_reference(heads[:, :-num_kv_heads], cos, sin)
    write_cache_reference(rotated[:, num_heads:], heads[:, -num_kv_heads:], k_cache, v_cache, slot_mapping)
    return rotated[:, :num_heads]


def rope_and_cache(
    qkv: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
) -> Tensor:
    """Add bias, rotate q and k by their tokens' angles, write k and v into their slots, return the rotated q.

    Shapes: qkv [T, (Hq + 2 Hkv) * D], a fused projection's query, key and value heads in that order, its columns side
    by side; bias [(Hq + 2 Hkv) * D], rounded to qkv's dtype with the sum, or None; cos and sin float32 [T, D] from
    rotary_tables or mrope_tables, contiguous; k_cache and v_cache [num_blocks, block_size, Hkv, D]; slot_mapping
    int64 [T] as block * block_size + offset, -1 to skip the write; num_heads is Hq -> [T, Hq, D], same dtype as qkv.
    Source: arXiv:2104.09864.
    """
    if qkv.device.type == "cuda":
        from vlmrt.kernels.triton.rope_and_cache import rope_and_cache_triton

        return rope_and_cache_triton(qkv, bias, cos, sin, k_cache, v_cache, slot_mapping, num_heads)
    return rope_and_cache_reference(qkv, bias, cos, sin, k_cache, v_cache, slot_mapping, num_heads)
