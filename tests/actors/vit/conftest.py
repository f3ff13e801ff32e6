"""Two random checkpoints and transformers' towers of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from vlmrt.actors.models.config import ImageProcessing, ModelConfig
from vlmrt.actors.models.registry import load_image_processing, load_model_config
from vlmrt.actors.models.vision_grid import GridThw
from vlmrt.actors.vit.engines.engine import Pixels
from vlmrt.tools.checkpoint import make_checkpoint

PRESETS = ("test-qwen2-vl", "test-qwen2.5-vl")
MAX_CELLS = 9  # merge blocks along a side: more than two windows, and no multiple of them


@dataclass
class Checkpoint:
    directory: Path
    config: ModelConfig
    processing: ImageProcessing
    reference_tower: Any


def load_checkpoint(preset: str, directory: Path) -> Checkpoint:
    make_checkpoint(directory, preset, dtype="float32")
    transformers.utils.logging.disable_progress_bar()
    reference = transformers.AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    config = load_model_config(directory)
    return Checkpoint(directory, config, load_image_processing(directory), reference.model.visual)


@pytest.fixture(scope="session", params=PRESETS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(request.param, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def one_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(PRESETS[0], tmp_path_factory.mktemp("checkpoint"))


def mixed_batch(seed: int) -> tuple[list[Pixels], list[GridThw]]:
    """One to six images and clips of sizes of their own."""
    draw = np.random.default_rng(seed)
    images: list[Pixels] = []
    grids: list[GridThw] = []
    for _ in range(draw.integers(1, 7)):
        frames = int(draw.choice([1, 1, 1, 2, 4]))
        height, width = (2 * int(cells) for cells in draw.integers(1, MAX_CELLS + 1, 2))
        images.append(draw.integers(0, 256, (frames, 14 * height, 14 * width, 3), dtype=np.uint8))
        grids.append((-(-frames // 2), height, width))
    return images, grids
