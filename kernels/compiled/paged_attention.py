"""Attention of decode rows on a CPU, in float32, over the paged cache where it lies."""

import numpy as np
import torch
from torch import Tensor

from vlmrt.kernels.compiled.exponential import exponential
from vlmrt.kernels.compiled.jit import Floats, Integers, called, compiled, floats, ints, longs
from vlmrt.kernels.compiled.rotary import with_whole_tokens


def paged_decode_on_cpu(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    longest: int,
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    """Row i of q [S, Hq, D] sees the last tokens of sequence i; longest is the greatest of the context lengths.

    A row without context sees the first slot of its first block, as it does in the reference.
    """
    q, q_stride = with_whole_tokens(q)
    context_lens, block_tables = context_lens.contiguous(), block_tables.contiguous()
    assert context_lens.dtype == block_tables.dtype == torch.int32
    assert k_cache.is_contiguous()
    assert v_cache.is_contiguous()
    num_rows, num_heads, head_dim = q.shape
    _, block_size, num_kv_heads, _ = k_cache.shape
    out = q.new_empty(num_rows, num_heads, head_dim)
    longest = max(1, longest)
    scratch = q.new_empty((2 + num_heads) * longest)  # the tokens' places as int64, then the scores of each head
    _paged_decode(
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        context_lens.data_ptr(),
        block_tables.data_ptr(),
        scratch.data_ptr(),
        out.data_ptr(),
        q_stride,
        block_tables.shape[1],
        longest,
        sliding_window or longest,
        num_rows,
        num_heads,
        num_kv_heads,
        head_dim,
        block_size,
        scale,
    )
    return out


@called
def _find_places(places: Integers, table: Integers, start: int, stop: int, block_size: int, width: int) -> None:
    """Where in the cache each token of [start, stop) begins."""
    block, offset = start // block_size, start % block_size
    for token in range(stop - start):
        places[token] = (table[block] * block_size + offset) * width
        offset += 1
        if offset == block_size:
            block, offset = block + 1, 0


# Four tokens at a time, for a loop over one head of one token is short: 8 rows of 12 heads of 128 take 630 us, not 740.
@called
def _score_four(
    query: Floats, k0: Floats, k1: Floats, k2: Floats, k3: Floats, head_dim: int, scale: float, scores: Floats
) -> None:
    dot0 = dot1 = dot2 = dot3 = np.float32(0)
    for i in range(head_dim):
        dot0 += query[i] * k0[i]
        dot1 += query[i] * k1[i]
        dot2 += query[i] * k2[i]
        dot3 += query[i] * k3[i]
    scores[0], scores[1] = dot0 * np.float32(scale), dot1 * np.float32(scale)
    scores[2], scores[3] = dot2 * np.float32(scale), dot3 * np.float32(scale)


@called
def _softmax(scores: Floats, count: int) -> None:
    most = scores[0]
    for i in range(count):
        most = scores[i] if scores[i] > most else most
    total = np.float32(0)
    for i in range(count):
        weight = exponential(scores[i] - most)
        scores[i] = weight
        total += weight
    for i in range(count):
        scores[i] /= total


@compiled(16, 1)
def _paged_decode(
    q: int,
    k_cache: int,
    v_cache: int,
    context_lens: int,
    block_tables: int,
    scratch: int,
    out: int,
    q_stride: int,
    table_stride: int,
    longest: int,
    window: int,
    num_rows: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    scale: float,
) -> None:
    lengths = ints(context_lens, 0)
    group = num_heads // num_kv_heads
    width = num_kv_heads * head_dim
    places = longs(scratch, 0)
    for row in range(num_rows):
        stop = max(1, lengths[row])
        start = max(0, stop - window)
        count = stop - start
        fours = count - count % 4
        _find_places(places, ints(block_tables, row * table_stride), start, stop, block_size, width)
        for token in range(0, fours, 4):
            p0, p1, p2, p3 = places[token], places[token + 1], places[token + 2], places[token + 3]
            for head in range(num_heads):
                at = head // group * head_dim
                k0, k1 = floats(k_cache, p0 + at), floats(k_cache, p1 + at)
                k2, k3 = floats(k_cache, p2 + at), floats(k_cache, p3 + at)
                query, scores = (
                    floats(q, row * q_stride + head * head_dim),
                    floats(scratch, (2 + head) * longest + token),
                )
                _score_four(query, k0, k1, k2, k3, head_dim, scale, scores)
        for token in range(fours, count):
            for head in range(num_heads):
                key = floats(k_cache, places[token] + head // group * head_dim)
                query = floats(q, row * q_stride + head * head_dim)
                dot = np.float32(0)
                for i in range(head_dim):
                    dot += query[i] * key[i]
                floats(scratch, (2 + head) * longest)[token] = dot * np.float32(scale)
        for head in range(num_heads):
            _softmax(floats(scratch, (2 + head) * longest), count)
        attended = floats(out, row * num_heads * head_dim)
        for i in range(num_heads * head_dim):
            attended[i] = np.float32(0)
        for token in range(0, fours, 4):
            p0, p1, p2, p3 = places[token], places[token + 1], places[token + 2], places[token + 3]
            for head in range(num_heads):
                at = head // group * head_dim
                v0, v1 = floats(v_cache, p0 + at), floats(v_cache, p1 + at)
                v2, v3 = floats(v_cache, p2 + at), floats(v_cache, p3 + at)
                weights = floats(scratch, (2 + head) * longest + token)
                w0, w1, w2, w3 = weights[0], weights[1], weights[2], weights[3]
                total = floats(out, (row * num_heads + head) * head_dim)
                for i in range(head_dim):
                    total[i] += w0 * v0[i] + w1 * v1[i] + w2 * v2[i] + w3 * v3[i]
        for token in range(fours, count):
            for head in range(num_heads):
                value = floats(v_cache, places[token] + head // group * head_dim)
                weight = floats(scratch, (2 + head) * longest)[token]
                total = floats(out, (row * num_heads + head) * head_dim)
                for i in range(head_dim):
                    total[i] += weight * value[i]
