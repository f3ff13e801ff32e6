"""Blocks of the KV cache, gathered from all layers into one piece each and put back."""

from torch import Tensor


def gather_blocks_reference(cache: Tensor, block_ids: Tensor) -> Tensor:
    return cache[:, block_ids].transpose(0, 1).contiguous()


def gather_blocks(cache: Tensor, block_ids: Tensor, blocks: Tensor) -> None:
    """blocks[i] = cache[:, block_ids[i]], bit by bit.

    Shapes: cache [2 * layers, num_blocks, ...], block_ids int64 [N], blocks [N, 2 * layers, ...] of the cache's dtype;
    cache and blocks contiguous.
    Raises: ValueError if the shapes do not fit.   Cost: one read and one write per element.
    """
    _check_shapes(cache, block_ids, blocks)
    if cache.device.type == "cuda":
        from vlmrt.kernels.triton.block_copies import gather_blocks_triton

        gather_blocks_triton(cache, block_ids, blocks)
    else:
        blocks.copy_(gather_blocks_reference(cache, block_ids))


def scatter_blocks(blocks: Tensor, block_ids: Tensor, cache: Tensor) -> None:
    """cache[:, block_ids[i]] = blocks[i], bit by bit; no block twice.  Otherwise as gather_blocks."""
    _check_shapes(cache, block_ids, blocks)
    if cache.device.type == "cuda":
        from vlmrt.kernels.triton.block_copies import scatter_blocks_triton

        scatter_blocks_triton(blocks, block_ids, cache)
    else:
        cache.index_copy_(1, block_ids, blocks.transpose(0, 1))


def _check_shapes(cache: Tensor, block_ids: Tensor, blocks: Tensor) -> None:
    expected = (len(block_ids), len(cache), *cache.shape[2:])
    if blocks.shape != expected:
        raise ValueError(f"blocks have shape {list(blocks.shape)}, expected {list(expected)}")
