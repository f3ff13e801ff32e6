"""Paged and segmented attention against float64 over the plain sequences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.exactness import DTYPES, normal
from vlmrt.kernels.paged_attention import PagedBatch, paged_attention
from vlmrt.kernels.vision_attention import pack_segments, vision_attention

BLOCK_SIZE = 8
SCALE = 0.17


def exact_attention(q: Tensor, k: Tensor, v: Tensor, first: int, window: int | None) -> Tensor:
    """q [T, Hq, D] are the tokens from index first on of a sequence k, v [L, Hkv, D]; float64."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * SCALE
    query = torch.arange(first, first + q.shape[0])[:, None]
    key = torch.arange(k.shape[0])
    seen = key <= query
    if window is not None:
        seen &= key > query - window
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (6, 1)])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(
    ("num_decodes", "query_lens", "context_lens"),
    [
        (4, (1, 1, 1, 1), (1, 8, 9, 40)),
        (2, (1, 1), (16, 16)),
        (0, (10, 3), (10, 19)),
        (1, (1, 1, 13, 8), (30, 1, 13, 24)),
    ],
)
def test_each_query_sees_its_sequence_up_to_itself(
    dtype: torch.dtype,
    heads: tuple[int, int],
    window: int | None,
    num_decodes: int,
    query_lens: tuple[int, ...],
    context_lens: tuple[int, ...],
) -> None:
    num_heads, num_kv_heads = heads
    k_cache, v_cache = (torch.full((32, BLOCK_SIZE, num_kv_heads, 16), float("nan"), dtype=dtype) for _ in range(2))
    blocks = torch.randperm(32, generator=torch.Generator().manual_seed(0)).tolist()
    tables = torch.full((len(query_lens), 6), 31 if 31 not in blocks[:20] else 0, dtype=torch.int32)
    queries, expected = [], []
    for sequence, (count, context) in enumerate(zip(query_lens, context_lens, strict=True)):
        q = normal(count, num_heads, 16, dtype=dtype, seed=sequence)
        k, v = (normal(context, num_kv_heads, 16, dtype=dtype, seed=10 * part + sequence) for part in (1, 2))
        for index in range(0, context, BLOCK_SIZE):
            block = blocks.pop()
            tables[sequence, index // BLOCK_SIZE] = block
            filled = min(BLOCK_SIZE, context - index)
            k_cache[block, :filled], v_cache[block, :filled] = k[index : index + filled], v[index : index + filled]
        queries.append(q)
        expected.append(exact_attention(q, k, v, context - count, window))
    q = torch.cat((*queries, torch.zeros(2, num_heads, 16, dtype=dtype)))  # two rows of padding
    total = sum(query_lens)
    batch = PagedBatch(
        cu_seqlens=torch.tensor([sum(query_lens[:n]) for n in range(len(query_lens) + 1)], dtype=torch.int32),
        context_lens=torch.tensor(context_lens, dtype=torch.int32),
        block_tables=tables,
        slot_mapping=torch.zeros(total, dtype=torch.int64),
        num_decodes=num_decodes,
        query_lens=query_lens,
        context_lens_host=context_lens,
    )
    for _ in range(2):  # the second layer takes what the first derived
        attended = paged_attention(q, k_cache, v_cache, batch, SCALE, window)
        assert attended.dtype == dtype
        assert not attended[total:].any()
        error = (attended[:total].double() - torch.cat(expected)).abs().max()
        assert error <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(5,), (4, 4, 4), (8, 8, 2, 2, 6, 8), (1, 3, 3, 1)])
def test_patches_see_their_segment_and_nothing_else(dtype: torch.dtype, lengths: tuple[int, ...]) -> None:
    total = sum(lengths)
    heads = normal(total, 9, 20, dtype=dtype)
    q, k, v = heads.chunk(3, dim=1)  # strided, as they come from a fused projection
    attended = vision_attention(q, k, v, pack_segments(lengths, q.device), SCALE)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * SCALE
    scores = scores.masked_fill(segment[:, None] != segment, float("-inf"))
    exact = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.double())
    assert (attended.double() - exact).abs().max() <= 8 * torch.finfo(dtype).eps


def test_segments_that_do_not_add_up_are_refused() -> None:
    heads = torch.zeros(5, 2, 8)
    with pytest.raises(ValueError, match="segments of 4 patches"):
        vision_attention(heads, heads, heads, pack_segments((4,), heads.device), SCALE)
