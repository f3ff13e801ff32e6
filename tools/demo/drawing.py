"""Draws what the questions are about: backgrounds, shapes, written characters, and the damage cameras and JPEG do."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from vlmrt.tools.demo.words import COLORS, Rgb

Bytes = npt.NDArray[np.uint8]
COMMON_ASPECTS = (1.0, 1.0, 4 / 3, 3 / 4, 3 / 2, 2 / 3, 16 / 9, 9 / 16)
MIN_CONTRAST = 120.0  # Euclidean, in RGB; below it a shape gets an outline


@dataclass(frozen=True)
class Mark:
    """Something drawn: where its middle is, as fractions of width and height, and what it is."""

    x: float
    y: float
    kind: str  # a shape's name or one character
    hue: str  # a color's name, "-" for characters


@dataclass(frozen=True)
class Picture:
    """One picture at its native size, with what was drawn on it."""

    image: Image.Image
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True)
class Clip:
    """The frames of a short video, all of one size."""

    frames: tuple[Picture, ...]


@lru_cache(maxsize=512)
def font(path: str | None, size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font of a size; Pillow's own where no file is named."""
    return ImageFont.load_default(size_px) if path is None else ImageFont.truetype(path, size_px)


@lru_cache(maxsize=1)
def _noise_bank() -> npt.NDArray[np.int16]:
    return (np.random.default_rng(0).normal(0.0, 1.0, 1 << 21) * 64).astype(np.int16)


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    return math.dist(a[:3], b[:3])


def _clip(value: float) -> int:
    return max(0, min(255, int(value)))


def jittered(rng: random.Random, color: Rgb, amount: int = 12) -> Rgb:
    """A color near this one."""
    r, g, b = (_clip(c + rng.randint(-amount, amount)) for c in color)
    return r, g, b


@dataclass(frozen=True)
class Scenery:
    """What pictures are painted on: photographs, if there are any, and fonts beside Pillow's own."""

    photos: Sequence[Image.Image] = ()
    fonts: Sequence[str] = ()
    photo_share: float = field(default=0.3)

    @classmethod
    def from_folders(cls, photos: Path | None, fonts: Path | None = None) -> Scenery:
        """Reads every picture of one folder and names every .ttf file of another."""
        files = sorted(photos.iterdir()) if photos else []
        found = sorted(str(path) for path in fonts.glob("*.ttf")) if fonts else []
        return cls([Image.open(file).convert("RGB") for file in files], found)

    def background(self, rng: random.Random, size: tuple[int, int]) -> Image.Image:
        """Something to draw on: plain, shaded, patterned or a photograph."""
        choice = rng.random()
        if self.photos and choice < self.photo_share:
            return self.photo(rng, size)
        if choice < 0.5:
            return texture(rng, size, contrast=rng.randint(10, 60))
        return Image.new("RGB", size, plain_color(rng))

    def photo(self, rng: random.Random, size: tuple[int, int]) -> Image.Image:
        """A crop of some photograph, mirrored or relit at times."""
        photo = rng.choice(self.photos)
        scale = min(photo.width / size[0], photo.height / size[1]) * rng.uniform(0.5, 1.0)
        width, height = size[0] * scale, size[1] * scale
        left, top = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
        image = photo.resize(size, Image.Resampling.BILINEAR, (left, top, left + width, top + height), reducing_gap=2.0)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if rng.random() < 0.4:
            gain, offset = rng.uniform(0.6, 1.3), rng.uniform(-30, 30)
            image = image.point([_clip(v * gain + offset) for v in range(256)] * 3)
        return image


def plain_color(rng: random.Random) -> Rgb:
    """White, black, grey or some pale or dark tint."""
    choice = rng.random()
    if choice < 0.35:
        return (255, 255, 255)
    if choice < 0.45:
        return (0, 0, 0)
    level = rng.randint(20, 240)
    return jittered(rng, (level, level, level), 20)


