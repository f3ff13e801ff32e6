"""Which frames of a clip are taken, their size and tokens, against transformers' video processor."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import av
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.clips import make_clip
from tests.video_reference import video_processor
from vlmrt.actors.media.clip import Clip
from vlmrt.actors.media.resize import resize_frame
from vlmrt.actors.models.config import CheckpointError, VideoProcessing
from vlmrt.actors.models.qwen2_vl.video import (
    FrameChoice,
    frame_choice,
    frame_indices,
    frame_size,
    plan_clip,
    second_per_grid,
    time_offsets,
)
from vlmrt.actors.models.registry import load_image_processing, load_video_processing
from vlmrt.kernels.patchify import patchify
from vlmrt.runtime.config import VideoOptions
from vlmrt.tools.checkpoint import make_checkpoint

NUM_CLIPS = 8
NUM_CLIPS_SOAK = 50
MIN_PIXELS, MAX_PIXELS = 16 * 28 * 28, 64 * 28 * 28
PROCESSING = VideoProcessing(
    min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS, patch_size=14, temporal_patch_size=2, merge_size=2
)
FRAME_LIMIT = 768


@pytest.fixture(scope="module")
def reference() -> Any:
    return video_processor(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "test-qwen2-vl", weights=False)


def check_clip(seed: int, reference: Any, checkpoint: Path) -> None:
    """A clip of random size, rate and length, sampled at a random rate or to a random number of frames."""
    rng = np.random.default_rng(seed)
    width, height = (int(side) * 2 for side in rng.integers(16, 180, 2))
    num_frames, clip_fps = int(rng.integers(4, 90)), float(rng.choice([1, 6, 10, 23.976, 24, 25, 29.97, 30, 60]))
    data = make_clip(width, height, num_frames, fps=clip_fps, seed=seed)
    wanted: dict[str, Any] = {}
    if seed % 3 == 0:
        wanted["num_frames"] = int(rng.integers(2, num_frames))
    else:
        wanted["fps"] = float(rng.choice([0.5, 1, 2, 3, 7.5]))
    with av.open(io.BytesIO(data)) as opened:
        shown = np.stack([frame.to_ndarray(format="rgb24") for frame in opened.decode(video=0)])
        metadata = {"total_num_frames": len(shown), "fps": float(opened.streams.video[0].average_rate or 0)}
    videos = [torch.from_numpy(shown).permute(0, 3, 1, 2).contiguous()]
    expected = reference(videos, video_metadata=[metadata], return_tensors="pt", return_metadata=True, **wanted)
    (sampled,) = expected["video_metadata"]

    clip = Clip(data, VideoOptions())
    info = clip.info
    assert (info.width, info.height, info.num_frames, info.fps) == (width, height, num_frames, metadata["fps"])
    choice = frame_choice(PROCESSING, **wanted, frame_limit=FRAME_LIMIT)
    plan = plan_clip(info.width, info.height, info.num_frames, info.fps, PROCESSING, choice, 2.0)
    indices = [index for group in plan.groups for index in group]
    assert indices == sampled.frames_indices.tolist()
    assert [plan.grid_thw] == [tuple(grid) for grid in expected["video_grid_thw"].tolist()]
    assert plan.num_group_tokens * len(plan.groups) == expected["video_grid_thw"].prod() // 4
    seconds = second_per_grid(indices, info.num_frames, info.fps, 2)
    assert seconds == pytest.approx(2 / sampled.sampled_fps, rel=1e-12)
    groups = [
        torch.from_numpy(np.stack([resize_frame(frame, plan.target_size) for frame in clip.read(group)]))
        for group in plan.groups
    ]
    patches = patchify(groups, load_image_processing(checkpoint))
    off = (patches - expected["pixel_values_videos"]).abs().max()
    assert off <= 1e-6, f"patches are off by {off:.2e}; one step of a byte is 1.4e-2"
    clip.close()


@pytest.mark.parametrize("seed", range(NUM_CLIPS))
def test_a_clip_becomes_the_references_frames_grid_tokens_and_patches(
    seed: int, reference: Any, checkpoint: Path
) -> None:
    check_clip(seed, reference, checkpoint)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(NUM_CLIPS, NUM_CLIPS_SOAK))
def test_each_of_many_clips_becomes_the_references_frames_grid_tokens_and_patches(
    seed: int, reference: Any, checkpoint: Path
) -> None:
    check_clip(seed, reference, checkpoint)


@given(
    st.integers(2, 3000),
    st.floats(0.5, 120),
    st.floats(0.1, 30),
    st.one_of(st.none(), st.integers(2, 900)),
    st.one_of(st.none(), st.integers(4, 900)),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_frame_indices_equal_the_references_wherever_it_has_some(
    clip_frames: int, clip_fps: float, fps: float, num_frames: int | None, max_frames: int | None
) -> None:
    wanted: dict[str, Any] = {"max_frames": max_frames or 768}
    wanted |= {"fps": fps} if num_frames is None else {"num_frames": min(num_frames, clip_frames)}
    if num_frames is not None:
        wanted["max_frames"] = 900
    choice = frame_choice(PROCESSING, **wanted, frame_limit=900)
    indices = frame_indices(clip_frames, clip_fps, choice, 2)
    assert len(indices) % 2 == 0
    assert len(indices) >= 2
    assert all(0 <= index < clip_frames for index in indices)
    assert list(indices) == sorted(indices)
    metadata = msgspec.structs.asdict(_Metadata(clip_frames, clip_fps))
    try:
        expected = video_processor().sample_frames(_as_attributes(metadata), **wanted).tolist()
    except (ValueError, ZeroDivisionError):  # fewer than one group, or more frames than there are
        return
    assert list(indices) == expected


class _Metadata(msgspec.Struct):
    total_num_frames: int
    fps: float


def _as_attributes(values: dict[str, Any]) -> Any:
    return type("Metadata", (), values)()


@pytest.mark.parametrize(
    ("clip_frames", "choice", "expected"),
    [
        (1, FrameChoice(2.0, None, 4, 768), (0, 0)),
        (2, FrameChoice(2.0, None, 4, 768), (0, 1)),
        (3, FrameChoice(2.0, None, 4, 768), (0, 1)),
        (9, FrameChoice(2.0, 1, 4, 768), (0, 4)),
        (9, FrameChoice(2.0, 100, 4, 768), (0, 1, 2, 3, 4, 5, 6, 7)),
        (9, FrameChoice(2.0, 100, 4, 5), (0, 2, 4, 6)),
        (100, FrameChoice(2.0, None, 4, 1), (0, 50)),
    ],
)
def test_where_the_reference_refuses_as_many_frames_are_taken_as_can_be(
    clip_frames: int, choice: FrameChoice, expected: tuple[int, ...]
) -> None:
    assert frame_indices(clip_frames, 10.0, choice, 2) == expected


def test_a_rate_that_is_huge_or_tiny_gives_frames_within_the_bounds() -> None:
    choice = frame_choice(PROCESSING, fps=1e300, frame_limit=10)
    assert len(frame_indices(100, 1e-300, choice, 2)) == 10
    choice = frame_choice(PROCESSING, fps=1e-300, frame_limit=10)
    assert len(frame_indices(100, 1e300, choice, 2)) == 4


@pytest.mark.parametrize(
    "wanted",
    [
        {"fps": 0.0},
        {"fps": -1.0},
        {"fps": math.nan},
        {"fps": math.inf},
        {"num_frames": 0},
        {"max_frames": 0},
        {"fps": 1.0, "num_frames": 4},
    ],
)
def test_what_cannot_be_sampled_is_refused(wanted: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"fps|num_frames|max_frames"):
        frame_choice(PROCESSING, **wanted, frame_limit=768)


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 384), st.integers(10, 10**9))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_sizes_under_a_bound_of_all_pixels_equal_the_references(
    width: int, height: int, num_groups: int, total_tokens: int
) -> None:
    if max(width, height) / min(width, height) > 200:
        return
    processor = video_processor(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS, max_video_tokens=total_tokens)
    total_pixels = int(total_tokens * 28 * 28 * 0.9)
    frames = torch.zeros(1, 2 * num_groups, 1, 1, 1).expand(1, -1, 1, height, width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(processor).__mro__[2], "resize", lambda self, image, size, **options: size)
        size = processor.resize(
            frames,
            size=_as_attributes({"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}),
            resample=3,
            factor=28,
            cap_pixels_per_frame=True,
        )
    ours = frame_size(width, height, 2 * num_groups, PROCESSING, total_pixels=total_pixels)
    assert ours == (size.width, size.height)


@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_frames_that_were_chosen_already_are_all_taken(num_frames: int, reference: Any) -> None:
    plan = plan_clip(100, 80, num_frames, 2.0, PROCESSING, None, None)
    frames = torch.zeros(num_frames, 3, 80, 100, dtype=torch.uint8)
    expected = reference([frames], do_sample_frames=False, return_tensors="pt")["video_grid_thw"]
    assert [list(plan.grid_thw)] == expected.tolist()
    last = num_frames - 1
    assert [index for group in plan.groups for index in group] == [min(i, last) for i in range(2 * len(plan.groups))]


def test_bounds_of_pixels_that_contradict_each_other_are_refused() -> None:
    for bounds in ({"min_pixels": 10**7}, {"max_pixels": 10}, {"min_pixels": 0}, {"total_pixels": 0}):
        with pytest.raises(ValueError, match="pixels"):
            frame_size(100, 100, 4, PROCESSING, **bounds)


def test_groups_closer_than_a_second_keep_their_times() -> None:
    assert time_offsets(4, 1.0, None) == (0, 1, 2, 3)
    assert time_offsets(4, 1.0, 2.0) == (0, 2, 4, 6)
    assert time_offsets(5, 0.7, 2.0) == (0, 1, 2, 4, 5)


def test_the_checkpoint_says_how_frames_are_sampled_and_sized(checkpoint: Path) -> None:
    images = load_image_processing(checkpoint)
    from_images = load_video_processing(checkpoint)
    assert (from_images.min_pixels, from_images.max_pixels) == (images.min_pixels, images.max_pixels)
    assert (from_images.fps, from_images.min_frames, from_images.max_frames) == (2.0, 4, 768)
    fields = json.loads((checkpoint / "preprocessor_config.json").read_text())
    fields |= {"max_pixels": 50_000, "min_pixels": 10_000, "fps": 1, "min_frames": 2, "max_frames": 12}
    file = checkpoint / "video_preprocessor_config.json"
    try:
        file.write_text(json.dumps(fields))
        own = load_video_processing(checkpoint)
        assert (own.min_pixels, own.max_pixels, own.fps, own.min_frames, own.max_frames) == (10_000, 50_000, 1.0, 2, 12)
        file.write_text(json.dumps(fields | {"image_mean": [0.5, 0.5, 0.5]}))
        with pytest.raises(CheckpointError, match="image_mean"):
            load_video_processing(checkpoint)
    finally:
        file.unlink()
