"""Clips for the workloads: shapes that cross a drifting background with grain, in H.264 at a phone's rate."""

from __future__ import annotations

import base64
import io
from typing import NamedTuple

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

FRAME_RATE = 25
BIT_RATE = 4_000_000  # 5 MB in 10 seconds
KEY_FRAMES = 50  # of how many frames one is a key frame, as cameras and sites have it
DRIFT = 2  # pixels of the background a frame
GRAIN = 6  # of 255
NUM_SHAPES = 5


class Clip(NamedTuple):
    """What to draw, and which of its frames the server is to look at: fps a second, or num_frames of all."""

    width: int
    height: int
    num_seconds: int
    seed: tuple[int, ...]
    fps: float | None = 2.0
    num_frames: int | None = None


def draw_clip(clip: Clip) -> bytes:
    """The clip as an MP4 file.  Two with different seeds share no frame."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=FRAME_RATE)
        stream.width, stream.height, stream.pix_fmt = clip.width, clip.height, "yuv420p"
        stream.bit_rate = BIT_RATE
        stream.options = {"preset": "ultrafast", "g": str(KEY_FRAMES)}
        for frame in _frames(clip):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode())
    return buffer.getvalue()


def _frames(clip: Clip) -> list[NDArray[np.uint8]]:
    """uint8 [height, width, 3] each."""
    rng = np.random.default_rng(clip.seed)
    num_frames = clip.num_seconds * FRAME_RATE
    wide = clip.width + DRIFT * num_frames
    coarse = rng.integers(0, 256, (6, 20, 3), dtype=np.uint8)
    background = np.asarray(Image.fromarray(coarse).resize((wide, clip.height), Image.Resampling.BICUBIC), np.int16)
    background = np.clip(background + rng.integers(-GRAIN, GRAIN + 1, (clip.height, wide, 1)), 0, 255).astype(np.uint8)
    side = clip.height // 6
    places = rng.integers(0, (clip.width, clip.height), (NUM_SHAPES, 2))
    speeds = rng.integers(-8, 9, (NUM_SHAPES, 2))
    colours = rng.integers(0, 256, (NUM_SHAPES, 3), dtype=np.uint8)
    frames = []
    for index in range(num_frames):
        frame = background[:, DRIFT * index : DRIFT * index + clip.width].copy()
        for (x, y), colour in zip((places + index * speeds) % (clip.width, clip.height), colours, strict=True):
            frame[y : y + side, x : x + side] = colour
        frames.append(frame)
    return frames


def clip_url(clip: Clip) -> str:
    return "data:video/mp4;base64," + base64.b64encode(draw_clip(clip)).decode()
