"""Patches against transformers' image processor, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from tests.video_reference import video_processor
from vlmrt.actors.models.config import ImageProcessing
from vlmrt.actors.models.qwen2_vl.processing import image_grid_thw, num_image_tokens, resized_size
from vlmrt.kernels.patchify import patchify
from vlmrt.tools.checkpoint.presets import CLIP_MEAN, CLIP_STD

PROCESSING = ImageProcessing(
    min_pixels=3136,
    max_pixels=1_000_000,
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    image_mean=(CLIP_MEAN[0], CLIP_MEAN[1], CLIP_MEAN[2]),
    image_std=(CLIP_STD[0], CLIP_STD[1], CLIP_STD[2]),
    rescale_factor=1 / 255,
)
SIZES = ((27, 31), (56, 56), (1, 1), (100, 75), (333, 129), (28, 500), (1500, 200), (200, 1500), (2000, 1100))


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_patches_of_odd_sizes_equal_the_reference_bit_for_bit() -> None:
    images = [picture(width, height) for width, height in SIZES]
    processor = Qwen2VLImageProcessorPil(min_pixels=PROCESSING.min_pixels, max_pixels=PROCESSING.max_pixels)
    expected = processor(images=images, return_tensors="pt")
    grids = [image_grid_thw(image.width, image.height, PROCESSING) for image in images]
    assert [tuple(grid) for grid in expected["image_grid_thw"].tolist()] == grids
    resized = []
    for image in images:
        size = resized_size(image.width, image.height, PROCESSING)
        resized.append(torch.from_numpy(np.array(image.resize(size, Image.Resampling.BICUBIC)))[None])
    pixel_values = patchify(resized, PROCESSING)
    assert torch.equal(pixel_values, expected["pixel_values"])
    assert sum(num_image_tokens(grid, 2) for grid in grids) * 4 == pixel_values.shape[0]


def test_frames_of_a_clip_fill_temporal_groups_and_the_last_one_is_repeated() -> None:
    frames = torch.from_numpy(
        np.stack([np.array(picture(28, 56)), *(np.array(picture(28, 56).rotate(a)) for a in (90, 180))])
    )
    patches = patchify([frames], PROCESSING).view(2, 8, 3, 2, 14, 14)
    for index in range(3):
        alone = patchify([frames[index : index + 1]], PROCESSING).view(8, 3, 2, 14, 14)
        assert torch.equal(patches[index // 2, :, :, index % 2], alone[:, :, 0])
    assert torch.equal(patches[1, :, :, 0], patches[1, :, :, 1])


def test_patches_of_a_clip_equal_the_video_processors_to_one_rounding() -> None:
    frames = np.stack([np.array(picture(84, 56).rotate(angle)) for angle in (0, 10, 20, 30)])
    processor = video_processor(do_resize=False, do_sample_frames=False)
    expected = processor(torch.from_numpy(frames).permute(0, 3, 1, 2), return_tensors="pt")["pixel_values_videos"]
    groups = [torch.from_numpy(frames[first : first + 2]) for first in (0, 2)]
    assert (patchify(groups, PROCESSING) - expected).abs().max() <= 2.4e-7
    assert torch.equal(patchify([torch.from_numpy(frames)], PROCESSING), patchify(groups, PROCESSING))


def test_patches_in_another_dtype_are_the_float32_ones_rounded_once() -> None:
    images = [torch.from_numpy(np.array(picture(56, 84)))[None], torch.from_numpy(np.array(picture(28, 28)))[None]]
    assert torch.equal(patchify(images, PROCESSING, torch.bfloat16), patchify(images, PROCESSING).bfloat16())


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 28, 30, 3), torch.uint8, "multiples of 28"),
        ((1, 28, 28, 4), torch.uint8, "expected uint8"),
        ((28, 28, 3), torch.uint8, "expected uint8"),
        ((1, 28, 28, 3), torch.float32, "expected uint8"),
    ],
)
def test_pixels_of_another_kind_are_refused(shape: tuple[int, ...], dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patchify([torch.zeros(shape, dtype=dtype)], PROCESSING)


def test_no_image_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="no image"):
        patchify([], PROCESSING)
