"""Clips through PyAV: what is in one, and its frames."""

from __future__ import annotations

import io
import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import av
import numpy as np

from vlmrt.actors.media.clip_errors import Deadline, invalid, too_large
from vlmrt.actors.media.resize import Pixels
from vlmrt.runtime.config import VideoOptions
from vlmrt.runtime.errors import RequestError

NUM_THREADS = min(4, os.cpu_count() or 1)
BUFFER_BYTES = 1 << 18
PACKETS_PER_CHECK = 4096
SHORTFALL = 0.95  # of the frames that a header counts: fewer mean that the file was cut off


class Found(NamedTuple):
    """What a clip holds."""

    size: tuple[int, int]  # width, height of its first frame, turned
    num_frames: int
    fps: float  # 0.0: it does not say
    times: tuple[int, ...]  # of its frames, ascending, in the stream's units; () where it does not say
    key_times: tuple[int, ...]  # of those that can be decoded without others
    whole: bool  # all frames are there that the header counts


def find_out(encoded: bytes, format_name: str, options: VideoOptions, deadline: Deadline) -> Found:
    """Count the frames and decode the first.  Raises: RequestError 400."""
    with _Opened(encoded, format_name, options, num_threads=1) as opened:
        times, key_times, num_frames = _count(opened, options, deadline)
        stream = opened.stream
        if num_frames == 0:
            raise invalid("it holds no frames")
        if stream.frames and num_frames < SHORTFALL * stream.frames:
            raise invalid(f"it ends early: its header counts {stream.frames} frames, {num_frames} are there")
        whole = num_frames >= stream.frames
        fps = float(stream.average_rate) if stream.average_rate else 0.0
        if not 0 < fps < math.inf and times:
            fps = _measured_fps(times, float(stream.time_base))
    with _Opened(encoded, format_name, options, num_threads=1) as opened:
        first = next(opened.frames(deadline.check), None)
        if first is None:
            raise invalid("its first frame is broken")
        height, width = _upright_shape(first)
    return Found((width, height), num_frames, fps, times, key_times, whole)


class AvReader:
    """A FrameReader: goes on from the frame read last, or from a key frame nearer to what is asked for."""

    name = "av"

    def __init__(self, encoded: bytes, format_name: str, found: Found, options: VideoOptions) -> None:
        self._open: Callable[[], _Opened] = partial(_Opened, encoded, format_name, options, NUM_THREADS)
        self._found = found
        self._deadline = Deadline(options.group_timeout_s)  # of the read that goes on
        self._opened: _Opened | None = None
        self._frames: Iterator[Any] = iter(())
        self._index = -1  # of the frame decoded last
        self._last: Any = None

    def read(self, indices: Sequence[int], deadline: Deadline) -> list[Pixels]:
        self._deadline = deadline
        try:
            return [_upright(self._frame(index)) for index in indices]
        except RequestError:
            self.close()
            raise

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()
        self._opened, self._last, self._frames, self._index = None, None, iter(()), -1

    def _frame(self, index: int) -> Any:
        """The frame shown at that index; where the stream lost some at its end, the last there is."""
        self._go_near(index)
        while self._index < index:
            frame = next(self._frames, None)
            if frame is None:
                break
            self._last, self._index = frame, self._index_of(frame)
        if self._last is None:
            raise invalid("none of the frames asked for can be decoded")
        return self._last

    def _go_near(self, index: int) -> None:
        """Begin anew for a frame that has passed; skip to the key frame before one that is far ahead."""
        if self._opened is None or index < self._index:
            self.close()
            self._opened = self._open()
            self._frames = self._opened.frames(self._check)
        found = self._found
        if not found.times or not found.key_times:
            return
        key = bisect_right(found.key_times, found.times[index]) - 1
        if key >= 0 and bisect_right(found.times, found.key_times[key]) - 1 > self._index + 1:
            self._opened.seek(found.key_times[key])
            self._frames = self._opened.frames(self._check)

    def _check(self) -> None:
        self._deadline.check()

    def _index_of(self, frame: Any) -> int:
        if self._found.times and frame.pts is not None:
            return bisect_right(self._found.times, frame.pts) - 1
        return self._index + 1


