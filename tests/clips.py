"""Encoded clips of every awkward kind, deterministic: a square wanders over a coloured background."""

from __future__ import annotations

import io
import struct
from fractions import Fraction

import av
import numpy as np
from numpy.typing import NDArray

from tests.pictures import noise

_TURNS = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}


def frames(width: int, height: int, num_frames: int, seed: int = 0) -> NDArray[np.uint8]:
    """uint8 [num_frames, height, width, 3]; no two frames are alike."""
    background = np.asarray(noise(width, height, seed))
    moving = np.repeat(background[None], num_frames, axis=0)
    side = max(4, min(width, height) // 4)
    for index in range(num_frames):
        top, left = index * 3 % max(1, height - side), index * 5 % max(1, width - side)
        moving[index, top : top + side, left : left + side] = (255 * (index % 2), index * 9 % 256, 40)
    return moving


def make_clip(
    width: int = 160,
    height: int = 96,
    num_frames: int = 30,
    *,
    fps: float | Fraction = 30,
    seed: int = 0,
    container: str = "mp4",
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    options: dict[str, str] | None = None,
    varying: bool = False,
    sound: bool = False,
) -> bytes:
    """varying: frames at irregular times; sound: a silent track beside them."""
    buffer = io.BytesIO()
    rate = Fraction(fps).limit_denominator(1001)
    rng = np.random.default_rng(seed)
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.options = {"preset": "ultrafast", "g": "12"} if options is None and codec == "libx264" else options or {}
        track = output.add_stream("aac", rate=8000) if sound else None
        time = 0
        for picture in frames(width, height, num_frames, seed):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if varying:
                frame.pts, frame.time_base = time, 1 / rate
                time += int(rng.integers(1, 4))
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
        if track is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
            silence.rate = 8000
            output.mux([*track.encode(silence), *track.encode()])
    return buffer.getvalue()


def make_sound() -> bytes:
    """An MP4 file with a silent track alone."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        track = output.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        silence.rate = 8000
        output.mux([*track.encode(silence), *track.encode()])
    return buffer.getvalue()


def turned(clip: bytes, degrees: int) -> bytes:
    """An MP4 clip that says it is to be shown turned clockwise."""
    at = clip.index(b"tkhd") + 4
    at += 4 + (20 if clip[at] == 0 else 32) + 16
    a, b, c, d = (value << 16 for value in _TURNS[degrees])
    return clip[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + clip[at + 36 :]
