"""Qwen2-VL from a checkpoint's files."""

from collections.abc import Callable

import torch

from vlmrt.actors.models.checkpoint_files import WeightFiles
from vlmrt.actors.models.config import ModelConfig
from vlmrt.actors.models.layers import TensorParallel
from vlmrt.actors.models.qwen2_vl.language import LanguageModel
from vlmrt.actors.models.qwen2_vl.vision import vision_tower
from vlmrt.actors.models.registry import check_tensor_parallel
from vlmrt.actors.models.vision_tower import VisionTower
from vlmrt.actors.models.weights import load_weights

VISION_PREFIX = "visual."


def load_language(
    files: WeightFiles,
    config: ModelConfig,
    tp: TensorParallel,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
) -> LanguageModel:
    """This rank's part of the language model. progress gets (bytes read, bytes to read).

    Raises: CheckpointError if the files do not hold this model or tp does not divide it.
    """
    check_tensor_parallel(config, tp.size)
    model = LanguageModel(config.text, tp, dtype, device)

    def select(name: str) -> bool:
        if name == "lm_head.weight" and config.text.tie_word_embeddings:
            return False  # some tools write the tied copy out
        # old files hold the rotary frequencies, which follow from rope_theta
        return not name.startswith(VISION_PREFIX) and not name.endswith("rotary_emb.inv_freq")

    load_weights(dict(model.targets()), files, select, progress)
    return model


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


def load_tower(tower: VisionTower, files: WeightFiles, progress: Callable[[int, int], None] | None) -> None:
    """Fill a family's tower from the files."""

    def select(name: str) -> bool:
        return name.startswith(VISION_PREFIX) and not name.endswith("inv_freq")

    load_weights(dict(tower.targets()), files, select, progress)
