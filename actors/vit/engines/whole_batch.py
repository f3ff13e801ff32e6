"""Engines that run all layers in one call: pixels -> inputs of an exported tower -> rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from vlmrt.actors.models.config import ImageProcessing, VisionConfig
from vlmrt.actors.vit.engines.engine import GridThw, Pixels, pixels_on
from vlmrt.actors.vit.engines.tower_inputs import InputLayout, TowerInputs
from vlmrt.kernels.patchify import patchify


class TowerSession(Protocol):
    """An exported tower that another runtime has loaded."""

    @property
    def row_lengths(self) -> Sequence[int]:
        """Those that rows of frames may have, ascending; none: any."""
        ...

    def run(self, inputs: TowerInputs, rows: Tensor) -> None:
        """Fill rows [num_patches / merge_size**2, out_hidden_size]; on a GPU, queue what does on the current stream."""
        ...


@dataclass(slots=True)
class WholeBatchRun:
    calls: list[TowerInputs]  # those to make, in order
    rows: list[Tensor] = field(default_factory=list)  # of those that were made


class WholeBatchEngine:
    """A VisionEngine whose quantum is a call of max_call_patches patches, or of one image."""

    def __init__(
        self,
        session: TowerSession,
        vision: VisionConfig,
        processing: ImageProcessing,
        device: torch.device,
        dtype: torch.dtype,
        max_call_patches: int,
    ) -> None:
        self._session = session
        self._vision = vision
        self._processing = processing
        self._device = device
        self._dtype = dtype
        self._max_call_patches = max_call_patches
        self._layout = InputLayout(vision, device, session.row_lengths)

    def prepare(self, images: Sequence[Pixels], grids: Sequence[GridThw]) -> WholeBatchRun:
        with torch.inference_mode():
            frames = pixels_on(self._device, images)
            return WholeBatchRun([self._inputs(frames[part], grids[part]) for part in self._parts(grids)])

    def run_quantum(self, run: WholeBatchRun) -> bool:
        inputs = run.calls.pop(0)
        with torch.inference_mode():
            num_rows = len(inputs.patches) // self._vision.spatial_merge_size**2
            rows = torch.empty(num_rows, self._vision.out_hidden_size, dtype=self._dtype, device=self._device)
            self._session.run(inputs, rows)
        run.rows.append(rows)
        return not run.calls

    def rows(self, run: WholeBatchRun) -> Tensor:
        if run.calls:
            raise ValueError(f"{len(run.calls)} calls have not been made")
        with torch.inference_mode():
            return run.rows[0] if len(run.rows) == 1 else torch.cat(run.rows)

    def _inputs(self, frames: Sequence[Tensor], grids: Sequence[GridThw]) -> TowerInputs:
        return self._layout.inputs(patchify(frames, self._processing, self._dtype), grids)

    def _parts(self, grids: Sequence[GridThw]) -> list[slice]:
        """The images of each call."""
        parts: list[slice] = []
        first = num_patches = 0
        for index, grid in enumerate(grids):
            count = math.prod(grid)
            if index > first and num_patches + count > self._max_call_patches:
                parts.append(slice(first, index))
                first, num_patches = index, 0
            num_patches += count
        return [*parts, slice(first, len(grids))]
