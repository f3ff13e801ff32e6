"""From a picture of any size to Qwen2-VL patches: the resize that serving uses, then uint8 patches in merge order."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from vlmrt.tools.demo.drawing import Bytes

PATCH_SIZE = 14
MERGE_SIZE = 2
UNIT = PATCH_SIZE * MERGE_SIZE  # pixels a side of what one token of the language model sees
MIN_PIXELS = 112 * 112  # 16 tokens
MAX_PIXELS = 168 * 168  # 36 tokens
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def smart_resize(height: int, width: int) -> tuple[int, int]:
    """The size a picture is resized to: multiples of 28, about the same aspect, between the checkpoint's pixel bounds.

    Raises: ValueError for a picture more than 200 times as long as wide.
    """
    if max(height, width) / min(height, width) > 200:
        raise ValueError(f"aspect ratio of {width}x{height} is over 200")
    new_height, new_width = round(height / UNIT) * UNIT, round(width / UNIT) * UNIT
    if new_height * new_width > MAX_PIXELS:
        shrink = math.sqrt(height * width / MAX_PIXELS)
        new_height = max(UNIT, math.floor(height / shrink / UNIT) * UNIT)
        new_width = max(UNIT, math.floor(width / shrink / UNIT) * UNIT)
    elif new_height * new_width < MIN_PIXELS:
        grow = math.sqrt(MIN_PIXELS / (height * width))
        new_height = math.ceil(height * grow / UNIT) * UNIT
        new_width = math.ceil(width * grow / UNIT) * UNIT
    return new_height, new_width


def resized(image: Image.Image) -> Bytes:
    """The picture as uint8 [height, width, 3] at the size the vision tower sees."""
    height, width = smart_resize(image.height, image.width)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def patches(frame: Bytes) -> Bytes:
    """Cuts uint8 [height, width, 3] into [num_patches, 588]: 2x2 patches of a token together, each channels first."""
    rows, columns = frame.shape[0] // UNIT, frame.shape[1] // UNIT
    cut = frame.reshape(rows, MERGE_SIZE, PATCH_SIZE, columns, MERGE_SIZE, PATCH_SIZE, 3)
    return cut.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns * MERGE_SIZE**2, -1)


def patch_positions(rows: int, columns: int) -> np.ndarray[tuple[int, int], np.dtype[np.int16]]:
    """Row and column of each patch of a grid of tokens, in the order of `patches`: [num_patches, 2]."""
    grid = np.indices((rows * MERGE_SIZE, columns * MERGE_SIZE), dtype=np.int16)
    cut = grid.reshape(2, rows, MERGE_SIZE, columns, MERGE_SIZE).transpose(0, 1, 3, 2, 4)
    return cut.reshape(2, -1).T
