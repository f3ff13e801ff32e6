"""A rank's host memory for KV blocks, and the copies between it and the KV cache.

What lies where is the scheduler's business: a plan names both ends of every copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from vlmrt.actors.llm.kv_cache import GIB, block_bytes
from vlmrt.actors.llm.slots import PlanError
from vlmrt.actors.models.config import TextConfig
from vlmrt.kernels.block_copies import gather_blocks, scatter_blocks
from vlmrt.runtime.config import Config
from vlmrt.runtime.errors import StartupError
from vlmrt.runtime.host_buffer import HostBuffer
from vlmrt.runtime.messages import BlockCopy

# Staging on the device.  While one part's blocks cross the link, steps and the next part's blocks need not wait.
PART_BLOCKS = 32
NUM_PARTS = 4


def num_blocks_of_host(config: Config, text: TextConfig, dtype: torch.dtype) -> int:
    """Blocks that --kv-host-cache-gib holds on one rank.

    Raises: StartupError if it is more than nothing and less than a block.
    """
    gib = config.memory.kv_host_cache_gib
    size = block_bytes(text, config.parallel.tp, config.scheduling.block_size, dtype)
    num_blocks = int(gib * GIB) // size
    if gib and not num_blocks:
        raise StartupError(f"--kv-host-cache-gib {gib:g}: too little, one KV block takes {size / GIB:.4f} GiB")
    return num_blocks


def staging_bytes(size: int) -> int:
    """Device memory beside the KV cache that blocks of so many bytes are copied through."""
    return NUM_PARTS * PART_BLOCKS * size


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the staging, used by the compute stream and the copy stream in turn."""

    blocks: Tensor  # [PART_BLOCKS, *one block]
    block_ids: Tensor  # int64 [PART_BLOCKS]
    filled: torch.cuda.Event = field(default_factory=torch.cuda.Event)
    emptied: torch.cuda.Event = field(default_factory=torch.cuda.Event)


class KvHostTier:
    """Copies blocks of the KV cache to host memory and back.

    On a GPU all copies over the link are queued on one stream and thus happen in their order; the caller's stream
    waits for loads, and for saves only while the staging is full.  The host waits for nothing.
    """

    def __init__(self, cache: Tensor, host: HostBuffer) -> None:
        """cache: [2 * layers, num_blocks, ...] of kv_cache.allocate; host: [num_host_blocks, 2 * layers, ...] alike."""
        self._cache = cache
        self._host = host
        self._parts: list[Part] = []
        self._next_part = 0
        self._copy_stream: torch.cuda.Stream | None = None
        if cache.device.type != "cpu":
            shape = (PART_BLOCKS, len(cache), *cache.shape[2:])
            for _ in range(NUM_PARTS):
                blocks = torch.empty(shape, dtype=cache.dtype, device=cache.device)
                self._parts.append(Part(blocks, torch.zeros(PART_BLOCKS, dtype=torch.int64, device=cache.device)))
            self._copy_stream = torch.cuda.Stream(cache.device)  # type: ignore[no-untyped-call]

    def save(self, copies: Sequence[BlockCopy]) -> None:
        """Copy blocks of the cache, as the caller's stream finds them, to host memory.

        Where two copies go to one host block, the later counts.  Raises: PlanError if there is no such block.
        """
        self._check(copies)
        last = {copy.host_block_id: copy for copy in copies}.values()
        if self._copy_stream is None:
            for copy in last:
                self._host.tensor[copy.host_block_id].copy_(self._cache[:, copy.block_id])
            return
        compute = torch.cuda.current_stream(self._cache.device)
        for part, block_ids, host_block_ids in self._staged(last):
            compute.wait_event(part.emptied)
            part.block_ids[: len(block_ids)].copy_(_pinned(block_ids), non_blocking=True)
            gather_blocks(self._cache, part.block_ids[: len(block_ids)], part.blocks[: len(block_ids)])
            part.filled.record(compute)
            self._copy_stream.wait_event(part.filled)
            with torch.cuda.stream(self._copy_stream):
                for places, memory in self._runs(host_block_ids):
                    memory.copy_(part.blocks[places], non_blocking=True)
                part.emptied.record(self._copy_stream)

    def load(self, copies: Sequence[BlockCopy]) -> None:
        """Copy blocks from host memory into the cache before whatever the caller's stream is given next.

        Where two copies go to one block, the later counts.  Raises: PlanError if there is no such block.
        """
        self._check(copies)
        last = {copy.block_id: copy for copy in copies}.values()
        if self._copy_stream is None:
            for copy in last:
                self._cache[:, copy.block_id].copy_(self._host.tensor[copy.host_block_id])
            return
        compute = torch.cuda.current_stream(self._cache.device)
        for part, block_ids, host_block_ids in self._staged(last):
            self._copy_stream.wait_event(part.emptied)
            with torch.cuda.stream(self._copy_stream):
                for places, memory in self._runs(host_block_ids):
                    part.blocks[places].copy_(memory, non_blocking=True)
                part.filled.record(self._copy_stream)
            part.block_ids[: len(block_ids)].copy_(_pinned(block_ids), non_blocking=True)
            compute.wait_event(part.filled)
            scatter_blocks(part.blocks[: len(block_ids)], part.block_ids[: len(block_ids)], self._cache)
            part.emptied.record(compute)

    def _check(self, copies: Sequence[BlockCopy]) -> None:
        num_blocks, num_host_blocks = self._cache.shape[1], len(self._host.tensor)
        for copy in copies:
            if not (0 <= copy.block_id < num_blocks and 0 <= copy.host_block_id < num_host_blocks):
                raise PlanError(
                    f"block {copy.block_id} and host block {copy.host_block_id} are not both within "
                    f"the {num_blocks} and {num_host_blocks} there are"
                )

    def _runs(self, host_block_ids: Sequence[int]) -> Iterator[tuple[slice, Tensor]]:
        """Neighbours among ascending ids: (their places among the ids, their memory)."""
        for _, places in groupby(range(len(host_block_ids)), lambda place: host_block_ids[place] - place):
            first, *others = places
            num_blocks = 1 + len(others)
            start = host_block_ids[first]
            yield slice(first, first + num_blocks), self._host.tensor[start : start + num_blocks]

    def _staged(self, copies: Iterable[BlockCopy]) -> Iterator[tuple[Part, list[int], list[int]]]:
        """The copies in the order of their host blocks, cut to parts: (part, block ids, host block ids)."""
        ordered = sorted(copies, key=lambda copy: copy.host_block_id)
        for first in range(0, len(ordered), PART_BLOCKS):
            these = ordered[first : first + PART_BLOCKS]
            part = self._parts[self._next_part]
            self._next_part = (self._next_part + 1) % NUM_PARTS
            yield part, [copy.block_id for copy in these], [copy.host_block_id for copy in these]


def _pinned(block_ids: Sequence[int]) -> Tensor:
    return torch.tensor(block_ids, dtype=torch.int64, pin_memory=True)
