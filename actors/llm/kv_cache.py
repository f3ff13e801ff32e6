"""The tensors that hold keys and values, and how many blocks of them fit."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from vlmrt.actors.models.config import TextConfig
from vlmrt.actors.models.gpu_memory import out_of_memory_text
from vlmrt.runtime.config import Config
from vlmrt.runtime.errors import StartupError

GIB = 1 << 30
MAX_DEFAULT_CPU_BYTES = GIB

KvCache = list[tuple[Tensor, Tensor]]  # (keys, values) of each layer

WEIGHTS = "the weights of the LLM"
LARGEST_STEP = "the workspace of the largest step"
KV_CACHE = "the KV cache"
RECORDED_STEPS = "the recorded steps"
TO_LOWER = {
    WEIGHTS: ("--embedding-cache-gib", "raise --tp"),
    LARGEST_STEP: ("--max-num-batched-tokens", "--max-num-seqs", "--embedding-cache-gib"),
    KV_CACHE: ("--kv-cache-gib", "--max-num-batched-tokens", "--embedding-cache-gib"),
    RECORDED_STEPS: ("--max-num-seqs", "--kv-cache-gib", "--gpu-memory-fraction"),
}


@contextmanager
def room_for(what: str, device: torch.device, taken: Mapping[str, int]) -> Iterator[None]:
    """Say who holds the GPU's memory when one of the things above finds no room.

    Args: `taken` are the bytes of what this rank has loaded so far, by name.
    Raises: StartupError in place of torch.OutOfMemoryError.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise StartupError(out_of_memory_text(what, device, taken, TO_LOWER[what])) from None


def block_shape(text: TextConfig, tp: int, block_size: int) -> tuple[int, int, int, int]:
    """One block on one rank: keys and then values of each layer."""
    return 2 * text.num_layers, block_size, text.num_kv_heads // tp, text.head_dim


def block_bytes(text: TextConfig, tp: int, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block on one rank: keys and values of all its layers."""
    return math.prod(block_shape(text, tp, block_size)) * dtype.itemsize


def num_blocks_that_fit(
    config: Config,
    text: TextConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    at_last_start: int | None = None,
    taken: Mapping[str, int] | None = None,
    reserved_bytes: int = 0,
) -> int:
    """Blocks of this rank's cache: as many as at the last start, else as configured, else by the memory there is.

    On a CPU: what max_num_seqs sequences of max_model_len tokens can use, within 1 GiB unless one sequence alone
    needs more.  On a GPU: what gpu_memory_fraction leaves when everything else is loaded, less reserved_bytes for
    the workspace of steps.  `taken` are the bytes of what this rank holds, by name.
    Raises: StartupError if not even one block fits.
    """
    if at_last_start is not None:
        return at_last_start
    size = block_bytes(text, config.parallel.tp, config.scheduling.block_size, dtype)
    if config.memory.num_kv_blocks is not None:
        num_blocks, said = config.memory.num_kv_blocks, f"--num-kv-blocks {config.memory.num_kv_blocks}"
    elif config.memory.kv_cache_gib is not None:
        num_blocks = int(config.memory.kv_cache_gib * GIB) // size
        said = f"--kv-cache-gib {config.memory.kv_cache_gib:g}"
    elif device.type == "cpu":
        # two more tokens: steps planned past the end of a sequence
        per_sequence = -(-(config.model.max_model_len + 2) // config.scheduling.block_size)
        most = per_sequence * config.scheduling.max_num_seqs
        num_blocks, said = min(most, max(per_sequence, MAX_DEFAULT_CPU_BYTES // size)), "memory"
    else:
        free, total = torch.cuda.mem_get_info(device)
        num_blocks = int(free - reserved_bytes - (1.0 - config.memory.gpu_memory_fraction) * total) // size
        said = f"--gpu-memory-fraction {config.memory.gpu_memory_fraction:g}"
        if num_blocks < 1:
            what = f"a KV cache within {said}"
            to_lower = ("--embedding-cache-gib", "--max-num-batched-tokens", "raise --gpu-memory-fraction")
            raise StartupError(out_of_memory_text(what, device, taken or {}, to_lower))
    if num_blocks < 1:
        raise StartupError(f"{said}: too little for the KV cache, one block of which takes {size / GIB:.4f} GiB")
    return num_blocks


def allocate(
    num_blocks: int, block_size: int, text: TextConfig, tp: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Zeros [2 * layers, num_blocks, block_size, num_kv_heads / tp, head_dim]: one tensor, so that a copy of blocks
    takes all layers at once.

    Raises: StartupError if a CPU does not have the memory, torch.OutOfMemoryError if a GPU does not.
    """
    layers, *rest = block_shape(text, tp, block_size)
    try:
        return zeros((layers, num_blocks, *rest), dtype, device)
    except OSError as error:
        size = block_bytes(text, tp, block_size, dtype) * num_blocks
        raise StartupError(f"--kv-cache-gib: {size / GIB:.2f} GiB for the KV cache cannot be had: {error}") from None


def by_layer(cache: Tensor) -> KvCache:
    """Views of an allocated cache, each [num_blocks, block_size, num_kv_heads / tp, head_dim]."""
    return list(zip(cache[0::2], cache[1::2], strict=True))


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU the pages are mapped when first written, so that much memory costs nothing at the start.

    Raises: OSError if a CPU does not have the memory, torch.OutOfMemoryError if a GPU does not.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
