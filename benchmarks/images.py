"""Pictures for the workloads: shapes over colour and grain, so that a JPEG has the size of a photograph's."""

from __future__ import annotations

import base64
import io
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

JPEG_QUALITY = 90
GRAIN = 10  # of 255: about 100 KB for 640x480 at that quality
NUM_SHAPES = 12


class Picture(NamedTuple):
    """What to draw. Two pictures with different seeds share no pixels worth caching."""

    width: int
    height: int
    seed: tuple[int, ...]


def draw(picture: Picture) -> bytes:
    """The picture as a JPEG file."""
    width, height, seed = picture
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(NUM_SHAPES):
        x, y, radius = (int(rng.integers(side)) for side in (width, height, max(2, height // 5)))
        red, green, blue = rng.integers(0, 256, 3).tolist()
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(red, green, blue))
    grain = rng.integers(-GRAIN, GRAIN + 1, (height, width, 1), dtype=np.int16)
    pixels = np.clip(np.asarray(image, dtype=np.int16) + grain, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def data_url(picture: Picture) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(draw(picture)).decode()
