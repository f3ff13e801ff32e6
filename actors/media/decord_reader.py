"""Clips through decord, which decodes the frames that are asked for and those that they need."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from vlmrt.actors.media.av_reader import NUM_THREADS
from vlmrt.actors.media.clip_errors import Deadline
from vlmrt.actors.media.resize import Pixels
from vlmrt.runtime.errors import VlmrtError

# MPEG-TS it reads up to an error at its end; of damaged AVI files one in a hundred ends the process.
FORMATS = ("mov", "matroska", "flv")


class DecordUnusable(VlmrtError):
    """decord is not installed, or does not read this clip as it is."""


class DecordReader:
    """A FrameReader."""

    name = "decord"

    def __init__(self, encoded: bytes, num_frames: int) -> None:
        """Raises: DecordUnusable, also where it counts other than num_frames frames."""
        decord = _decord()
        try:
            self._reader: Any = decord.VideoReader(io.BytesIO(encoded), num_threads=NUM_THREADS)
        except (decord.DECORDError, RuntimeError, AssertionError) as error:
            raise DecordUnusable(type(error).__name__) from None
        if len(self._reader) != num_frames:
            raise DecordUnusable(f"it counts {len(self._reader)} of {num_frames} frames")
        self._error = decord.DECORDError

    def read(self, indices: Sequence[int], deadline: Deadline) -> list[Pixels]:
        """Raises: DecordUnusable.  The deadline is looked at afterwards: decord cannot be asked to stop."""
        try:
            frames = self._reader.get_batch(list(indices)).asnumpy()
        except (self._error, RuntimeError) as error:
            raise DecordUnusable(type(error).__name__) from None
        deadline.check()
        return list(frames)

    def close(self) -> None:
        self._reader = None


def _decord() -> Any:
    try:
        import decord
    except (ImportError, OSError) as error:
        raise DecordUnusable(f"not installed ({type(error).__name__})") from None
    decord.logging.set_level(decord.logging.FATAL)
    return decord
