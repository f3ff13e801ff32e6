"""What an exported tower is given: the patches of a batch of any sizes, and tensors that say where each one lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmrt.actors.models.config import VisionConfig
from vlmrt.actors.models.vision_grid import GridThw, frame_lengths, patch_positions, window_layout
from vlmrt.actors.models.vision_tower import check_grids, inverse_frequency, turned_by
from vlmrt.actors.vit.engines.engine_files import MAX_FRAME_PATCHES
from vlmrt.kernels.segment_rows import SegmentRows, row_layout
from vlmrt.kernels.transfer import all_to_device

ROW_UNIT = 16  # patches; what rows are padded to where any length will do


class TowerInputs(NamedTuple):
    """In the order of the exported graph's inputs; the field names are theirs."""

    patches: Tensor  # [num_patches, patch_dim], in the processors' order
    cos: Tensor  # float32 [num_patches, head_dim], as VisionState's
    sin: Tensor
    frame_patch: Tensor  # as SegmentRows', of the frames
    frame_segment: Tensor
    frame_cell: Tensor
    window_patch: Tensor | None = None  # of the windows, in towers that have them
    window_segment: Tensor | None = None
    window_cell: Tensor | None = None

    @property
    def frames(self) -> SegmentRows:
        return SegmentRows(self.frame_patch, self.frame_segment, self.frame_cell)

    @property
    def windows(self) -> SegmentRows | None:
        if self.window_patch is None or self.window_segment is None or self.window_cell is None:
            return None
        return SegmentRows(self.window_patch, self.window_segment, self.window_cell)

    def named(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self._asdict().items() if tensor is not None}


class InputLayout:
    """Batches -> inputs of one tower, on the device of their patches."""

    def __init__(self, vision: VisionConfig, device: torch.device, row_lengths: Sequence[int] = ()) -> None:
        """row_lengths: those that rows of frames may have, ascending; none: any multiple of ROW_UNIT."""
        self._vision = vision
        self._row_lengths = row_lengths
        self._frequency = inverse_frequency(vision, device)

    @property
    def max_frame_patches(self) -> int:
        return self._row_lengths[-1] if self._row_lengths else MAX_FRAME_PATCHES

    def inputs(self, patches: Tensor, grids: Sequence[GridThw]) -> TowerInputs:
        """Raises: ValueError if the grids do not describe the patches, or a frame has too many of them."""
        merge = self._vision.spatial_merge_size
        check_grids(len(patches), grids, merge)
        in_order = np.arange(len(patches), dtype=np.int64)
        lengths = frame_lengths(grids)
        layouts = [row_layout(in_order, lengths, self._row_length(max(lengths)))]
        cells = self._vision.window_cells
        if cells is not None:
            blocks, lengths = window_layout(grids, merge, cells)
            unit = np.arange(merge**2, dtype=np.int64)
            layouts.append(row_layout((blocks[:, None] * merge**2 + unit).reshape(-1), lengths, (cells * merge) ** 2))
        cos, sin = turned_by(patch_positions(grids, merge), self._frequency)
        arrays: list[NDArray[np.int64]] = [array for layout in layouts for array in layout]
        return TowerInputs(patches, cos, sin, *all_to_device(arrays, patches.device))

    def _row_length(self, longest: int) -> int:
        if longest > self.max_frame_patches:
            raise ValueError(f"a frame of {longest} patches; this engine takes at most {self.max_frame_patches}")
        if self._row_lengths:
            return next(length for length in self._row_lengths if length >= longest)
        return -(-longest // ROW_UNIT) * ROW_UNIT
