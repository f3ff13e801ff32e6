"""Full-size vision towers with random weights, made on the device, and the batches that they are timed on."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import msgspec
import torch

from vlmrt.actors.models.config import ImageProcessing, VisionConfig
from vlmrt.actors.models.qwen2_5_vl import vision as qwen2_5_vl_vision
from vlmrt.actors.models.qwen2_vl import vision as qwen2_vl_vision
from vlmrt.actors.models.registry import load_model_config
from vlmrt.actors.models.vision_grid import GridThw, frame_lengths, window_layout
from vlmrt.actors.models.vision_tower import VisionTower
from vlmrt.tools.checkpoint.presets import PRESETS, config_json

TOWERS = {"qwen2-vl-2b": qwen2_vl_vision.vision_tower, "qwen2.5-vl-7b": qwen2_5_vl_vision.vision_tower}
MIXED: list[GridThw] = [(1, 34, 46), (1, 32, 32), (1, 16, 24), (1, 92, 68), (1, 10, 62), (1, 34, 46), (1, 20, 20)]
BATCHES: dict[str, list[GridThw]] = {
    "1 x 1024": [(1, 32, 32)],
    "8 x 1024": [(1, 32, 32)] * 8,
    "16 x 1024": [(1, 32, 32)] * 16,
    "5 x 640x480": [(1, 34, 46)] * 5,
    "1 x 1280x960": [(1, 68, 92)],
    "7 mixed": MIXED,
}
PROCESSING = ImageProcessing(
    min_pixels=3136,
    max_pixels=12_845_056,
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    image_mean=(0.48145466, 0.4578275, 0.40821073),
    image_std=(0.26862954, 0.26130258, 0.27577711),
    rescale_factor=1 / 255,
)
FLOPS_PER_S = 785e12  # the most that a large bfloat16 product reached on an H100


def vision_config(preset: str) -> VisionConfig:
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(config_json(PRESETS[preset], "bfloat16")))
        return load_model_config(Path(directory)).vision


def random_tower(
    preset: str, device: torch.device, dtype: torch.dtype = torch.bfloat16, depth: int | None = None
) -> VisionTower:
    """Weights as a trained tower's are sized: activations keep their scale through all layers.

    depth: fewer layers than the preset's.
    """
    config = vision_config(preset)
    config = msgspec.structs.replace(config, depth=depth or config.depth)
    tower = TOWERS[preset](config, dtype, device)
    generator = torch.Generator(device).manual_seed(0)
    for name, target in tower.targets():
        if "norm" in name or "ln_q" in name:
            target.into.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            target.into.normal_(0.0, 0.02, generator=generator)
    return tower


def num_patches(grids: list[GridThw]) -> int:
    return sum(frames * height * width for frames, height, width in grids)


def attention_lengths(config: VisionConfig, grids: list[GridThw], layer: int) -> tuple[int, ...]:
    """Lengths of the segments that a layer attends within."""
    if config.window_size is None or layer in config.fullatt_block_indexes:
        return frame_lengths(grids)
    cells = config.window_size // config.patch_size // config.spatial_merge_size
    return window_layout(grids, config.spatial_merge_size, cells)[1]


def tower_flops(config: VisionConfig, grids: list[GridThw]) -> float:
    """Of the products of still images, from patches to rows."""
    patches, width = num_patches(grids), config.embed_dim
    mlp = (3 if config.norm == "rms_norm" else 2) * width * config.intermediate_size
    merged = config.spatial_merge_size**2
    per_patch = width * config.in_channels * config.patch_size**2 + config.depth * (4 * width**2 + mlp)
    per_patch += merged * width**2 + width * config.out_hidden_size
    squares = sum(length**2 for layer in range(config.depth) for length in attention_lengths(config, grids, layer))
    return 2.0 * patches * per_patch + 4.0 * squares * width
