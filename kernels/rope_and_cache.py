"""Rotary position embedding of queries and keys, and the write of keys and values into their cache slots."""

import torch
from torch import Tensor

from vlmrt.kernels.rotary import rotate_reference


def write_cache_reference(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write row i of k and v into slot slot_mapping[i]; rows with slot -1 are skipped."""
    k_slots, v_slots = (cache.view(-1, *cache.shape[2:]) for cache in (k_cache, v_cache))
    if slot_mapping.device.type == "cpu":
        if int(slot_mapping.min()) < 0:
            kept = slot_mapping >= 0
            k, v, slot_mapping = k[kept], v[kept], slot_mapping[kept]
    else:
        k, v, slot_mapping = without_skipped_rows(k, v, k_slots, v_slots, slot_mapping)
    k_slots.index_copy_(0, slot_mapping, k.to(k_cache.dtype))
    v_slots.index_copy_(0, slot_mapping, v.to(v_cache.dtype))


def without_skipped_rows(
    k: Tensor, v: Tensor, k_slots: Tensor, v_slots: Tensor, slot_mapping: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(k, v, slots) of as many rows, in which skipped rows change nothing; does not wait for the device.

    A skipped row repeats the write of a kept one or, when there is none, writes back what slot 0 holds: equal values
    in one slot are no race.
    """
    kept = slot_mapping >= 0
    rows = torch.arange(slot_mapping.shape[0], device=slot_mapping.device)
    source = torch.where(kept, rows, kept.to(torch.int32).argmax())
    slots = slot_mapping[source]
    nothing = (slots < 0)[:, None, None]
    k = torch.where(nothing, k_slots[0].to(k.dtype), k[source])
    v = torch.where(nothing, v_slots[0].to(v.dtype), v[source])
    return k, v, slots.clamp(min=0)


def rope_and_cache_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    # One rotation of both saves more than the concatenation costs: on a CPU the calls are what takes time.
    rotated = rotate_reference(torch.cat((q, k), dim=1), cos, sin)
    num_heads = q.shape[1]
    write_cache_reference(rotated[:, num_heads:], v, k_cache, v_cache, slot_mapping)
    return rotated[:, :num_heads]


def rope_and_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """Rotate q and k by their tokens' angles, write k and v into their slots, return the rotated q.

    Shapes: q [T, Hq, D], k and v [T, Hkv, D], cos and sin [T, D] from rotary_tables (M-RoPE sections already
    chosen), k_cache and v_cache [num_blocks, block_size, Hkv, D], slot_mapping int64 [T] as block * block_size +
    offset, -1 to skip the write -> [T, Hq, D], same dtype as q.   Source: arXiv:2104.09864.
    """
    if q.device.type == "cpu" and q.dtype == cos.dtype == sin.dtype == k_cache.dtype == torch.float32:
        from vlmrt.kernels.compiled.rope_and_cache import rope_and_cache_on_cpu

        return rope_and_cache_on_cpu(q, k, v, cos, sin, k_cache, v_cache, slot_mapping)
    return rope_and_cache_reference(q, k, v, cos, sin, k_cache, v_cache, slot_mapping)
