"""Bytes of an image to normalised values of its patches, one patch per program."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmrt.kernels.triton.compile_spec import CompileSpec

NUM_WARPS = 4


# Frames and sizes vary with the image: specialised, each kind of size would compile again.
@triton.jit(do_not_specialize=["frames", "height", "width", "frame_stride", "line_stride"])
def _patchify_kernel(
    pixels_ptr,
    values_ptr,
    out_ptr,
    frames,
    height,
    width,
    frame_stride,
    line_stride,
    PATCH: tl.constexpr,
    TEMPORAL: tl.constexpr,
    MERGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    AREA: tl.constexpr = PATCH * PATCH
    COLUMNS: tl.constexpr = 3 * TEMPORAL * AREA
    index = tl.program_id(0)
    merge_column = index % MERGE
    merge_row = index // MERGE % MERGE
    block_index = index // (MERGE * MERGE)
    blocks_across = width // (PATCH * MERGE)
    blocks_down = height // (PATCH * MERGE)
    block_column = block_index % blocks_across
    block_row = block_index // blocks_across % blocks_down
    group = block_index // (blocks_across * blocks_down)

    column = tl.arange(0, BLOCK)
    inside = column < COLUMNS
    channel = column // (TEMPORAL * AREA)
    # The last frame fills up the last temporal group.
    frame = tl.minimum(group * TEMPORAL + column // AREA % TEMPORAL, frames - 1)
    y = (block_row * MERGE + merge_row) * PATCH + column // PATCH % PATCH
    x = (block_column * MERGE + merge_column) * PATCH + column % PATCH
    source = pixels_ptr + frame.to(tl.int64) * frame_stride + y * line_stride + x * 3 + channel
    byte = tl.load(source, mask=inside, other=0).to(tl.int32)
    value = tl.load(values_ptr + channel * 256 + byte, mask=inside, other=0.0)
    target = out_ptr + index.to(tl.int64) * COLUMNS + column
    tl.store(target, value.to(out_ptr.dtype.element_ty), mask=inside)


def patchify_triton(
    pixels: Sequence[Tensor], values: Tensor, patch: int, temporal: int, merge: int, dtype: torch.dtype
) -> Tensor:
    counts = [
        triton.cdiv(image.shape[0], temporal) * (image.shape[1] // patch) * (image.shape[2] // patch)
        for image in pixels
    ]
    columns = 3 * temporal * patch * patch
    out = torch.empty(sum(counts), columns, dtype=dtype, device=pixels[0].device)
    for image, patches in zip(pixels, torch.split(out, counts), strict=True):
        if image.stride()[2:] != (3, 1):
            image = image.contiguous()
        _patchify_kernel[(patches.shape[0],)](
            image,
            values,
            patches,
            *image.shape[:3],
            *image.stride()[:2],
            patch,
            temporal,
            merge,
            triton.next_power_of_2(columns),
            num_warps=NUM_WARPS,
        )
    return out


def compile_specs() -> list[CompileSpec]:
    pointers = {"pixels_ptr": "*u8", "values_ptr": "*fp32", "out_ptr": "*bf16"}
    scalars = dict.fromkeys(("frames", "height", "width", "frame_stride", "line_stride"), "i32")
    shape = {"PATCH": 14, "TEMPORAL": 2, "MERGE": 2, "BLOCK": 2048}
    return [CompileSpec("patchify 14", _patchify_kernel, pointers | scalars, shape, NUM_WARPS, 3)]
