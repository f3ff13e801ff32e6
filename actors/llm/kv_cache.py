"""The tensors that hold keys and values, and how many blocks of them fit."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from vlmrt.actors.models.config import TextConfig
from vlmrt.runtime.config import Config
from vlmrt.runtime.errors import StartupError

GIB = 1 << 30
MAX_DEFAULT_CPU_BYTES = GIB

KvCache = list[tuple[Tensor, Tensor]]


def block_bytes(text: TextConfig, tp: int, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block on one rank: keys and values of all its layers."""
    return 2 * text.num_layers * block_size * (text.num_kv_heads // tp) * text.head_dim * dtype.itemsize


def num_blocks_that_fit(
    config: Config, text: TextConfig, dtype: torch.dtype, device: torch.device, reserved_bytes: int = 0
) -> int:
    """Blocks of this rank's cache: as configured, else by the memory there is.

    On a CPU: what max_num_seqs sequences of max_model_len tokens can use, within 1 GiB unless one sequence alone
    needs more.  On a GPU: what gpu_memory_fraction leaves when everything else is loaded, less reserved_bytes; call
    it after a largest step has run, so that the step's workspace is counted.
    Raises: StartupError if not even one block fits.
    """
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
        said = f"--gpu-memory-fraction {config.memory.gpu_memory_fraction:g} with {free / GIB:.2f} GiB free"
    if num_blocks < 1:
        raise StartupError(f"{said}: too little for the KV cache, one block of which takes {size / GIB:.4f} GiB")
    return num_blocks


def allocate(
    num_blocks: int, block_size: int, text: TextConfig, tp: int, dtype: torch.dtype, device: torch.device
) -> KvCache:
    """(keys, values) of each layer, each zeros [num_blocks, block_size, num_kv_heads / tp, head_dim].

    On a CPU the pages are mapped when first written, so a large cache costs neither time nor memory at the start.
    Raises: StartupError if the memory cannot be had.
    """
    shape = (num_blocks, block_size, text.num_kv_heads // tp, text.head_dim)
    try:
        return [(_zeros(shape, dtype, device), _zeros(shape, dtype, device)) for _ in range(text.num_layers)]
    except (OSError, torch.OutOfMemoryError) as error:
        size = block_bytes(text, tp, block_size, dtype) * num_blocks
        raise StartupError(f"--kv-cache-gib: {size / GIB:.2f} GiB for the KV cache cannot be had: {error}") from None


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