def texture(rng: random.Random, size: tuple[int, int], contrast: int) -> Image.Image:
    """A gradient, stripes, a plasma or noise, between two colors at most `contrast` apart in each channel."""
    width, height = size
    kind = rng.randrange(4)
    if kind == 0:
        angle = rng.uniform(0, math.tau)
        small = np.add.outer(np.linspace(0, math.sin(angle), 24), np.linspace(0, math.cos(angle), 24))
    elif kind == 1:
        angle, waves = rng.uniform(0, math.tau), rng.uniform(8, 40)
        across = np.add.outer(np.linspace(0, math.sin(angle), 64), np.linspace(0, math.cos(angle), 64))
        small = np.sin(across * waves)
    elif kind == 2:
        side = rng.randint(3, 9)
        small = np.random.default_rng(rng.getrandbits(32)).random((side, side))
    else:
        small = np.random.default_rng(rng.getrandbits(32)).random((max(2, height // 3), max(2, width // 3)))
    span = float(small.max() - small.min()) or 1.0
    small = (small - small.min()) / span
    low = np.array(plain_color(rng), float)
    high = low + np.array([rng.uniform(-contrast, contrast) for _ in range(3)])
    colors = low + small[..., None] * (high - low)
    image = Image.fromarray(np.clip(colors, 0, 255).astype(np.uint8))
    return image.resize(size, Image.Resampling.BILINEAR if kind != 3 else Image.Resampling.NEAREST)


def _outline_points(shape: str, x: float, y: float, radius: float, turn: float) -> list[tuple[float, float]]:
    if shape == "square":
        corners = [(radius * 1.25, math.pi / 4 + k * math.pi / 2) for k in range(4)]
    elif shape == "triangle":
        corners = [(radius * 1.15, -math.pi / 2 + k * math.tau / 3) for k in range(3)]
    elif shape == "star":
        corners = [(radius * (1.12 if k % 2 == 0 else 0.47), -math.pi / 2 + k * math.pi / 5) for k in range(10)]
    else:
        arm, half = radius * 1.05, radius * 0.34
        plus = [(-half, -arm), (half, -arm), (half, -half), (arm, -half), (arm, half), (half, half)]
        plus += [(-dx, -dy) for dx, dy in plus]
        corners = [(math.hypot(dx, dy), math.atan2(dy, dx)) for dx, dy in plus]
    return [(x + r * math.cos(angle + turn), y + r * math.sin(angle + turn)) for r, angle in corners]


def draw_shape(
    rng: random.Random,
    image: Image.Image,
    shape: str,
    color: str,
    x: float,
    y: float,
    radius: float,
    turn: float = 0.0,
    hollow: bool = False,
) -> Mark:
    """Draws one shape with its middle at (x, y), outlined where it would not stand out from what is behind it.

    A hollow one is drawn as a thick line, if its color stands out and it is large enough.
    """
    fill = jittered(rng, rng.choice(COLORS[color]), 8)
    box = (max(0.0, x - radius), max(0.0, y - radius), min(image.width, x + radius), min(image.height, y + radius))
    behind = image.resize((1, 1), Image.Resampling.BOX, box).getpixel((0, 0))
    assert isinstance(behind, tuple)
    outline: Rgb | None = None
    draw = ImageDraw.Draw(image)
    circle = (x - radius, y - radius, x + radius, y + radius)
    points = [] if shape == "circle" else _outline_points(shape, x, y, radius, turn)
    if hollow and radius > 14 and _distance(behind, fill) > MIN_CONTRAST:
        width = max(3, round(radius * rng.uniform(0.14, 0.25)))
        if shape == "circle":
            draw.ellipse(circle, outline=fill, width=width)
        else:
            draw.line([*points, points[0], points[1]], fill=fill, width=width, joint="curve")
        return Mark(x / image.width, y / image.height, shape, color)
    if _distance(behind, fill) < MIN_CONTRAST or rng.random() < 0.15:
        light = min(_distance(behind, (255, 255, 255)), _distance(fill, (255, 255, 255)))
        dark = min(_distance(behind, (0, 0, 0)), _distance(fill, (0, 0, 0)))
        outline = (255, 255, 255) if light > dark else (0, 0, 0)
    width = max(1, round(radius * 0.12))
    if shape == "circle":
        draw.ellipse(circle, fill=fill, outline=outline, width=width if outline else 0)
    else:
        draw.polygon(points, fill=fill)
        if outline:
            draw.line([*points, points[0], points[1]], fill=outline, width=width, joint="curve")
    return Mark(x / image.width, y / image.height, shape, color)


def write(rng: random.Random, image: Image.Image, text: str, scenery: Scenery, band: tuple[float, float]) -> list[Mark]:
    """Writes text somewhere within a band of the height (fractions), as large as fits or smaller, in a clear color."""
    path = rng.choice([None, *scenery.fonts]) if scenery.fonts and rng.random() < 0.6 else None
    top, bottom = band[0] * image.height, band[1] * image.height
    reference = font(path, 40)
    left0, top0, right0, bottom0 = reference.getbbox(text)
    largest = 40 * min(0.94 * image.width / (right0 - left0), 0.94 * (bottom - top) / (bottom0 - top0))
    smallest = {1: 0.25, 2: 0.3, 3: 0.4, 4: 0.5}.get(len(text), 0.6)
    size_px = max(8, round(min(largest, 0.8 * image.height) * rng.uniform(smallest, 1.0)))
    face = font(path, size_px)
    left, up, right, down = face.getbbox(text)
    x = rng.uniform(0, max(0.0, image.width - (right - left))) - left
    y = top + rng.uniform(0, max(0.0, bottom - top - (down - up))) - up
    box = (max(0.0, x + left), max(0.0, y + up), min(image.width, x + right), min(image.height, y + down))
    behind = image.resize((1, 1), Image.Resampling.BOX, box).getpixel((0, 0))
    assert isinstance(behind, tuple)
    inks = [rng.choice(COLORS[c]) for c in COLORS]
    clear = [ink for ink in inks if _distance(ink, behind) > 170] or [max(inks, key=lambda ink: _distance(ink, behind))]
    ink = rng.choice([rng.choice(clear), max(clear, key=lambda ink: _distance(ink, behind))])
    halo = None if rng.random() < 0.75 else ((255, 255, 255) if sum(ink) < 380 else (0, 0, 0))
    draw = ImageDraw.Draw(image)
    draw.text((x, y), text, font=face, fill=ink, stroke_width=max(1, size_px // 14) if halo else 0, stroke_fill=halo)
    middle = (y + (up + down) / 2) / image.height
    ends = [face.getlength(text[:k]) for k in range(len(text) + 1)]
    return [Mark((x + (ends[k] + ends[k + 1]) / 2) / image.width, middle, c, "-") for k, c in enumerate(text.upper())]


def native_size(rng: random.Random, max_aspect: float, min_side: int = 64) -> tuple[int, int]:
    """A width and a height as uploads have them: mostly moderate, at times tiny or large, of aspects up to a bound."""
    choice = rng.random()
    if choice < 0.72:
        side = rng.uniform(112, 224)
    elif choice < 0.88:
        side = rng.uniform(224, 400)
    elif choice < 0.96:
        side = rng.uniform(min_side, 112)
    else:
        side = rng.uniform(400, 720)
    common = [a for a in COMMON_ASPECTS if 1 / max_aspect <= a <= max_aspect]
    aspect = rng.choice(common) if rng.random() < 0.5 else math.exp(rng.uniform(-1, 1) * math.log(max_aspect))
    return max(min_side // 2, round(side * aspect**0.5)), max(min_side // 2, round(side / aspect**0.5))


def weathered(rng: random.Random, image: Image.Image) -> Image.Image:
    """The picture after sensor noise and JPEG compression, each at times; large pictures mostly stay as they are."""
    small = image.width * image.height < 300 * 300
    if small and rng.random() < 0.3:
        pixels = np.asarray(image)
        bank, start = _noise_bank(), rng.randrange(1 << 19)
        if start + pixels.size < bank.size:
            noise = bank[start : start + pixels.size].reshape(pixels.shape) * rng.randint(1, 14) // 64
            image = Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))
    if rng.random() < (0.3 if small else 0.08):
        image = recompressed(image, rng.randint(30, 95))
    return image


def recompressed(image: Image.Image, quality: int) -> Image.Image:
    """The picture after a trip through JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")
