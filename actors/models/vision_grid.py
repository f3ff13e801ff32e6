"""Where the patches of images lie and which of them attend to each other, from grid_thw alone (numpy only).

Patches come in the order of the image processors: frame by frame, merge blocks by row and column, and the
merge_size**2 patches of a block by row and column.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

GridThw = tuple[int, int, int]


def patch_positions(grid_thw: Sequence[GridThw], merge_size: int) -> NDArray[np.int64]:
    """Row and column of every patch in its frame, int64 [sum(t*h*w), 2]."""
    positions = []
    for frames, height, width in grid_thw:
        rows, columns = np.divmod(np.arange(height * width, dtype=np.int64), width)
        blocks = (height // merge_size, merge_size, width // merge_size, merge_size)
        frame = np.stack([axis.reshape(blocks).swapaxes(1, 2).reshape(-1) for axis in (rows, columns)], axis=1)
        positions.append(np.tile(frame, (frames, 1)))
    return np.concatenate(positions)


def frame_lengths(grid_thw: Sequence[GridThw]) -> tuple[int, ...]:
    """Patches of every frame: what a layer with full attention attends within."""
    return tuple(height * width for frames, height, width in grid_thw for _ in range(frames))


def window_layout(
    grid_thw: Sequence[GridThw], merge_size: int, window_cells: int
) -> tuple[NDArray[np.int64], tuple[int, ...]]:
    """An order of the merge blocks in which every attention window is contiguous, and the windows' lengths.

    window_cells: side of a window in merge blocks; windows at the right and bottom edges are smaller. A frame stays
    contiguous, so the same order serves full attention; in it windows of one length are neighbours, so they batch.
    Returns: block index at every place, int64 [sum(t*h*w) / merge_size**2], and patches per window.
    """
    orders = []
    lengths: list[int] = []
    first = 0
    for frames, height, width in grid_thw:
        order, frame_windows = _frame_windows(height // merge_size, width // merge_size, window_cells)
        for _ in range(frames):
            orders.append(order + first)
            lengths.extend(frame_windows)
            first += order.size
    return np.concatenate(orders), tuple(length * merge_size**2 for length in lengths)


def _frame_windows(rows: int, columns: int, side: int) -> tuple[NDArray[np.int64], list[int]]:
    """(blocks of one frame in window order, blocks per window), largest windows first."""
    row, column = np.divmod(np.arange(rows * columns, dtype=np.int64), columns)
    across = -(-columns // side)
    window = row // side * across + column // side
    size = np.bincount(window)
    order = np.lexsort((window, -size[window]))
    return order, np.sort(size)[::-1].tolist()
