"""The torch engine: still images, clips and quanta of any size make the same rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.actors.vit.conftest import Checkpoint
from tests.video_reference import video_processor
from vlmrt.actors.models.checkpoint_files import check_weight_files
from vlmrt.actors.models.registry import family
from vlmrt.actors.models.vision_grid import GridThw
from vlmrt.actors.models.vision_tower import VisionTower
from vlmrt.actors.vit.engines.engine import Pixels
from vlmrt.actors.vit.engines.torch import TorchEngine
from vlmrt.kernels.patchify import patchify

CPU = torch.device("cpu")
FRAMES = (1, 1, 4, 2, 1)
SIZES = ((4, 6), (8, 10), (2, 4), (6, 6), (10, 18))  # patches


def load_tower(checkpoint: Checkpoint) -> VisionTower:
    files = check_weight_files(checkpoint.directory)
    return family(checkpoint.config.model_type).load_vision(files, checkpoint.config, CPU, torch.float32)


def batch(frames: Sequence[int]) -> tuple[list[Pixels], list[GridThw]]:
    draw = np.random.default_rng(0)
    images: list[Pixels] = [
        draw.integers(0, 256, (count, 14 * height, 14 * width, 3), dtype=np.uint8)
        for count, (height, width) in zip(frames, SIZES, strict=True)
    ]
    return images, [(-(-count // 2), height, width) for count, (height, width) in zip(frames, SIZES, strict=True)]


def encode(engine: TorchEngine, images: list[Pixels], grids: list[GridThw]) -> tuple[Tensor, int]:
    """(rows, quanta that it took)."""
    run = engine.prepare(images, grids)
    quanta = 1
    while not engine.run_quantum(run):
        quanta += 1
    return engine.rows(run), quanta


@torch.inference_mode()
@pytest.mark.parametrize("frames", [(1, 1, 1, 1, 1), FRAMES, (2, 2, 4, 2, 2)])
def test_still_images_and_clips_give_the_rows_of_the_full_patches(
    checkpoint: Checkpoint, frames: tuple[int, ...]
) -> None:
    tower = load_tower(checkpoint)
    images, grids = batch(frames)
    rows, _ = encode(TorchEngine(tower, checkpoint.processing, CPU, 1.0), images, grids)
    expected = tower(patchify([torch.from_numpy(image) for image in images], checkpoint.processing), grids)
    assert (rows - expected).abs().max() <= 2e-6 * expected.abs().max()


@torch.inference_mode()
def test_the_kernel_of_a_still_image_is_the_sum_of_its_slices(one_checkpoint: Checkpoint) -> None:
    tower = load_tower(one_checkpoint)
    vision = one_checkpoint.config.vision
    slices = tower.patch_embed.view(vision.embed_dim, 3, vision.temporal_patch_size, -1).double()
    exact = slices.sum(2).view(vision.embed_dim, -1)
    tower.to(torch.bfloat16)
    rounded = tower.patch_embed.view(vision.embed_dim, 3, vision.temporal_patch_size, -1).float()
    assert torch.equal(tower.patch_embed_still(), rounded.sum(2).bfloat16().view(vision.embed_dim, -1))
    tower.to(torch.float32)
    assert (load_tower(one_checkpoint).patch_embed_still() - exact).abs().max() <= 1e-7 * exact.abs().max()


@torch.inference_mode()
def test_the_length_of_a_quantum_changes_no_row(checkpoint: Checkpoint) -> None:
    tower = load_tower(checkpoint)
    images, grids = batch(FRAMES)
    whole = TorchEngine(tower, checkpoint.processing, CPU, 1e6)
    first, _ = encode(whole, images, grids)  # measures the time of a layer
    rows, quanta = encode(whole, images, grids)
    assert quanta == 1
    assert torch.equal(rows, first)
    rows, quanta = encode(TorchEngine(tower, checkpoint.processing, CPU, 1e-9), images, grids)
    assert quanta == tower.num_layers
    assert torch.equal(rows, first)


@torch.inference_mode()
def test_groups_of_a_clip_one_by_one_give_the_references_rows_of_the_whole_clip(checkpoint: Checkpoint) -> None:
    """Two different frames a group, in batches with still images and with groups of another clip."""
    engine = TorchEngine(load_tower(checkpoint), checkpoint.processing, CPU, 1.0)
    draw = np.random.default_rng(5)
    clips = [
        draw.integers(0, 256, (frames, 14 * height, 14 * width, 3), dtype=np.uint8)
        for frames, height, width in ((6, 18, 10), (4, 4, 6))
    ]
    still = draw.integers(0, 256, (1, 28, 28, 3), dtype=np.uint8)
    images: list[Pixels] = [still, clips[0][0:2], clips[1][0:2], clips[0][2:4], still, clips[1][2:4], clips[0][4:6]]
    grids: list[GridThw] = [(1, image.shape[1] // 14, image.shape[2] // 14) for image in images]
    rows, _ = encode(engine, images, grids)
    counts = [height * width // 4 for _, height, width in grids]
    parts = rows.split(counts)  # type: ignore[no-untyped-call]
    for clip, places in zip(clips, ((1, 3, 6), (2, 5)), strict=True):
        processor = video_processor(do_resize=False, do_sample_frames=False)
        made = processor(torch.from_numpy(clip).permute(0, 3, 1, 2), return_tensors="pt")
        grid = made["video_grid_thw"]
        assert grid.tolist() == [[len(places), clip.shape[1] // 14, clip.shape[2] // 14]]
        expected = checkpoint.reference_tower(made["pixel_values_videos"], grid_thw=grid).pooler_output
        ours = torch.cat([parts[place] for place in places])
        assert (ours - expected).abs().max() <= 4e-6 * expected.abs().max()
