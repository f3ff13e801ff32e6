"""Clips that were sent as pictures, one a frame."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image

from vlmrt.actors.media.av_reader import Found
from vlmrt.actors.media.clip_errors import Deadline, invalid, too_large
from vlmrt.actors.media.image import FORMATS, decode_image
from vlmrt.actors.media.resize import Pixels
from vlmrt.runtime.config import VideoOptions
from vlmrt.runtime.errors import RequestError
from vlmrt.runtime.frame_list import unpack_frames

FPS = 2.0  # of frames that say nothing of their times: what a clip is sampled at


def look_into(encoded: bytes, options: VideoOptions) -> Found:
    """Count the pictures and look at the first one's header.  Raises: RequestError 400."""
    try:
        pictures = unpack_frames(encoded)
    except ValueError as error:
        raise invalid(str(error)) from None
    if not pictures:
        raise invalid("it holds no frames")
    if len(pictures) > options.max_file_frames:
        raise too_large("frames", options.max_file_frames)
    return Found(_size(bytes(pictures[0])), len(pictures), FPS, (), (), True)


def _size(picture: bytes) -> tuple[int, int]:
    """Width and height as it is shown, from the header."""
    try:
        with Image.open(io.BytesIO(picture), formats=FORMATS) as image:
            width, height = image.size
            orientation = image.getexif().get(0x0112, 1)
    except Exception:  # a decoder may raise anything; what it says may quote the bytes
        raise invalid("its first frame is not a picture that can be decoded") from None
    return (height, width) if orientation in (5, 6, 7, 8) else (width, height)


class FrameListReader:
    """A FrameReader."""

    name = "pillow"

    def __init__(self, encoded: bytes, found: Found, options: VideoOptions) -> None:
        self._pictures = unpack_frames(encoded)
        self._size = found.size
        self._max_pixels = options.max_frame_pixels

    def read(self, indices: Sequence[int], deadline: Deadline) -> list[Pixels]:
        frames: list[Pixels] = []
        for index in indices:
            deadline.check()
            try:
                frames.append(decode_image(bytes(self._pictures[index]), self._size, self._size, self._max_pixels)[0])
            except RequestError as error:
                raise RequestError(
                    f"frame {index} of the video: {error.message}", status=error.status, code=error.code
                ) from None
        return frames

    def close(self) -> None: ...
