"""A vision tower as one function of tensors, and that function in ONNX."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmrt.actors.models.vision_grid import GridThw
from vlmrt.actors.models.vision_tower import VisionTower
from vlmrt.actors.vit.engines.engine_files import NATIVE_OPSET, ONNX_FILE
from vlmrt.actors.vit.engines.tower_inputs import InputLayout, TowerInputs

ROWS = "rows"  # the graph's output


class TracedTower(nn.Module):
    """The tower's own layers on TowerInputs: no index is computed, no size looked at."""

    def __init__(self, tower: VisionTower) -> None:
        super().__init__()
        self.tower = tower
        self.shifts: Tensor
        self.register_buffer("shifts", tower.shifts())

    def forward(self, *inputs: Tensor) -> Tensor:
        """TowerInputs, without those that are None -> [num_patches / spatial_merge_size**2, out_hidden_size]."""
        given = TowerInputs(*inputs)
        x = self.tower.embed(given.patches)
        windows = given.windows
        for layer, block in enumerate(self.tower.blocks):
            segments = given.frames if windows is None or self.tower.config.sees_frames(layer) else windows
            block(x, given.cos, given.sin, segments, self.shifts[2 * layer : 2 * layer + 2])
        rows: Tensor = self.tower.merger(x, self.shifts[-1])
        return rows


def export_tower(tower: VisionTower, directory: Path, opset: int = NATIVE_OPSET) -> Path:
    """Write a tower that lies on the CPU as ONNX_FILE, its weights beside it; returns the file, checked.

    The numbers of patches, of rows and the length of the frames' rows are left open.
    """
    import onnx

    inputs = _example(tower)
    file = directory / ONNX_FILE
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it names operators of packages that nobody asked for
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter about itself
        program = torch.onnx.export(
            TracedTower(tower).eval(),
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=[ROWS],
            opset_version=opset,
            dynamic_shapes=(tuple(_open_sizes(tower, inputs)),),
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.save(file, external_data=True)
    onnx.checker.check_model(file, full_check=True)
    return file


def _example(tower: VisionTower) -> dict[str, Tensor]:
    """A batch of sizes that are all different, so that none is taken for another."""
    config = tower.config
    merge = config.spatial_merge_size
    grids: Sequence[GridThw] = [(1, 2 * merge, 9 * merge), (1, 3 * merge, 2 * merge), (2, 5 * merge, 3 * merge)]
    num_patches = sum(frames * height * width for frames, height, width in grids)
    patches = torch.zeros(num_patches, config.patch_dim, dtype=tower.patch_embed.dtype)
    return InputLayout(config, patches.device).inputs(patches, grids).named()


def _open_sizes(tower: VisionTower, inputs: dict[str, Tensor]) -> list[dict[int, Any]]:
    blocks = torch.export.Dim("num_blocks")
    num_patches = tower.config.spatial_merge_size**2 * blocks
    frame_rows, frame_row, window_rows = (
        torch.export.Dim(name) for name in ("num_frame_rows", "frame_row_length", "num_window_rows")
    )
    cells = {
        "frame_patch": {0: frame_rows, 1: frame_row},
        "frame_segment": {0: frame_rows, 1: frame_row},
        "window_patch": {0: window_rows},
        "window_segment": {0: window_rows},
    }
    return [cells.get(name, {0: num_patches}) for name in inputs]
