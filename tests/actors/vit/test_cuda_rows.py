"""Full-size towers on a GPU in bfloat16: no further from float32 than transformers' own, and no wait inside a layer."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from benchmarks.vision_shapes import PROCESSING, random_tower
from vlmrt.actors.models.vision_grid import GridThw
from vlmrt.actors.models.vision_tower import VisionTower
from vlmrt.actors.vit.engines.engine import Pixels
from vlmrt.actors.vit.engines.torch import TorchEngine
from vlmrt.actors.vit.engines.tower_graphs import TowerGraphs
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


def pictures(grids: Sequence[GridThw] = GRIDS) -> list[Pixels]:
    draw = np.random.default_rng(0)
    return [
        draw.integers(0, 256, (2 * frames if frames > 1 else 1, 14 * height, 14 * width, 3), dtype=np.uint8)
        for frames, height, width in grids
    ]


def encode(engine: TorchEngine, batches: Sequence[list[GridThw]]) -> list[Tensor]:
    """Rows of each batch; all are prepared before the first one runs."""
    runs = [engine.prepare(pictures(grids), grids) for grids in batches]
    rows = []
    for run in runs:
        while not engine.run_quantum(run):
            pass
        rows.append(engine.rows(run))
    return rows


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


WHOLE: list[GridThw] = [(1, 32, 32), (1, 16, 32), (1, 16, 32)]  # a recorded count, 2,048
BATCHES: list[list[GridThw]] = [GRIDS, [(1, 6, 10)], WHOLE, [(1, 4, 4)] * 40, [(1, 92, 68), (1, 2, 60)], GRIDS]


@torch.inference_mode()
@pytest.mark.parametrize("quantum_s", [1e-9, 1e3])
@pytest.mark.parametrize("preset", sorted(REFERENCES))
def test_recorded_layers_are_as_exact_as_launched_ones_whatever_lies_in_the_padding(
    preset: str, quantum_s: float
) -> None:
    tower = random_tower(preset, GPU)
    graphs = TowerGraphs(tower, (128, 640, 2048, 6400))
    buffers = graphs.buffers
    for buffer in (buffers.x, buffers.cos, buffers.sin):
        buffer.fill_(float("nan"))
    engine = TorchEngine(tower, PROCESSING, GPU, quantum_s, graphs)
    assert all(engine.prepare(pictures(grids), grids).recorded is not None for grids in BATCHES)
    launched = encode(TorchEngine(tower, PROCESSING, GPU, quantum_s), BATCHES)
    exact = encode(TorchEngine(deepcopy(tower).float(), PROCESSING, GPU, quantum_s), BATCHES)
    recorded = encode(engine, BATCHES)
    for grids, ours, eager, reference in zip(BATCHES, recorded, launched, exact, strict=True):
        ours_off, eager_off = (((rows.float() - reference).norm() / reference.norm()).item() for rows in (ours, eager))
        print(f"{preset}: {len(grids)} pictures: recorded {ours_off:.2e} from float32, launched {eager_off:.2e}")
        assert ours_off <= 1.3 * eager_off
    assert torch.equal(recorded[0], recorded[-1])
    assert torch.equal(recorded[2], launched[2])  # the same products without padding


@torch.inference_mode()
@pytest.mark.parametrize("preset", sorted(REFERENCES))
def test_a_batch_that_no_graph_holds_is_launched(preset: str) -> None:
    tower = random_tower(preset, GPU)
    engine = TorchEngine(tower, PROCESSING, GPU, 0.008, TowerGraphs(tower, (128,)))
    batches: list[list[GridThw]] = [[(1, 10, 14)], [(1, 2, 2)] * 70]
    for grids in batches:
        assert engine.prepare(pictures(grids), grids).recorded is None
        assert torch.equal(*(encode(each, [grids])[0] for each in (engine, TorchEngine(tower, PROCESSING, GPU, 0.008))))


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
