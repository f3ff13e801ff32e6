"""Paged attention on the GPU: the decode rows of a step in one launch, its prefill chunks in another."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmrt.kernels.paged_attention import PagedBatch
from vlmrt.kernels.triton.attend import LOG2_E, MAX_GROUP, attention_constants
from vlmrt.kernels.triton.paged_decode import DECODE, DecodeTiling, Splits, paged_decode
from vlmrt.kernels.triton.paged_prefill import paged_prefill


def paged_attention_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: PagedBatch,
    scale: float,
    sliding_window: int | None = None,
    splits: Splits | None = None,
    tiling: DecodeTiling = DECODE,
) -> Tensor:
    """As vlmrt.kernels.paged_attention.paged_attention; splits overrides the choice for decode.

    The launches depend on shapes, num_decodes and the number of sequences alone, and nothing is read from the device:
    a step can be captured in a CUDA graph and replayed with other lengths, up to what block_tables holds. It has to
    have run once before. Two steps with decode rows must not run side by side: paged_decode says why.
    """
    num_rows, num_heads, _ = q.shape
    num_kv_heads = k_cache.shape[2]
    assert num_heads % num_kv_heads == 0
    assert num_heads // num_kv_heads <= MAX_GROUP
    assert q.stride(2) == k_cache.stride(3) == 1
    assert k_cache.stride() == v_cache.stride()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    constants = attention_constants(q, k_cache, sliding_window)
    if batch.num_decodes:
        paged_decode(q, k_cache, v_cache, batch, scale * LOG2_E, out, constants, splits, tiling)
    if num_rows > batch.num_decodes:
        paged_prefill(q, k_cache, v_cache, batch, scale * LOG2_E, out, constants)
    return out
