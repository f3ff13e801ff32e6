"""Full-size towers on a GPU in bfloat16: no further from float32 than transformers' own, and no wait inside a layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from benchmarks.vision_shapes import random_tower
from benchmarks.vit import PROCESSING
from vlmrt.actors.models.vision_grid import GridThw
from vlmrt.actors.models.vision_tower import VisionTower
from vlmrt.actors.vit.engines.engine import Pixels
from vlmrt.actors.vit.engines.torch import TorchEngine
from vlmrt.kernels.patchify import patchify
from vlmrt.tools.checkpoint.presets import PRESETS, config_json

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GPU = torch.device("cuda:0")
GRIDS: list[GridThw] = [(1, 32, 32), (1, 10, 62), (1, 34, 46), (1, 2, 2), (2, 20, 24), (1, 34, 46)]
REFERENCES = {
    "qwen2-vl-2b": Qwen2VisionTransformerPretrainedModel,
    "qwen2.5-vl-7b": Qwen2_5_VisionTransformerPretrainedModel,
}


def reference_tower(preset: str, tower: VisionTower, dtype: torch.dtype) -> Any:
    """transformers' tower with the weights of ours."""
    kind: Any = REFERENCES[preset]
    config = kind.config_class(**config_json(PRESETS[preset], "bfloat16")["vision_config"])
    transformers.utils.logging.set_verbosity_error()
    with torch.device(GPU):
        reference = kind._from_config(config, attn_implementation="sdpa").to(dtype).eval()
    parameters = dict(reference.named_parameters())
    for name, target in tower.targets():
        parameters.pop(name.removeprefix("visual.")).copy_(target.into.reshape(target.shape))
    assert not parameters
    return reference


def pictures() -> list[Pixels]:
    draw = np.random.default_rng(0)
    return [
        draw.integers(0, 256, (2 * frames if frames > 1 else 1, 14 * height, 14 * width, 3), dtype=np.uint8)
        for frames, height, width in GRIDS
    ]


@torch.inference_mode()
@pytest.mark.parametrize("preset", sorted(REFERENCES))
def test_rows_in_bfloat16_are_as_exact_as_the_references(preset: str) -> None:
    tower = random_tower(preset, GPU)
    images = pictures()
    pixel_values = patchify([torch.from_numpy(image).to(GPU) for image in images], PROCESSING)
    grid_thw = torch.tensor(GRIDS, device=GPU)

    def rows_of_reference(dtype: torch.dtype) -> Tensor:
        reference = reference_tower(preset, tower, dtype)
        rows: Tensor = reference(pixel_values.to(dtype), grid_thw=grid_thw).pooler_output
        return rows.float()

    engine = TorchEngine(tower, PROCESSING, GPU, 0.008)
    run = engine.prepare(images, GRIDS)
    while not engine.run_quantum(run):
        pass
    exact, theirs = (rows_of_reference(dtype) for dtype in (torch.float32, torch.bfloat16))
    ours_off, theirs_off = (
        ((rows - exact).norm() / exact.norm()).item() for rows in (engine.rows(run).float(), theirs)
    )
    print(f"{preset}: ours {ours_off:.2e} from float32, transformers' {theirs_off:.2e}")
    assert ours_off <= 1.2 * theirs_off


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@torch.inference_mode()
@pytest.mark.parametrize("preset", sorted(REFERENCES))
def test_no_layer_waits_for_the_device(preset: str) -> None:
    tower = random_tower(preset, GPU)
    state = tower.prepare(torch.randn(4 * 6 + 20 * 20, tower.config.patch_dim, device=GPU), [(1, 4, 6), (1, 20, 20)])
    tower.run_layers(state, 0, 1)  # loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        tower.finish(tower.run_layers(state, 1, tower.num_layers))
    finally:
        torch.cuda.set_sync_debug_mode("default")
