"""Causal attention of a step's query tokens over keys and values in a paged cache."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """One step's sequences. The first num_decodes sequences have one query token each; the rest are prefill chunks."""

    cu_seqlens: Tensor  # int32 [S+1] prefix sums of query tokens
    context_lens: Tensor  # int32 [S] tokens in the KV cache after this step's write
    block_tables: Tensor  # int32 [S, max_blocks]; entries past a sequence's last block are not read
    slot_mapping: Tensor  # int64 [T] block * block_size + offset; -1: not written
    num_decodes: int
    query_lens: tuple[int, ...]  # host copies, for the CPU path
    context_lens_host: tuple[int, ...]
    # Indices and masks that every layer of the step shares, made by the first one.
    derived: dict[tuple[str, int, int], tuple[Tensor, Tensor | None]] = field(
        default_factory=dict, compare=False, repr=False
    )


def paged_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: PagedBatch,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    outputs = []
    if batch.num_decodes:
        outputs.append(_decode(q[: batch.num_decodes], k_cache, v_cache, batch, scale, sliding_window))
    start = batch.num_decodes
    for sequence in range(batch.num_decodes, len(batch.query_lens)):
        stop = start + batch.query_lens[sequence]
        outputs.append(_prefill(q[start:stop], k_cache, v_cache, batch, sequence, scale, sliding_window))
        start = stop
    if start < q.shape[0]:  # padding rows of a captured batch
        outputs.append(q.new_zeros(q.shape[0] - start, *q.shape[1:]))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: PagedBatch, scale: float, sliding_window: int | None
) -> Tensor:
    """All decode rows in one call, the query heads that share a KV head standing as its query rows."""
    rows, num_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    key = ("decode", block_size, sliding_window or 0)
    if key not in batch.derived:
        batch.derived[key] = _decode_slots(batch, rows, block_size, sliding_window, q.dtype)
    slots, mask = batch.derived[key]
    k = _gather(k_cache, slots).view(rows, -1, num_kv_heads, head_dim).transpose(1, 2)
    v = _gather(v_cache, slots).view(rows, -1, num_kv_heads, head_dim).transpose(1, 2)
    grouped = q.reshape(rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale).reshape(q.shape)


def _decode_slots(
    batch: PagedBatch, rows: int, block_size: int, sliding_window: int | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """(slot of every key position of every row, flat; additive mask [rows, 1, 1, L], None: nothing is masked)."""
    lengths = batch.context_lens_host[:rows]
    longest = max(1, *lengths)
    device = batch.block_tables.device
    position = torch.arange(longest, device=device)
    context = batch.context_lens[:rows, None]
    seen = position < context
    if sliding_window is not None:
        seen &= position >= context - sliding_window
    # A position that is not seen reads a slot that is: what lies in unwritten slots may be NaN, and 0 * NaN is NaN.
    position = torch.where(seen, position, context.clamp(min=1).long() - 1)
    block = batch.block_tables[:rows].long().gather(1, position // block_size)
    slots = (block * block_size + position % block_size).view(-1)
    if sliding_window is None and min(lengths) == longest:
        return slots, None
    seen[:, 0] |= batch.context_lens[:rows] < 1  # a padding row has nothing to see
    return slots, _additive(seen, dtype)[:, None, None, :]


def _prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: PagedBatch,
    sequence: int,
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    """One chunk: its queries are the last tokens of its context."""
    num_tokens, num_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    context = batch.context_lens_host[sequence]
    if not num_tokens:
        return q
    key = (f"prefill {sequence}", block_size, sliding_window or 0)
    if key not in batch.derived:
        batch.derived[key] = _prefill_slots(batch, sequence, num_tokens, block_size, sliding_window, q.dtype)
    slots, mask = batch.derived[key]
    k = _gather(k_cache, slots).view(1, context, num_kv_heads, head_dim).transpose(1, 2)
    v = _gather(v_cache, slots).view(1, context, num_kv_heads, head_dim).transpose(1, 2)
    attended = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None and num_tokens > 1,
        scale=scale,
        enable_gqa=num_heads != num_kv_heads,
    )
    return attended[0].transpose(0, 1)


def _prefill_slots(
    batch: PagedBatch,
    sequence: int,
    num_tokens: int,
    block_size: int,
    sliding_window: int | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """(slot of every key position; additive mask [T, L], or None where plain causal or no masking does)."""
    context = batch.context_lens_host[sequence]
    device = batch.block_tables.device
    key = torch.arange(context, device=device)
    slots = batch.block_tables[sequence].long()[key // block_size] * block_size + key % block_size
    if num_tokens in (1, context) and (sliding_window is None or context <= sliding_window):
        return slots, None
    query = torch.arange(context - num_tokens, context, device=device)[:, None]
    seen = key <= query
    if sliding_window is not None:
        seen &= key > query - sliding_window
    return slots, _additive(seen, dtype)


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where seen, -inf elsewhere: a boolean mask would be converted again by every layer."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def _gather(cache: Tensor, slots: Tensor) -> Tensor:
    """Rows of a cache by slot, [len(slots), Hkv, D]."""
    return cache.view(-1, *cache.shape[2:]).index_select(0, slots)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: PagedBatch,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v, each query seeing its sequence's tokens up to itself, read through block_tables.

    Shapes: q [T, Hq, D], k_cache and v_cache [num_blocks, block_size, Hkv, D], Hkv dividing Hq -> [T, Hq, D], same
    dtype. sliding_window limits a query to that many latest tokens, its own included. Rows of q past the batch's
    query tokens are padding and come back as zeros. On a GPU nothing is read from the device: the lengths may change
    between replays of a captured call.
    """
    if q.device.type == "cuda":
        from vlmrt.kernels.triton.paged_attention import paged_attention_triton

        return paged_attention_triton(q, k_cache, v_cache, batch, scale, sliding_window)
    return paged_attention_reference(q, k_cache, v_cache, batch, scale, sliding_window)
