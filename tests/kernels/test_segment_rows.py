"""Segments in rows: every patch in one cell, few rows, and the attention of the segments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.exactness import DTYPES, normal
from vlmrt.kernels.segment_rows import SegmentRows, most_rows, row_layout, segment_rows_attention
from vlmrt.kernels.vision_attention import vision_attention, vision_attention_reference

lengths_of_segments = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def on_device(order: np.ndarray, lengths: list[int], row_length: int) -> SegmentRows:
    return SegmentRows(*(torch.from_numpy(array) for array in row_layout(order, lengths, row_length)))


@given(lengths=lengths_of_segments, spare=st.integers(0, 50), seed=st.integers(0, 9))
def test_every_patch_has_a_cell_beside_its_own_segment(lengths: list[int], spare: int, seed: int) -> None:
    num_patches, row_length = sum(lengths), max(lengths) + spare
    order = np.random.default_rng(seed).permutation(num_patches)
    layout = row_layout(order, lengths, row_length)
    assert layout.patch.shape == layout.segment.shape
    assert layout.patch.shape[1] == row_length
    assert len(layout.patch) <= most_rows(num_patches, row_length)
    assert np.array_equal(layout.patch.reshape(-1)[layout.cell], np.arange(num_patches))
    assert len(set(layout.cell.tolist())) == num_patches
    expected = np.empty(num_patches, np.int64)
    expected[order] = np.repeat(np.arange(len(lengths)), lengths)
    assert np.array_equal(layout.segment.reshape(-1)[layout.cell], expected)
    assert np.count_nonzero(layout.segment >= 0) == num_patches
    for number in range(len(lengths)):
        rows, _ = np.nonzero(layout.segment == number)
        assert len(set(rows.tolist())) == 1


@pytest.mark.parametrize(
    ("lengths", "row_length", "problem"),
    [([3, 4], 3, "segments of"), ([], 4, "segments of"), ([7, 0], 8, "segments of"), ([3, 3], 8, "6 patches in all")],
)
def test_segments_that_do_not_fit_are_refused(lengths: list[int], row_length: int, problem: str) -> None:
    num_patches = 7 if lengths else 0
    with pytest.raises(ValueError, match=problem):
        row_layout(np.arange(num_patches), lengths, row_length)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row_length", [36, 48, 100])
def test_attention_is_as_exact_as_that_of_the_segments(row_length: int, dtype: torch.dtype) -> None:
    lengths = [4, 36, 8, 8, 20, 32, 4]
    rows = on_device(np.arange(sum(lengths)), lengths, row_length)
    q, k, v = (3 * normal(sum(lengths), 3, 16, dtype=dtype, seed=seed) for seed in range(3))
    exact = vision_attention_reference(q.double(), k.double(), v.double(), lengths, 0.3)
    eager = vision_attention_reference(q, k, v, lengths, 0.3)
    ours = segment_rows_attention(q, k, v, rows, 0.3)
    assert ours.dtype == dtype
    bound = 2 * (eager - exact).abs().max() + torch.finfo(dtype).eps / 2 * exact.abs().max()
    assert (ours - exact).abs().max() <= bound
    assert torch.equal(vision_attention(q, k, v, rows, 0.3), ours)


def test_patches_in_any_order_attend_to_their_own_segment() -> None:
    lengths, generator = [12, 4, 8], torch.Generator().manual_seed(1)
    order = torch.randperm(sum(lengths), generator=generator)
    q, k, v = (normal(sum(lengths), 2, 8, seed=seed) for seed in range(3))
    expected = torch.empty_like(q)
    expected[order] = vision_attention_reference(q[order], k[order], v[order], lengths, 1.0)
    ours = segment_rows_attention(q, k, v, on_device(order.numpy(), lengths, 16), 1.0)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
