"""How much of a GPU a process holds; and what took its memory, in one line for a person, and which option lowers it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

_GIB = 1 << 30
_WORTH_NAMING_BYTES = _GIB // 200
_WATCH_S = 2.0


def parameter_bytes(module: nn.Module) -> int:
    """Of all parameters and buffers, those that are shared once."""
    tensors = {tensor.data_ptr(): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


async def watch_held_memory(device: str, beside_torch_bytes: int, told: Callable[[int], None]) -> None:
    """Tell, from time to time and for good, how much of a GPU this process holds, its CUDA context apart.

    Args: `beside_torch_bytes` are what it has allocated past torch.
    """
    while True:
        told(torch.cuda.memory_reserved(device) + beside_torch_bytes)
        await asyncio.sleep(_WATCH_S)


def out_of_memory_text(
    stage: str,
    device: torch.device,
    named: Mapping[str, int],
    options: Sequence[str],
    outside_torch: Mapping[str, int] | None = None,
) -> str:
    """One line for whoever has to make room: who holds what on this device, and which option to lower.

    Args: `stage` is what did not fit; `named` are bytes of this process within torch's allocator, as
    {"the weights of the LLM": n}; `outside_torch` are those beside it (a slab); `options` are the flags to lower.
    """
    free, total = torch.cuda.mem_get_info(device)
    return usage_text(
        stage,
        str(device),
        named,
        options,
        outside_torch or {},
        allocated=torch.cuda.memory_allocated(device),
        reserved=torch.cuda.memory_reserved(device),
        free=free,
        total=total,
    )


def usage_text(
    stage: str,
    device: str,
    named: Mapping[str, int],
    options: Sequence[str],
    outside_torch: Mapping[str, int],
    *,
    allocated: int,
    reserved: int,
    free: int,
    total: int,
) -> str:
    """See out_of_memory_text; `allocated` and `reserved` are torch's counters, `free` and `total` the driver's."""
    unnamed = max(0, allocated - sum(named.values()))
    others = max(0, total - free - reserved - sum(outside_torch.values()))
    parts = {
        **named,
        **outside_torch,
        "other tensors of this process": unnamed,
        "kept by torch for reuse": max(0, reserved - allocated),
        "other processes and CUDA contexts": others,
    }
    taken = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in parts.items() if size >= _WORTH_NAMING_BYTES)
    return (
        f"{device} has no room for {stage}: of its {total / _GIB:.2f} GiB, {taken or 'nothing'}, "
        f"free {free / _GIB:.2f}; lower {' or '.join(options)}"
    )
