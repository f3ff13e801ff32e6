"""Vision towers against transformers."""

from __future__ import annotations

import itertools
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.actors.models.conftest import Models
from vlmrt.actors.models.qwen2_5_vl.vision import Qwen25VisionBlock
from vlmrt.actors.models.registry import load_model_config
from vlmrt.actors.models.vision_grid import window_layout
from vlmrt.tools.checkpoint import make_checkpoint

GRIDS = [(1, 8, 10), (1, 6, 4), (2, 12, 8), (1, 4, 4), (1, 4, 4), (1, 20, 34), (1, 2, 2)]


def patches(models: Models, grids: list[tuple[int, int, int]], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(t * h * w for t, h, w in grids), models.config.vision.patch_dim, generator=generator)


@torch.inference_mode()
def test_rows_of_a_mixed_batch_equal_the_reference(models: Models) -> None:
    pixel_values = patches(models, GRIDS)
    expected = models.reference.model.visual(pixel_values, grid_thw=torch.tensor(GRIDS)).pooler_output
    rows = models.tower(pixel_values, GRIDS)
    assert rows.shape == expected.shape
    assert (rows - expected).abs().max() <= 2e-6 * expected.abs().max()


@torch.inference_mode()
def test_rows_of_an_image_do_not_depend_on_its_neighbours(models: Models) -> None:
    pixel_values = patches(models, GRIDS)
    together = models.tower(pixel_values, GRIDS)
    patch = row = 0
    for frames, height, width in GRIDS:
        count = frames * height * width
        alone = models.tower(pixel_values[patch : patch + count], [(frames, height, width)])
        torch.testing.assert_close(alone, together[row : row + count // 4], rtol=1e-5, atol=2e-5)
        patch, row = patch + count, row + count // 4


@torch.inference_mode()
def test_layers_run_in_quanta_give_the_same_rows(models: Models) -> None:
    pixel_values = patches(models, GRIDS)
    state = models.tower.prepare(pixel_values, GRIDS)
    for layer in range(models.tower.num_layers):
        assert models.tower.run_layers(state, layer, layer + 1) is state
    assert torch.equal(models.tower.finish(state), models.tower(pixel_values, GRIDS))


@torch.inference_mode()
def test_the_residual_stream_stays_where_it_is_and_lacks_only_its_biases(models: Models) -> None:
    """For one window, whose patches both towers keep in one order."""
    pixel_values, grid = patches(models, [(1, 8, 8)]), (1, 8, 8)
    state = models.tower.prepare(pixel_values, [grid])
    place = state.x.data_ptr()
    models.tower.run_layers(state, 0, models.tower.num_layers)
    assert state.x.data_ptr() == place
    expected = models.reference.model.visual(pixel_values, grid_thw=torch.tensor([grid])).last_hidden_state
    off = (state.x + state.shifts[-1] - expected).abs().max()
    assert off <= 2e-6 * expected.abs().max() < (state.x - expected).abs().max()


@torch.inference_mode()
def test_layers_out_of_order_or_left_out_are_refused(models: Models) -> None:
    state = models.tower.prepare(patches(models, [(1, 4, 4)]), [(1, 4, 4)])
    with pytest.raises(ValueError, match="the next is 0"):
        models.tower.run_layers(state, 1, 2)
    with pytest.raises(ValueError, match="only 0 of 2 layers"):
        models.tower.finish(state)


@torch.inference_mode()
@pytest.mark.parametrize("grid_thw", [(1, 4, 6), (1, 2, 2), (1, 3, 4)])
def test_patches_that_do_not_fit_the_grid_are_refused(models: Models, grid_thw: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="grid_thw"):
        models.tower.prepare(torch.zeros(12, models.config.vision.patch_dim), [grid_thw])


@pytest.mark.parametrize("grid_thw", [(1, 2, 2), (1, 8, 8), (2, 10, 6), (1, 18, 34), (3, 16, 8)])
def test_windows_are_those_of_the_reference(grid_thw: tuple[int, int, int]) -> None:
    from transformers.vision_utils import get_vision_window_index

    index, cu_seqlens = get_vision_window_index(torch.tensor([grid_thw]), 2, 112, 14)
    bounds = (cu_seqlens // 4).tolist()
    expected = {tuple(index[a:b].tolist()) for a, b in itertools.pairwise(bounds)}
    order, lengths = window_layout([grid_thw], 2, 4)
    ours = np.split(order, np.cumsum(np.array(lengths) // 4)[:-1])
    assert {tuple(window.tolist()) for window in ours} == expected
    assert len(ours) == len(expected)


@torch.inference_mode()
@pytest.mark.parametrize("width", [13, 16])
def test_columns_that_pad_a_gated_mlp_add_nothing(width: int, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "test-qwen2.5-vl")
    config = msgspec.structs.replace(load_model_config(tmp_path).vision, intermediate_size=width)
    block = Qwen25VisionBlock(config, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(width)
    weights = {}
    for name, target in block.targets("", torch.empty(2, config.embed_dim)):
        weights[name] = torch.randn(target.shape, generator=generator)
        target.into.copy_(weights[name])
    assert weights["mlp.down_proj.weight"].shape == (config.embed_dim, width)
    assert block.down_proj.weight.shape[1] == 16
    x = torch.randn(5, config.embed_dim, generator=generator)
    gate, up = (F.linear(x, weights[f"mlp.{n}.weight"], weights[f"mlp.{n}.bias"]) for n in ("gate_proj", "up_proj"))
    added = torch.zeros_like(x)
    block.mlp(x, added)
    expected = F.linear(F.silu(gate) * up, weights["mlp.down_proj.weight"])
    assert (added - expected).abs().max() <= 1e-6 * expected.abs().max()
