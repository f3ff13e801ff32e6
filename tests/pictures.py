"""Encoded pictures of every awkward kind, deterministic, for parity and API tests."""

from __future__ import annotations

import base64
import io
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

ODD_SIZES = ((27, 31), (56, 56), (100, 75), (200, 1500), (1500, 200), (333, 129), (28, 500), (640, 480))


class Picture(NamedTuple):
    """An encoded file and its MIME type."""

    name: str
    data: bytes
    mime: str

    @property
    def url(self) -> str:
        return f"data:{self.mime};base64,{base64.b64encode(self.data).decode()}"

    @property
    def part(self) -> dict[str, Any]:
        """The content part of a chat message."""
        return {"type": "image_url", "image_url": {"url": self.url}}


def noise(width: int, height: int, seed: int) -> Image.Image:
    """Smooth coloured blobs with some noise: every pixel matters, and no two seeds look alike."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    grain = rng.integers(-20, 21, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse, dtype=np.int64) + grain, 0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str, name: str, **options: Any) -> Picture:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Picture(name, buffer.getvalue(), f"image/{kind.lower()}")


def picture(index: int) -> Picture:
    """The index-th picture: sizes, modes, formats and EXIF orientations in turn."""
    width, height = ODD_SIZES[index % len(ODD_SIZES)]
    image = noise(width, height, index)
    match index % 9:
        case 0:
            return encode(image, "PNG", f"{width}x{height} RGB png")
        case 1:
            return encode(image, "JPEG", f"{width}x{height} jpeg", quality=80)
        case 2:
            image.putalpha(noise(width, height, index + 1000).convert("L"))
            return encode(image, "PNG", f"{width}x{height} RGBA png")
        case 3:
            return encode(image.convert("P", palette=Image.Palette.ADAPTIVE), "PNG", f"{width}x{height} palette png")
        case 4:
            return encode(image.convert("L"), "PNG", f"{width}x{height} grey png")
        case 5:
            return encode(image.convert("CMYK"), "JPEG", f"{width}x{height} CMYK jpeg", quality=90)
        case 6:
            exif = Image.Exif()
            exif[0x0112] = 1 + index % 8
            return encode(image, "JPEG", f"{width}x{height} EXIF {1 + index % 8} jpeg", exif=exif, quality=90)
        case 7:
            return encode(image, "WEBP", f"{width}x{height} webp", quality=90)
        case _:
            return encode(image.convert("P"), "GIF", f"{width}x{height} gif")
