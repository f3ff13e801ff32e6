"""Resized uint8 images and clips cut into normalised, flattened patches."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class PatchRules(Protocol):
    """What patchify needs to know of a checkpoint's image processing."""

    @property
    def patch_size(self) -> int: ...
    @property
    def temporal_patch_size(self) -> int: ...
    @property
    def merge_size(self) -> int: ...
    @property
    def image_mean(self) -> tuple[float, float, float]: ...
    @property
    def image_std(self) -> tuple[float, float, float]: ...
    @property
    def rescale_factor(self) -> float: ...


def normalised_values(processing: PatchRules) -> Tensor:
    """Normalised value of every byte in every channel, float32 [3 * 256]: a byte has only 256 outcomes.

    Rounded as the reference processors do: rescaled in float64, then float32, then normalised in float32.
    """
    rescaled = (np.arange(256, dtype=np.float64) * processing.rescale_factor).astype(np.float32)
    mean = np.array(processing.image_mean, dtype=np.float32)[:, None]
    std = np.array(processing.image_std, dtype=np.float32)[:, None]
    return torch.from_numpy(((rescaled[None] - mean) / std).reshape(-1))


def patchify_reference(pixels: Tensor, processing: PatchRules, values: Tensor) -> Tensor:
    """The patches of one image or clip; values is normalised_values, or what they round to."""
    frames, height, width, channels = pixels.shape
    patch, tps, merge = processing.patch_size, processing.temporal_patch_size, processing.merge_size
    missing = -frames % tps
    if missing:  # the last frame fills up the last temporal group; a still image becomes tps equal frames
        pixels = torch.cat((pixels, pixels[-1:].expand(missing, -1, -1, -1)))
        frames += missing
    block = patch * merge
    # Bytes are put in patch order before they become floats: a quarter of the memory to move.
    ordered = (
        pixels.reshape(frames // tps, tps, height // block, merge, patch, width // block, merge, patch, channels)
        .permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
        .reshape(-1, channels, tps * patch * patch)
    )
    channel = torch.arange(channels, dtype=torch.int32, device=pixels.device)[None, :, None] * 256
    index = ordered.to(torch.int32) + channel
    return values.index_select(0, index.view(-1)).view(-1, channels * tps * patch * patch)


def patchify(pixels: Sequence[Tensor], processing: PatchRules, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normalised patches of images and clips, in the order the vision towers read them.

    Shapes: each of pixels uint8 [t, h, w, 3], already resized, on one device ->
    [num_patches, 3 * temporal_patch_size * patch_size**2] of dtype, the float32 values rounded once: images one after
    the other; in each, temporal groups, then merge blocks by row and column, then the patches of a block. A frame
    count that is not a multiple of temporal_patch_size is filled up with the last frame.
    Raises: ValueError if a tensor is not uint8 [t, h, w, 3] with h and w multiples of patch_size * merge_size.
    """
    block = processing.patch_size * processing.merge_size
    for image in pixels:
        if image.dtype != torch.uint8 or image.dim() != 4 or image.shape[3] != 3 or not image.shape[0]:
            raise ValueError(f"pixels are {image.dtype} {list(image.shape)}, expected uint8 [t, h, w, 3]")
        if image.shape[1] % block or image.shape[2] % block:
            raise ValueError(f"pixels have shape {list(image.shape)}, height and width must be multiples of {block}")
    if not pixels:
        raise ValueError("patchify was given no image")
    values = normalised_values(processing)
    if pixels[0].device.type == "cuda":
        from vlmrt.kernels.triton.patchify import patchify_triton

        values = values.pin_memory().to(pixels[0].device, non_blocking=True)
        rules = (processing.patch_size, processing.temporal_patch_size, processing.merge_size)
        return patchify_triton(pixels, values, *rules, dtype)
    values = values.to(dtype)
    patches = [patchify_reference(image, processing, values) for image in pixels]
    return patches[0] if len(patches) == 1 else torch.cat(patches)
