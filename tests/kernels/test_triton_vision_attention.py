"""The Triton form of attention within segments against float64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.exactness import normal
from tests.kernels.places import PLACES
from vlmrt.kernels.triton.vision_attention import head_parts, vision_attention_triton
from vlmrt.kernels.vision_attention import tile_table, vision_attention_reference

SCALE = 0.17
LENGTHS = ((5,), (64, 64), (16, 64, 0, 2, 7), (130, 1, 260))


def exact_attention(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    outputs = []
    for segment in zip(*(torch.split(x.double(), list(lengths)) for x in (q, k, v)), strict=True):
        queries, keys, values = (x.transpose(0, 1) for x in segment)
        outputs.append(((queries @ keys.transpose(1, 2) * SCALE).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("tile", "head_dim"), [(64, 80), (128, 80), (64, 72), (128, 20)])
def test_patches_see_their_segment_and_nothing_else(
    tile: int, lengths: tuple[int, ...], head_dim: int, device: str, dtype: torch.dtype
) -> None:
    q, k, v = normal(sum(lengths), 3, head_dim, dtype=dtype).to(device).chunk(3, dim=1)
    tiles = torch.from_numpy(tile_table(lengths, tile)).to(device)
    attended = vision_attention_triton(q, k, v, tiles, tile, SCALE)
    assert attended.dtype == dtype
    assert attended.is_contiguous()
    exact = exact_attention(q, k, v, lengths)
    eager = vision_attention_reference(q, k, v, lengths, SCALE)
    eager_error, error = ((x.double() - exact).abs().max() for x in (eager, attended))
    assert error <= 2 * eager_error + torch.finfo(dtype).eps / 2 * exact.abs().max()
    assert error <= 64 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.fixture
def new_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")  # 0 / 0 of what an empty tile does not write
@pytest.mark.usefixtures("new_memory_is_nan")
@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("tile", [64, 128])
def test_empty_tiles_change_nothing_and_rows_outside_all_tiles_are_neither_read_nor_written(
    tile: int, device: str, dtype: torch.dtype
) -> None:
    lengths = (130, 20)
    heads = normal(sum(lengths) + 50, 3, 20, dtype=dtype).to(device)
    heads[sum(lengths) :] = float("nan")
    q, k, v = heads.chunk(3, dim=1)
    table = tile_table(lengths, tile)
    padded = np.concatenate((table, np.zeros((3, 3), np.int32), np.full((2, 3), sum(lengths), np.int32)))
    alone, among = (
        vision_attention_triton(q, k, v, torch.from_numpy(tiles).to(device), tile, SCALE) for tiles in (table, padded)
    )
    assert torch.equal(among[: sum(lengths)], alone[: sum(lengths)])
    assert among[: sum(lengths)].isfinite().all()
    assert among[sum(lengths) :].isnan().all()


@pytest.mark.parametrize(
    ("head_dim", "parts"),
    [
        (80, (64, 16)),
        (64, (64, 0)),
        (128, (128, 0)),
        (20, (32, 0)),
        (72, (128, 0)),
        (96, (64, 32)),
        (8, (16, 0)),
        (120, (128, 0)),
    ],
)
def test_a_head_is_cut_into_powers_of_two(head_dim: int, parts: tuple[int, int]) -> None:
    assert head_parts(head_dim) == parts


@given(st.lists(st.integers(0, 400), max_size=20), st.sampled_from([64, 128]))
def test_every_query_is_in_one_tile_of_its_segment(lengths: list[int], tile: int) -> None:
    segment = np.repeat(np.arange(len(lengths)), lengths)
    stops = np.cumsum(lengths, dtype=np.int64)
    seen = np.zeros(len(segment), np.int64)
    sizes = []
    for first, start, stop in tile_table(lengths, tile).tolist():
        queries = slice(first, min(first + tile, stop))
        seen[queries] += 1
        owner = segment[first]
        assert (start, stop) == (stops[owner] - lengths[owner], stops[owner])
        sizes.append(lengths[owner])
    assert (seen == 1).all()
    assert sizes == sorted(sizes, reverse=True)
