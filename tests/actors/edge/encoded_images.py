"""Encoded pictures of every format, mode and orientation that Pillow can write."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from tests.pictures import noise

SIZES = ((27, 31), (56, 56), (100, 75), (1500, 200), (29, 290))


def save(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x010F] = "maker of the camera"
    tags[0x0112] = orientation
    return tags


def of_mode(mode: str, width: int, height: int, seed: int = 0) -> Image.Image:
    image = noise(width, height, seed)
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 3)
    if mode in ("RGBA", "LA"):
        image = image.convert(mode)
        image.putalpha(noise(width, height, seed + 1).convert("L"))
        return image
    if mode == "P":
        return image.convert("P", palette=Image.Palette.ADAPTIVE)
    return image.convert(mode)


def xmp(orientation: int) -> bytes:
    return f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()


def _png_with_text(image: Image.Image, orientation: int, compressed: bool) -> bytes:
    """EXIF as ImageMagick writes it."""
    data = b"Exif\0\0" + exif(orientation).tobytes()[6:]
    text = f"\nexif\n{len(data):8}\n{data.hex()}\n"
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", text, zip=compressed)
    return save(image, "PNG", pnginfo=info)


def _png_with_xmp(image: Image.Image, orientation: int) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp(orientation).decode(), zip=True)
    return save(image, "PNG", pnginfo=info)


def _png_with_late_exif(image: Image.Image, orientation: int) -> bytes:
    """eXIf behind the pixels."""
    data = save(image, "PNG")
    end = data.rindex(b"IEND") - 4
    chunk = b"eXIf" + exif(orientation).tobytes()[6:]
    length, check = struct.pack(">I", len(chunk) - 4), struct.pack(">I", zlib.crc32(chunk))
    return data[:end] + length + chunk + check + data[end:]


def by_mode() -> Iterator[tuple[str, bytes]]:
    modes = {
        "JPEG": ("RGB", "L", "CMYK"),
        "PNG": ("RGB", "RGBA", "P", "L", "LA", "1", "I;16"),
        "WEBP": ("RGB", "RGBA"),
        "GIF": ("P", "L", "RGBA"),
        "BMP": ("RGB", "P", "L", "1"),
        "TIFF": ("RGB", "RGBA", "CMYK", "L", "I;16", "1", "P"),
    }
    for kind, names in modes.items():
        for number, mode in enumerate(names):
            width, height = SIZES[number % len(SIZES)]
            yield f"{kind} {mode} {width}x{height}", save(of_mode(mode, width, height, number), kind)


def by_orientation() -> Iterator[tuple[str, bytes]]:
    for orientation in range(1, 9):
        image = noise(60 + orientation, 40, orientation)
        tags = exif(orientation)
        yield f"JPEG exif {orientation}", save(image, "JPEG", exif=tags)
        yield f"JPEG xmp {orientation}", save(image, "JPEG", xmp=xmp(orientation))
        yield f"PNG exif {orientation}", save(image, "PNG", exif=tags)
        yield f"PNG late exif {orientation}", _png_with_late_exif(image, orientation)
        yield f"PNG text {orientation}", _png_with_text(image, orientation, compressed=False)
        yield f"PNG ztext {orientation}", _png_with_text(image, orientation, compressed=True)
        yield f"PNG xmp {orientation}", _png_with_xmp(image, orientation)
        yield f"WEBP exif {orientation}", save(image, "WEBP", exif=tags)
        yield f"WEBP xmp {orientation}", save(image, "WEBP", xmp=xmp(orientation))
        yield f"TIFF exif {orientation}", save(image, "TIFF", exif=tags)
        yield f"TIFF lzw {orientation}", save(image, "TIFF", exif=tags, compression="tiff_lzw")


def odd_ones() -> Iterator[tuple[str, bytes]]:
    image = noise(90, 60, 3)
    frames = [of_mode("P", 50, 40, seed) for seed in range(3)]
    yield "JPEG progressive", save(image, "JPEG", progressive=True)
    yield "JPEG with comment and profile", save(image, "JPEG", comment=b"c" * 3000, icc_profile=b"p" * 100_000)
    yield "PNG interlace-like large text", save(image, "PNG", compress_level=0)
    yield "GIF animated", save(frames[0], "GIF", save_all=True, append_images=frames[1:])
    yield "GIF with comment", save(frames[0], "GIF", comment=b"c" * 700)
    yield "WEBP lossless", save(image, "WEBP", lossless=True)
    yield "WEBP lossy alpha", save(of_mode("RGBA", 33, 44), "WEBP", quality=50)
    animated = [noise(64, 48, seed) for seed in range(3)]
    yield "WEBP animated", save(animated[0], "WEBP", save_all=True, append_images=animated[1:])
    yield "PNG animated", save(animated[0], "PNG", save_all=True, append_images=animated[1:])
    yield "TIFF of two pages", save(animated[0], "TIFF", save_all=True, append_images=[noise(30, 20, 9)])
    yield "TIFF big", save(image, "TIFF", big_tiff=True, exif=exif(6))
    yield "MPO", save(animated[0], "MPO", save_all=True, append_images=animated[1:])
    rows = np.asarray(image)
    bottom_up = save(Image.fromarray(rows), "BMP")
    yield "BMP top-down", bottom_up[:22] + struct.pack("<i", -60) + bottom_up[26:]


def all_images() -> dict[str, bytes]:
    return dict([*by_mode(), *by_orientation(), *odd_ones()])
