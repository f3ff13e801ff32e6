"""Attention within each image or window of a packed batch of patches."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vlmrt.kernels.segment_rows import SegmentRows, segment_rows_attention
from vlmrt.kernels.transfer import to_device

SHORT_SEGMENT = 64  # patches: a whole window of Qwen2.5-VL
LONG_TILE, SHORT_TILE = 128, 64


@dataclass(frozen=True, slots=True)
class Segments:
    """Which patches attend to each other: neighbours within one segment."""

    lengths: tuple[int, ...]
    tile: int  # queries that one program of the kernel takes
    tiles: Tensor | None  # see tile_table; behind its own may come empty ones; None where the kernel does not run


def tile_table(lengths: Sequence[int], tile: int) -> NDArray[np.int32]:
    """(first query, first key, past the last key) of every tile of queries, int32 [num_tiles, 3].

    Tiles of the longest segments come first, so that what is started last is short.
    """
    length = np.asarray(lengths, dtype=np.int64)
    stop = np.cumsum(length)
    count = -(-length // tile)
    order = np.argsort(-length, kind="stable")
    segment = np.repeat(order, count[order])
    nth = np.arange(len(segment)) - np.repeat(np.cumsum(count[order]) - count[order], count[order])
    start = (stop - length)[segment]
    return np.stack((start + nth * tile, start, stop[segment]), axis=1).astype(np.int32)


def tile_for(longest: int) -> int:
    """Queries that a program takes of segments up to this length."""
    return SHORT_TILE if longest <= SHORT_SEGMENT else LONG_TILE


def pack_segments(lengths: Sequence[int], device: torch.device, tile: int | None = None) -> Segments:
    """Lay out segments of these lengths, one after the other, for a device; made once for all layers of a batch.

    tile: in place of the one that suits the lengths.
    """
    tile = tile_for(max(lengths, default=0)) if tile is None else tile
    tiles = to_device(tile_table(lengths, tile), device) if device.type == "cuda" else None
    return Segments(tuple(lengths), tile, tiles)


def vision_attention_reference(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """Runs of segments of one length share one batched call."""
    num_heads, head_dim = q.shape[1:]
    outputs = []
    start = 0
    for length, run in groupby(lengths):
        count = sum(1 for _ in run)
        stop = start + count * length
        if stop > start:
            shape = (count, length, num_heads, head_dim)
            queries, keys, values = (x[start:stop].view(shape).transpose(1, 2) for x in (q, k, v))
            attended = F.scaled_dot_product_attention(queries, keys, values, scale=scale)
            outputs.append(attended.transpose(1, 2).reshape(count * length, num_heads, head_dim))
        start = stop
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def vision_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments | SegmentRows, scale: float) -> Tensor:
    """softmax(q k^T * scale) v within each segment, every patch seeing its whole segment.

    Shapes: q, k, v [T, H, D], rows of D contiguous, segments from pack_segments on their device -> [T, H, D], same
    dtype. Segments of one length are cheapest as neighbours.
    Raises: ValueError if the segments do not add up to T.

    SegmentRows are for a tower that is traced. On CUDA a kernel of our own takes every mix of lengths in one launch.
    cuDNN's attention is quick too, but builds a plan for each new (number of segments, length), and almost every batch
    of users' pictures is a new one. float32 takes torch's attention, whose products keep all 24 bits.
    """
    if isinstance(segments, SegmentRows):
        return segment_rows_attention(q, k, v, segments, scale)
    if sum(segments.lengths) != q.shape[0]:
        raise ValueError(f"segments of {sum(segments.lengths)} patches in all, but q has {q.shape[0]}")
    if q.device.type == "cuda" and q.dtype != torch.float32:
        from vlmrt.kernels.triton.vision_attention import vision_attention_triton

        assert segments.tiles is not None
        return vision_attention_triton(q, k, v, segments.tiles, segments.tile, scale)
    return vision_attention_reference(q, k, v, segments.lengths, scale)
