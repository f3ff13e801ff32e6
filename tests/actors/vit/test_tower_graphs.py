"""Which recorded layers a batch goes through, and how it lies in their buffers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.actors.vit.conftest import Checkpoint
from tests.actors.vit.test_torch_engine import load_tower
from vlmrt.actors.models.vision_grid import GridThw
from vlmrt.actors.models.vision_tower import VisionState, VisionTower
from vlmrt.actors.vit.engines.tower_graphs import (
    LAYERS_PER_GRAPH,
    MAX_PATCHES,
    PATCH_COUNTS,
    SPARE_TILES,
    Buffers,
    graph_end,
    patch_counts,
)
from vlmrt.kernels.vision_attention import Segments, tile_table


def with_tiles(segments: Segments) -> Segments:
    """As pack_segments gives them for a GPU."""
    tiles = torch.from_numpy(tile_table(segments.lengths, segments.tile))
    return dataclasses.replace(segments, tiles=tiles)


def lay_out(tower: VisionTower, grids: Sequence[GridThw]) -> VisionState:
    num_patches = sum(frames * height * width for frames, height, width in grids)
    state = tower.lay_out(torch.randn(num_patches, tower.config.embed_dim), grids)
    state.frames = with_tiles(state.frames)
    if state.windows is not None:
        state.windows = with_tiles(state.windows)
    return state


def table(segments: Segments | None) -> Tensor:
    assert segments is not None
    assert segments.tiles is not None
    return segments.tiles


def is_followed_by_empty_tiles(padded: Tensor, tiles: Tensor) -> bool:
    rest = padded[len(tiles) :]
    return torch.equal(padded[: len(tiles)], tiles) and bool((rest[:, :1] == rest).all())


@pytest.mark.parametrize("max_patches", [1, 128, 129, 2048, 2049, 5000, 8192, 100_000])
def test_counts_reach_to_the_largest_batch_and_not_past_it(max_patches: int) -> None:
    counts = patch_counts(max_patches)
    assert list(counts) == sorted(set(counts))
    assert counts[-1] >= min(max_patches, MAX_PATCHES)
    assert all(count < max_patches for count in counts[:-1])
    assert set(counts) <= set(PATCH_COUNTS)


def test_padding_is_at_most_a_step_between_counts() -> None:
    counts = patch_counts(MAX_PATCHES)
    assert counts[0] == 128
    assert counts[-1] == MAX_PATCHES
    steps = np.diff(counts)
    assert set(steps[np.array(counts[1:]) <= 2048]) == {128}
    assert set(steps[np.array(counts[1:]) > 2048]) == {256}


@pytest.mark.parametrize("num_layers", [1, 3, 4, 6, 32])
@pytest.mark.parametrize("wanted", [1, 3, 4, 5, 9, 100])
def test_whole_graphs_take_a_batch_through_all_layers(num_layers: int, wanted: int) -> None:
    first = 0
    while first < num_layers:
        end = graph_end(first, min(first + wanted, num_layers), num_layers)
        assert end == num_layers or end % LAYERS_PER_GRAPH == 0
        assert first < end <= max(first + wanted, first + LAYERS_PER_GRAPH)
        first = end
    assert first == num_layers


def test_a_batch_lies_before_what_is_left_of_a_larger_one(checkpoint: Checkpoint) -> None:
    tower = load_tower(checkpoint)
    buffers = Buffers.zeros(640, lay_out(tower, [(1, 2, 2)]))
    larger, state = lay_out(tower, [(1, 20, 18), (2, 6, 6), (1, 14, 10)]), lay_out(tower, [(1, 6, 10), (1, 4, 4)])
    expected = dataclasses.replace(state)
    buffers.fill(larger)
    cut = buffers.cut(128)
    assert cut.holds(state)
    cut.fill(state)
    for into, values in ((cut.x, expected.x), (cut.cos, expected.cos), (cut.sin, expected.sin)):
        assert torch.equal(into[:76], values)
        assert len(into) == 128
    assert state.x.data_ptr() == buffers.x.data_ptr()
    assert torch.equal(state.x, expected.x)
    assert is_followed_by_empty_tiles(table(cut.frames), table(expected.frames))
    if expected.windows is not None:
        assert is_followed_by_empty_tiles(table(cut.windows), table(expected.windows))
    whole = cut.state()
    assert (len(whole.x), whole.frames.lengths) == (128, (128,))
    assert torch.equal(whole.shifts, state.shifts)
    assert (whole.windows is None) == (state.windows is None)
    assert {whole.frames.tile} == {state.frames.tile}


def test_what_has_more_patches_or_tiles_than_there_is_room_for_is_not_held(checkpoint: Checkpoint) -> None:
    tower = load_tower(checkpoint)
    buffers = Buffers.zeros(512, lay_out(tower, [(1, 2, 2)]))
    assert buffers.holds(lay_out(tower, [(1, 16, 32)]))
    assert not buffers.holds(lay_out(tower, [(1, 16, 34)]))
    assert buffers.holds(lay_out(tower, [(1, 2, 2)] * SPARE_TILES))
    assert not buffers.cut(128).holds(lay_out(tower, [(1, 2, 2)] * (SPARE_TILES + 2)))


def test_windows_without_room_are_not_held(checkpoint: Checkpoint) -> None:
    tower = load_tower(checkpoint)
    if tower.config.window_size is None:
        return
    state = lay_out(tower, [(1, 16, 16)])
    buffers = Buffers.zeros(256, state)
    assert buffers.holds(state)
    num_tiles = len(table(buffers.windows))
    state.windows = Segments((256,), table(buffers.windows).shape[0], torch.zeros(num_tiles + 1, 3, dtype=torch.int32))
    assert not buffers.holds(state)


def test_every_batch_has_tiles_of_one_size(checkpoint: Checkpoint) -> None:
    tower = load_tower(checkpoint)
    small, large = lay_out(tower, [(1, 2, 2)]), lay_out(tower, [(1, 40, 40)])
    assert small.frames.tile == large.frames.tile
    if small.windows is not None and large.windows is not None:
        assert small.windows.tile == large.windows.tile