class _Opened:
    """A container and its video stream, open."""

    def __init__(self, encoded: bytes, format_name: str, options: VideoOptions, num_threads: int) -> None:
        """Raises: RequestError 400."""
        try:
            self._container = av.open(
                io.BytesIO(encoded),
                format=format_name,
                metadata_errors="replace",
                buffer_size=BUFFER_BYTES,
                io_open=_refuse_to_open,
            )
        except (av.FFmpegError, ValueError) as error:
            raise _broken(error) from None
        streams = [
            stream
            for stream in self._container.streams.video
            if not stream.disposition & av.stream.Disposition.attached_pic
        ]
        if not streams:
            has_sound = bool(self._container.streams.audio)
            self._container.close()
            raise invalid("it holds no pictures, only sound" if has_sound else "it holds no pictures")
        self.stream = streams[0]
        context = self.stream.codec_context
        if context is None:
            self._container.close()
            raise invalid("its codec is not known here")
        self._max_pixels = options.max_frame_pixels
        if context.width * context.height > self._max_pixels:
            self._container.close()
            raise too_large("pixels in a frame", self._max_pixels)
        context.options = {"max_pixels": str(self._max_pixels)}
        context.thread_count = num_threads
        context.thread_type = "AUTO" if num_threads > 1 else "SLICE"

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._container.close()

    def packets(self) -> Iterator[Any]:
        """Up to the end, or to where the file breaks off."""
        try:
            for packet in self._container.demux(self.stream):
                if packet.size:
                    yield packet
        except av.InvalidDataError:
            return
        except av.FFmpegError as error:
            raise _broken(error) from None

    def frames(self, check: Callable[[], None]) -> Iterator[Any]:
        """In the order in which they are shown; packets that cannot be decoded are passed over.

        check: is called for every packet, and may raise.
        """
        try:
            for packet in self._container.demux(self.stream):
                check()
                try:
                    frames = packet.decode()
                except av.InvalidDataError:
                    continue
                for frame in frames:
                    if frame.width * frame.height > self._max_pixels:
                        raise too_large("pixels in a frame", self._max_pixels)
                    yield frame
        except av.InvalidDataError:
            return
        except av.FFmpegError as error:
            raise _broken(error) from None

    def seek(self, time: int) -> None:
        try:
            self._container.seek(time, stream=self.stream, backward=True)
        except av.FFmpegError as error:
            raise _broken(error) from None


def _count(opened: _Opened, options: VideoOptions, deadline: Deadline) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Times of all frames and of the key frames, both ascending, () where not all have one; and their number."""
    times: list[int] = []
    key_times: list[int] = []
    num_frames = 0
    for packet in opened.packets():
        if packet.is_discard:
            continue
        num_frames += 1
        if num_frames > options.max_file_frames:
            raise too_large("frames", options.max_file_frames)
        if num_frames % PACKETS_PER_CHECK == 0:
            deadline.check()
        if packet.pts is not None:
            times.append(packet.pts)
            if packet.is_keyframe:
                key_times.append(packet.pts)
    if len(times) != num_frames or len(set(times)) != num_frames:
        return (), (), num_frames
    return tuple(sorted(times)), tuple(sorted(key_times)), num_frames


def _measured_fps(times: Sequence[int], time_base: float) -> float:
    seconds = (times[-1] - times[0]) * time_base
    return (len(times) - 1) / seconds if seconds > 0 else 0.0


def _upright_shape(frame: Any) -> tuple[int, int]:
    """Height and width."""
    return (frame.width, frame.height) if frame.rotation % 180 else (frame.height, frame.width)


def _upright(frame: Any) -> Pixels:
    try:
        pixels: Pixels = frame.to_ndarray(format="rgb24")
    except (av.FFmpegError, ValueError) as error:
        raise _broken(error) from None
    return np.rot90(pixels, frame.rotation // 90 % 4)


def _broken(error: Exception) -> RequestError:
    """What a library says may quote the bytes, so only its kind is told."""
    if isinstance(error, MemoryError):  # no honest clip of these sizes needs so much
        return invalid("it asks for more memory than there is for a video")
    return invalid(f"it is broken or cut off ({type(error).__name__})")


def _refuse_to_open(url: str, flags: int, options: dict[str, str]) -> Any:
    raise PermissionError("a clip may not name other files")
