"""Attention within each segment of a packed batch as one batched call by index tensors: what an exported tower runs.

Segments of any lengths lie in rows of one length, several short ones to a row, and a mask keeps them apart. So the work
grows with the patches times the row's length, which is that of the longest segment, not with the square of the batch.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


class RowLayout(NamedTuple):
    """Where T patches lie among the cells of rows; on the host."""

    patch: NDArray[np.int64]  # [num_rows, row_length], the patch in each cell; 0 in empty ones
    segment: NDArray[np.int64]  # [num_rows, row_length], the segment that it is of; -1 in empty ones
    cell: NDArray[np.int64]  # [T], each patch's cell, counted through the rows


class SegmentRows(NamedTuple):
    """A RowLayout on the device."""

    patch: Tensor
    segment: Tensor
    cell: Tensor


def most_rows(num_patches: int, row_length: int) -> int:
    """No layout of so many patches has more rows: any two hold more than one row's length together."""
    return max(1, -(-2 * num_patches // row_length))


def row_layout(order: NDArray[np.int64], lengths: Sequence[int], row_length: int) -> RowLayout:
    """Share segments out among rows: the longest first, each into the row with the most room.

    order: every patch once, the first segment's before the second's. lengths: of the segments.
    Raises: ValueError if a segment is empty or longer than a row, or the lengths do not add up.
    """
    if sum(lengths) != len(order):
        raise ValueError(f"segments of {sum(lengths)} patches in all, but there are {len(order)}")
    if not lengths or not 0 < min(lengths) <= max(lengths) <= row_length:
        raise ValueError(f"segments of {lengths} patches in rows of {row_length}")
    length = np.asarray(lengths, dtype=np.int64)
    start = np.empty_like(length)  # the first cell of each segment
    rows: list[tuple[int, int]] = [(0, -1)]  # (minus its room, row) of each, the most room first; at the start, none
    num_rows = 0
    for index in np.argsort(-length, kind="stable").tolist():
        room, row = -rows[0][0], rows[0][1]
        taken = lengths[index]
        if room >= taken:
            heapq.heapreplace(rows, (taken - room, row))
        else:
            room, row = row_length, num_rows
            num_rows += 1
            heapq.heappush(rows, (taken - room, row))
        start[index] = (row + 1) * row_length - room
    cells = np.repeat(start - (np.cumsum(length) - length), length) + np.arange(len(order))
    patch = np.zeros(num_rows * row_length, np.int64)
    segment = np.full(num_rows * row_length, -1, np.int64)
    cell = np.empty(len(order), np.int64)
    patch[cells] = order
    segment[cells] = np.repeat(np.arange(len(length)), length)
    cell[order] = cells
    return RowLayout(patch.reshape(num_rows, row_length), segment.reshape(num_rows, row_length), cell)


def segment_rows_attention(q: Tensor, k: Tensor, v: Tensor, rows: SegmentRows, scale: float) -> Tensor:
    """softmax(q k^T * scale) v within each segment, in torch's operators only.

    Shapes: q, k, v [T, H, D], rows of T patches -> [T, H, D], same dtype.

    Empty cells attend to each other: a softmax over nothing would be NaN.
    """
    num_rows, row_length = rows.patch.shape
    num_heads, head_dim = q.shape[1:]
    patch = rows.patch.reshape(-1)
    queries, keys, values = (
        x.index_select(0, patch).reshape(num_rows, row_length, num_heads, head_dim).transpose(1, 2) for x in (q, k, v)
    )
    together = rows.segment[:, None, :, None] == rows.segment[:, None, None, :]
    attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=together, scale=scale)
    return attended.transpose(1, 2).reshape(num_rows * row_length, num_heads, head_dim).index_select(0, rows.cell)
