"""Frames resized as the reference's video processor does it, to the bit: torch's antialiased bicubic on uint8.

torch weighs neighbours by 16-bit integers, as many bits of them as the largest weight allows, across first and then
down, with whole pixels in between. Pillow's finer weights give other values to some 0.5 % of the pixels, by up to 2.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Floats = NDArray[np.floating[Any]]  # float32 or float64: exact, whichever they are

BLOCK = 16  # output lines whose neighbours are weighed by one dense product
ROWS = 64  # input lines whose sums are taken before they are cut: 1 MB of floats at 1280 pixels
MAX_WEIGHT_BITS = 22
EXACT_IN_FLOAT32 = 1 << 24  # multiples of a unit up to so many
MIDDLE = 128  # pixels are counted from here, so that twice as large weights stay exact


class _Band(NamedTuple):
    """Output lines [first, last) as weighed sums of the input lines [begin, end)."""

    first: int
    last: int
    begin: int
    end: int
    weights: Floats  # [last - first, end - begin], whole numbers of units


class _Axis(NamedTuple):
    """One direction of a resize: sum, add, and cut to a byte.  A unit is a power of two, so floats stay exact."""

    bands: tuple[_Band, ...]
    added: Floats  # [output lines]: a half, and what counting from MIDDLE has left out


def resize_frame(frame: Pixels, target_size: tuple[int, int]) -> Pixels:
    """A frame of another size.

    Shapes: uint8 [height, width, 3] -> uint8 [target height, target width, 3]; target_size is (width, height).
    Cost: two products with banded matrices, in single precision down to a quarter of the size; worked off in pieces
    that stay in a core's cache, since new memory for whole frames of floats took longer than the products.
    Source: torch.nn.functional.interpolate(mode="bicubic", antialias=True) of uint8, which torchvision's resize calls.
    """
    height, width = frame.shape[:2]
    target_width, target_height = target_size
    planes = frame.transpose(2, 0, 1)
    if target_width != width:
        planes = _across(planes, _axis(width, target_width))
    if target_height == height:
        return np.ascontiguousarray(planes.transpose(1, 2, 0))
    return _down(planes, _axis(height, target_height))


def _across(planes: Pixels, axis: _Axis) -> Pixels:
    """[3, height, width] -> [3, height, target width]."""
    channels, height, width = planes.shape
    target_width = len(axis.added)
    result = np.empty((channels, height, target_width), np.uint8)
    for top in range(0, height, ROWS):
        part = planes[:, top : top + ROWS]
        lines = np.subtract(part, MIDDLE, dtype=axis.added.dtype, order="C").reshape(-1, width)
        sums = np.empty((len(lines), target_width), axis.added.dtype)
        for first, last, begin, end, weights in axis.bands:
            np.matmul(lines[:, begin:end], weights.T, out=sums[:, first:last])
        sums += axis.added
        _cut(sums.reshape(channels, -1, target_width), result[:, top : top + ROWS])
    return result


def _down(planes: Pixels, axis: _Axis) -> Pixels:
    """[3, height, width] -> [target height, width, 3]."""
    channels, _, width = planes.shape
    result = np.empty((len(axis.added), width, channels), np.uint8)
    for first, last, begin, end, weights in axis.bands:
        sums = np.matmul(weights, np.subtract(planes[:, begin:end], MIDDLE, dtype=axis.added.dtype))
        sums += axis.added[first:last, None]
        _cut(sums, result[first:last].transpose(2, 0, 1))
    return result


def _cut(sums: Floats, result: Pixels) -> None:
    """To bytes; changes the sums."""
    np.clip(sums, 0, 255, out=sums)
    np.copyto(result, sums, casting="unsafe")


@lru_cache(maxsize=16)
def _axis(size: int, target_size: int) -> _Axis:
    """The weights of one direction, as torch computes them."""
    scale = size / target_size
    support = 2 * max(scale, 1.0)
    invscale = 1 / scale if scale >= 1 else 1.0
    max_taps = math.ceil(support) * 2 + 1
    begins, rows = [], []
    for index in range(target_size):
        center = scale * (index + 0.5)
        begin = max(int(center - support + 0.5), 0)
        taps = min(max(min(int(center + support + 0.5), size) - begin, 0), max_taps)
        row = _cubic((np.arange(taps, dtype=np.float64) + begin - center + 0.5) * invscale)
        total = row.sum()
        begins.append(begin)
        rows.append(row / total if total else row)
    largest = max(float(row.max()) for row in rows)
    shift = 0
    while shift < MAX_WEIGHT_BITS and int(0.5 + largest * (1 << (shift + 1))) < 1 << 15:
        shift += 1
    whole = [np.trunc(row * (1 << shift) + np.copysign(0.5, row)) for row in rows]
    exact = max(float(np.abs(row).sum()) for row in whole) * MIDDLE < EXACT_IN_FLOAT32
    dtype = np.float32 if exact else np.float64
    unit = 0.5**shift
    added: Floats = np.array([MIDDLE * row.sum() * unit + 0.5 for row in whole], dtype)
    bands = []
    for first in range(0, target_size, BLOCK):
        last = min(first + BLOCK, target_size)
        begin, end = begins[first], max(begins[i] + len(rows[i]) for i in range(first, last))
        weights = np.zeros((last - first, end - begin), dtype)
        for index in range(first, last):
            at = begins[index] - begin
            weights[index - first, at : at + len(whole[index])] = whole[index] * unit
        bands.append(_Band(first, last, begin, end, weights))
    return _Axis(tuple(bands), added)


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' kernel with a = -0.5, as Pillow's."""
    a = -0.5
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
