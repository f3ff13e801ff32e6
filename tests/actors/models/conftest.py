"""Tiny random checkpoints of both families, and what transformers makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers

from vlmrt.actors.models.checkpoint_files import check_weight_files
from vlmrt.actors.models.config import ModelConfig
from vlmrt.actors.models.layers import TensorParallel
from vlmrt.actors.models.qwen2_vl.language import LanguageModel
from vlmrt.actors.models.registry import family, load_model_config
from vlmrt.actors.models.vision_tower import VisionTower
from vlmrt.tools.checkpoint import make_checkpoint

PRESETS = ("test-qwen2-vl", "test-qwen2.5-vl")
CPU = torch.device("cpu")


class Models(NamedTuple):
    """Ours and the reference's, from one directory, in float32."""

    directory: Path
    config: ModelConfig
    tower: VisionTower
    language: LanguageModel
    reference: Any


def load(directory: Path) -> Models:
    config = load_model_config(directory)
    files = check_weight_files(directory)
    loaders = family(config.model_type)
    transformers.utils.logging.disable_progress_bar()
    reference = transformers.AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    return Models(
        directory,
        config,
        loaders.load_vision(files, config, CPU, torch.float32),
        loaders.load_language(files, config, TensorParallel(), CPU, torch.float32),
        reference,
    )


@pytest.fixture(scope="session", params=PRESETS)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    directory = make_checkpoint(tmp_path_factory.mktemp("checkpoint"), request.param)
    return load(directory)
