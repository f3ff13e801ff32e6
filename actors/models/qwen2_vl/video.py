"""Which frames of a clip are looked at, their size, and where their tokens stand, without decoding or torch.

Source: Qwen2VLVideoProcessor of transformers 5.17, which both families use.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vlmrt.actors.models.config import VideoProcessing
from vlmrt.actors.models.qwen2_vl.processing import smart_resize


class FrameChoice(NamedTuple):
    """How many frames are taken from a clip: num_frames of them or, where that is None, fps a second within bounds."""

    fps: float
    num_frames: int | None
    min_frames: int
    max_frames: int


class ClipPlan(NamedTuple):
    """What a clip becomes."""

    groups: tuple[tuple[int, ...], ...]  # frame indices of each temporal group
    target_size: tuple[int, int]  # width, height in pixels
    grid_thw: tuple[int, int, int]  # of the whole clip
    num_group_tokens: int
    time_offsets: tuple[int, ...]  # of each group


def frame_choice(
    processing: VideoProcessing,
    *,
    fps: float | None = None,
    num_frames: int | None = None,
    max_frames: int | None = None,
    frame_limit: int,
) -> FrameChoice:
    """What a request asks for, or else the checkpoint's, within the service's limit.

    Raises: ValueError if both fps and num_frames are given, or one is not positive and finite.
    """
    if fps is not None and num_frames is not None:
        raise ValueError("fps and num_frames exclude each other")
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"fps is {fps}, must be positive and finite")
    for name, value in (("num_frames", num_frames), ("max_frames", max_frames)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, must be at least 1")
    most = min(processing.max_frames if max_frames is None else max_frames, frame_limit)
    return FrameChoice(processing.fps if fps is None else fps, num_frames, processing.min_frames, most)


def frame_indices(clip_frames: int, clip_fps: float, choice: FrameChoice, temporal: int) -> tuple[int, ...]:
    """The frames to decode of a clip of clip_frames, evenly spaced; whole groups of `temporal`, one at least.

    Where the reference refuses (more frames wanted than there are, less than one group), as many are taken as can be;
    a clip shorter than a group repeats its last frame.
    """
    most = min(choice.max_frames, clip_frames) // temporal * temporal
    if choice.num_frames is None:
        wanted = max(clip_frames / clip_fps * choice.fps, choice.min_frames)
        num_frames = math.floor(min(wanted, most) / temporal) * temporal
    else:
        num_frames = min(round(choice.num_frames / temporal) * temporal, most)
    if num_frames < temporal:
        if clip_frames < temporal:
            return tuple(min(index, clip_frames - 1) for index in range(temporal))
        num_frames = temporal
    positions = np.arange(num_frames) * (clip_frames / num_frames)
    return tuple(positions.astype(np.float32).astype(np.int64).tolist())  # float32, as the reference's arange


def frame_size(
    width: int,
    height: int,
    num_frames: int,
    processing: VideoProcessing,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    total_pixels: int | None = None,
) -> tuple[int, int]:
    """(width, height) in pixels that the frames are resized to; a request's bounds replace the checkpoint's.

    total_pixels bounds the sum over the clip's groups, as far as a little over min_pixels a frame allows.
    Raises: ValueError for bounds that contradict each other or a size that cannot be.
    """
    least = processing.min_pixels if min_pixels is None else min_pixels
    most = processing.max_pixels if max_pixels is None else max_pixels
    if not 0 < least <= most:
        raise ValueError(f"min_pixels {least} is not within 1..max_pixels {most}")
    if total_pixels is not None:
        if total_pixels < 1:
            raise ValueError(f"total_pixels is {total_pixels}, must be at least 1")
        most = max(min(most, total_pixels * processing.temporal_patch_size // num_frames), int(least * 1.05))
    factor = processing.patch_size * processing.merge_size
    resized_height, resized_width = smart_resize(height, width, factor, least, most)
    return resized_width, resized_height


def time_offsets(num_groups: int, second_per_grid: float, tokens_per_second: float | None) -> tuple[int, ...]:
    """Positions along M-RoPE's time axis from a clip's first group to each.

    second_per_grid: between two groups. tokens_per_second: of the vision config; None in Qwen2-VL, which counts groups.
    Source: arXiv:2502.13923, section 2.1.2, whole positions as in vLLM. transformers 5.17 first cuts second_per_grid to
    whole seconds, which puts all groups closer than a second at one position; ours are the same where it is whole.
    """
    if tokens_per_second is None:
        return tuple(range(num_groups))
    return tuple(int(group * second_per_grid * tokens_per_second) for group in range(num_groups))


def plan_clip(
    width: int,
    height: int,
    clip_frames: int,
    clip_fps: float,
    processing: VideoProcessing,
    choice: FrameChoice | None,
    tokens_per_second: float | None,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    total_pixels: int | None = None,
) -> ClipPlan:
    """Everything about a clip that follows from what a probe found.

    choice: None takes every frame, as for frames that a client has chosen itself; the last fills up its group.
    Raises: ValueError, see frame_size.
    """
    temporal = processing.temporal_patch_size
    if choice is None:
        num_places = -(-clip_frames // temporal) * temporal
        indices = tuple(min(index, clip_frames - 1) for index in range(num_places))
    else:
        indices = frame_indices(clip_frames, clip_fps, choice, temporal)
    size = frame_size(
        width,
        height,
        len(indices),
        processing,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        total_pixels=total_pixels,
    )
    groups = tuple(indices[first : first + temporal] for first in range(0, len(indices), temporal))
    rows, columns = size[1] // processing.patch_size, size[0] // processing.patch_size
    return ClipPlan(
        groups,
        size,
        (len(groups), rows, columns),
        rows * columns // processing.merge_size**2,
        time_offsets(len(groups), second_per_grid(indices, clip_frames, clip_fps, temporal), tokens_per_second),
    )


def second_per_grid(indices: Sequence[int], clip_frames: int, clip_fps: float, temporal: int) -> float:
    """Seconds of the clip that one group stands for."""
    sampled_fps = len(indices) / clip_frames * clip_fps
    return temporal / sampled_fps
