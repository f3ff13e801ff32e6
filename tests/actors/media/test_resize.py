"""Frames resized as torch does it, which is what the reference's video processor calls."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vlmrt.actors.media.resize import Pixels, resize_frame

NUM_SIZES = 40


def reference(frame: Pixels, width: int, height: int) -> Pixels:
    planes = torch.from_numpy(frame).permute(2, 0, 1)[None].contiguous()
    resized = F.interpolate(planes, size=(height, width), mode="bicubic", antialias=True)
    pixels: Pixels = resized[0].permute(1, 2, 0).numpy()
    return pixels


@pytest.mark.parametrize("seed", range(NUM_SIZES))
def test_frames_of_any_size_equal_torchs_to_the_bit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(1, 400, 2))
    target_height, target_width = (int(side) * 28 for side in rng.integers(1, 12, 2))
    frame = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if seed % 3 == 0:
        frame = (frame > 127).astype(np.uint8) * 255  # the sums that lie furthest outside a byte
    expected = reference(frame, target_width, target_height)
    np.testing.assert_array_equal(resize_frame(frame, (target_width, target_height)), expected)


@pytest.mark.parametrize(
    ("size", "target_size"),
    [
        ((1280, 720), (1008, 560)),
        ((1920, 1080), (112, 56)),
        ((2, 3000), (28, 28)),
        ((56, 100), (56, 28)),
        ((56, 28), (56, 28)),
    ],
)
def test_common_and_extreme_sizes_equal_torchs_to_the_bit(size: tuple[int, int], target_size: tuple[int, int]) -> None:
    """Down to a twenty-fifth, where single precision would not be exact, and along one direction alone."""
    frame = np.random.default_rng(0).integers(0, 2, (size[1], size[0], 3), dtype=np.uint8) * 255
    resized = resize_frame(frame, target_size)
    np.testing.assert_array_equal(resized, reference(frame, *target_size))
    assert resized.flags.c_contiguous


def test_a_turned_frame_is_resized_as_its_copy() -> None:
    frame = np.rot90(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    np.testing.assert_array_equal(resize_frame(frame, (56, 84)), resize_frame(np.ascontiguousarray(frame), (56, 84)))
