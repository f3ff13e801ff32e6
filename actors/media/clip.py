"""Encoded clip -> what is in it, and frames of it, upright, as RGB.

A clip's own header is believed in nothing that costs: frames are counted packet by packet, the size is that of the
first frame decoded, and only containers are opened that hold their frames themselves.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Sequence
from typing import Protocol

from vlmrt.actors.media.av_reader import AvReader, Found, find_out
from vlmrt.actors.media.clip_errors import Deadline, invalid, too_large
from vlmrt.actors.media.container import FRAME_LIST, container_format
from vlmrt.actors.media.decord_reader import FORMATS as DECORD_FORMATS
from vlmrt.actors.media.decord_reader import DecordReader, DecordUnusable
from vlmrt.actors.media.frame_list_reader import FrameListReader, look_into
from vlmrt.actors.media.resize import Pixels
from vlmrt.runtime.config import VideoOptions
from vlmrt.runtime.errors import RequestError
from vlmrt.runtime.messages import ClipInfo

MAX_FPS = 1000.0

logger = logging.getLogger(__name__)


class FrameReader(Protocol):
    """A clip open in one of the libraries.  Not for two threads at once."""

    name: str

    def read(self, indices: Sequence[int], deadline: Deadline) -> list[Pixels]:
        """Frames in the order in which the clip shows them, as the file says to turn them.

        Shapes: -> uint8 [height, width, 3] each.   Raises: RequestError 400.
        """
        ...

    def close(self) -> None: ...


class Clip:
    """A clip that has been looked into.  Not for two threads at once."""

    def __init__(self, encoded: bytes, options: VideoOptions) -> None:
        """Raises: RequestError 400 for whatever is wrong with the bytes."""
        self.encoded = encoded
        self._options = options
        self._format = container_format(encoded)
        if self._format == FRAME_LIST:
            self._found = look_into(encoded, options)
        else:
            self._found = find_out(encoded, self._format, options, self._deadline())
        self.info = _clip_info(self._found, options)
        self._reader: FrameReader | None = None

    @property
    def reader_name(self) -> str:
        """Which library reads it; empty before the first frame."""
        return "" if self._reader is None else self._reader.name

    def read(self, indices: Sequence[int]) -> list[Pixels]:
        """Frames by their index.  Shapes: -> uint8 [height, width, 3] each.  Raises: RequestError 400."""
        if not all(0 <= index < self.info.num_frames for index in indices):
            message = f"the video has {self.info.num_frames} frames, number {max(indices)} was asked for"
            raise RequestError(message, code="video_mismatch")
        frames = self._frames(indices)
        if any(frame.shape[:2] != (self.info.height, self.info.width) for frame in frames):
            raise invalid("its frames change their size")
        return frames

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _deadline(self) -> Deadline:
        return Deadline(self._options.group_timeout_s)

    def _frames(self, indices: Sequence[int]) -> list[Pixels]:
        """By decord where the options allow it and as long as it can."""
        if self._format == FRAME_LIST:
            self._reader = self._reader or FrameListReader(self.encoded, self._found, self._options)
            return self._reader.read(indices, self._deadline())
        if self._options.reader != "av" and (self._reader is None or self._reader.name == DecordReader.name):
            try:
                if self._reader is None:
                    self._reader = self._open_decord()
                return self._reader.read(indices, self._deadline())
            except DecordUnusable as error:
                self.close()
                if self._options.reader == "decord":
                    raise invalid(f"decord does not read it: {error}") from None
                logger.info("PyAV reads a video of %d frames; decord: %s", self.info.num_frames, error)
        if self._reader is None:
            self._reader = AvReader(self.encoded, self._format, self._found, self._options)
        return self._reader.read(indices, self._deadline())

    def _open_decord(self) -> DecordReader:
        """Raises: DecordUnusable."""
        if self._format not in DECORD_FORMATS:
            raise DecordUnusable(f"not for {self._format}")
        if not self._found.whole:  # opening one ends the process now and then
            raise DecordUnusable("it ends early")
        reader = DecordReader(self.encoded, self.info.num_frames)
        logger.info("decord reads a video of %d frames", self.info.num_frames)
        return reader


def reader_words(options: VideoOptions) -> str:
    """Which libraries will read clips, for the log."""
    if options.reader != "auto":
        return {"decord": "decord alone", "av": "PyAV alone"}[options.reader]
    if importlib.util.find_spec("decord") is None:
        return "PyAV: decord is not installed"
    return "decord, and by PyAV where it fails"


def _clip_info(found: Found, options: VideoOptions) -> ClipInfo:
    """Raises: RequestError 400 for what does not fit the bounds."""
    width, height = found.size
    if not 0 < found.fps <= MAX_FPS or not math.isfinite(found.fps):
        if found.num_frames > 1:
            raise invalid(f"it has no frame rate within 0..{MAX_FPS:g} a second")
        return ClipInfo(width, height, found.num_frames, 1.0, 1.0)
    duration_s = found.num_frames / found.fps
    if duration_s > options.max_duration_s:
        raise too_large("seconds", options.max_duration_s)
    return ClipInfo(width, height, found.num_frames, found.fps, duration_s)
