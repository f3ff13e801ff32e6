"""Blocks of the KV cache between their layers and one piece, a layer of a block per program."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vlmrt.kernels.triton.compile_spec import CompileSpec

MAX_VALUES = 4096  # moved at once by a program
NUM_WARPS = 8


@triton.jit
def _copy_blocks_kernel(
    cache_ptr,
    block_ids_ptr,
    blocks_ptr,
    layer_stride,
    LAYERS: tl.constexpr,
    SIZE: tl.constexpr,
    VALUES: tl.constexpr,
    TO_CACHE: tl.constexpr,
):
    index, layer = tl.program_id(0) // LAYERS, tl.program_id(0) % LAYERS
    block_id = tl.load(block_ids_ptr + index)
    in_cache = cache_ptr + layer.to(tl.int64) * layer_stride + block_id * SIZE
    in_blocks = blocks_ptr + tl.program_id(0).to(tl.int64) * SIZE
    for first in tl.static_range(0, SIZE, VALUES):
        places = first + tl.arange(0, VALUES)
        inside = places < SIZE
        if TO_CACHE:
            tl.store(in_cache + places, tl.load(in_blocks + places, mask=inside), mask=inside)
        else:
            tl.store(in_blocks + places, tl.load(in_cache + places, mask=inside), mask=inside)


def gather_blocks_triton(cache: Tensor, block_ids: Tensor, blocks: Tensor) -> None:
    _launch(cache, block_ids, blocks, False)


def scatter_blocks_triton(blocks: Tensor, block_ids: Tensor, cache: Tensor) -> None:
    _launch(cache, block_ids, blocks, True)


def _launch(cache: Tensor, block_ids: Tensor, blocks: Tensor, to_cache: bool) -> None:
    assert cache.is_contiguous()
    assert blocks.is_contiguous()
    if not len(block_ids):
        return
    layers, size = len(cache), cache[0, 0].numel()
    values = min(MAX_VALUES, triton.next_power_of_2(size))
    _copy_blocks_kernel[(len(block_ids) * layers,)](
        cache, block_ids, blocks, cache.stride(0), layers, size, values, to_cache, num_warps=NUM_WARPS
    )


def compile_specs() -> list[CompileSpec]:
    """2B's blocks: 16 tokens, 2 KV heads of 128."""
    signature = {"cache_ptr": "*bf16", "block_ids_ptr": "*i64", "blocks_ptr": "*bf16", "layer_stride": "i32:16"}
    shape = {"LAYERS": 56, "SIZE": 4096, "VALUES": MAX_VALUES}
    return [
        CompileSpec(f"{name} 56x4096", _copy_blocks_kernel, signature, shape | {"TO_CACHE": to_cache}, NUM_WARPS, 3)
        for name, to_cache in (("gather_blocks", False), ("scatter_blocks", True))
    ]
