"""Qwen2.5-VL from a checkpoint's files: Qwen2-VL's language model beside a tower of its own."""

from collections.abc import Callable

import torch

from vlmrt.actors.models.checkpoint_files import WeightFiles
from vlmrt.actors.models.config import ModelConfig
from vlmrt.actors.models.qwen2_5_vl.vision import vision_tower
from vlmrt.actors.models.qwen2_vl.loading import load_language, load_tower
from vlmrt.actors.models.vision_tower import VisionTower

__all__ = ["load_language", "load_vision"]


def load_vision(
    files: WeightFiles,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
) -> VisionTower:
    """The whole vision tower. Raises CheckpointError if the files do not hold it."""
    tower = vision_tower(config.vision, dtype, device)
    load_tower(tower, files, progress)
    return tower
