"""Attention within each image or window of a packed batch of patches."""

from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor


def vision_attention_reference(q: Tensor, k: Tensor, v: Tensor, seqlens_host: tuple[int, ...], scale: float) -> Tensor:
    """Runs of segments of one length share one batched call."""
    num_heads, head_dim = q.shape[1:]
    outputs = []
    start = 0
    for length, run in groupby(seqlens_host):
        count = sum(1 for _ in run)
        stop = start + count * length
        if stop > start:
            shape = (count, length, num_heads, head_dim)
            queries, keys, values = (x[start:stop].view(shape).transpose(1, 2) for x in (q, k, v))
            attended = F.scaled_dot_product_attention(queries, keys, values, scale=scale)
            outputs.append(attended.transpose(1, 2).reshape(count * length, num_heads, head_dim))
        start = stop
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def vision_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, seqlens_host: tuple[int, ...], scale: float
) -> Tensor:
    """softmax(q k^T * scale) v within each segment, every patch seeing its whole segment.

    Shapes: q, k, v [T, H, D], cu_seqlens int32 [S+1] prefix sums of segment lengths, seqlens_host the same lengths
    on the host -> [T, H, D], same dtype. Segments of one length are cheapest as neighbours.
    Raises: ValueError if the segments do not add up to T.
    """
    if sum(seqlens_host) != q.shape[0]:
        raise ValueError(f"segments of {sum(seqlens_host)} patches in all, but q has {q.shape[0]}")
    return vision_attention_reference(q, k, v, seqlens_host, scale)
