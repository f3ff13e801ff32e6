"""Pictures for a load: shapes over colour and grain, so that a JPEG has the size of a photograph's."""

from __future__ import annotations

import io
import zlib
from typing import Literal

import msgspec
import numpy as np
from PIL import Image, ImageDraw

JPEG_QUALITY = 90
GRAIN = 10  # of 255: about 100 KB for 640x480 at that quality
NUM_SHAPES = 12

PictureFormat = Literal["jpeg", "png"]


class Picture(msgspec.Struct, frozen=True, tag=True):
    """What to draw. Two pictures with different seeds share no pixels worth caching."""

    width: int
    height: int
    seed: tuple[int, ...]
    format: PictureFormat = "jpeg"


def picture(size: tuple[int, int], *seed: int | str, format: PictureFormat = "jpeg") -> Picture:
    """size: (width, height). Words of the seed keep the pictures of different loads apart."""
    numbers = (zlib.crc32(part.encode()) if isinstance(part, str) else part for part in seed)
    return Picture(*size, seed=tuple(numbers), format=format)


def draw(picture: Picture) -> bytes:
    """The picture as a file of its format."""
    rng = np.random.default_rng(picture.seed)
    image = scene(picture.width, picture.height, rng)
    grain = rng.integers(-GRAIN, GRAIN + 1, (picture.height, picture.width, 1), dtype=np.int16)
    pixels = np.clip(np.asarray(image, dtype=np.int16) + grain, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    if picture.format == "jpeg":
        Image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY)
    else:
        Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def scene(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Shapes over blurred colours."""
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(NUM_SHAPES):
        x, y, radius = (int(rng.integers(side)) for side in (width, height, max(2, height // 5)))
        red, green, blue = rng.integers(0, 256, 3).tolist()
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(red, green, blue))
    return image
