"""A rank's host memory for KV blocks, and the copies between it and the KV cache.

What lies where is the scheduler's business: a plan names both ends of every copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from vlmrt.actors.llm.kv_cache import GIB, block_bytes, zeros
from vlmrt.actors.llm.slots import PlanError
from vlmrt.actors.models.config import TextConfig
from vlmrt.kernels.block_copies import gather_blocks, scatter_blocks
from vlmrt.runtime.config import Config
from vlmrt.runtime.errors import StartupError
from vlmrt.runtime.messages import BlockCopy

MAX_PIECE_BYTES = GIB
# Staging on the device.  While one part's blocks cross the link, steps and the next part's blocks need not wait.
PART_BLOCKS = 32
NUM_PARTS = 4

Progress = Callable[[int, int], None]


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


class HostBlocks:
    """Host memory for blocks, pinned where the device is a GPU.

    It lies in pieces, since torch rounds pinned memory up to a power of two: 20 GiB in one would take 32.
    """

    def __init__(
        self,
        num_blocks: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None = None,
    ) -> None:
        """shape: of one block.  progress gets (bytes pinned, bytes to pin).

        Raises: StartupError if there is not so much memory.
        """
        self._num_blocks = num_blocks
        size = math.prod(shape) * dtype.itemsize
        self._piece_blocks = max(1, MAX_PIECE_BYTES // size)
        self._pieces: list[Tensor] = []
        if device.type != "cpu":
            torch.cuda.set_device(device)  # the thread's; pinning would make a context on the first GPU otherwise
        try:
            for first in range(0, num_blocks, self._piece_blocks):
                if progress is not None:
                    progress(first * size, num_blocks * size)
                piece_shape = (min(self._piece_blocks, num_blocks - first), *shape)
                if device.type == "cpu":
                    self._pieces.append(zeros(piece_shape, dtype, device))
                else:
                    self._pieces.append(torch.empty(piece_shape, dtype=dtype, pin_memory=True))
        except (OSError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise StartupError(
                f"--kv-host-cache-gib: {num_blocks * size / GIB:.2f} GiB of host memory cannot be had: {reason}"
            ) from None
        if progress is not None and num_blocks:
            progress(num_blocks * size, num_blocks * size)

    def __len__(self) -> int:
        return self._num_blocks

    def runs(self, host_block_ids: Sequence[int]) -> Iterator[tuple[slice, Tensor]]:
        """Neighbours among ascending ids that lie side by side: (their places among the ids, their memory)."""

        def run_of(place: int) -> tuple[int, int]:
            host_block_id = host_block_ids[place]
            return host_block_id // self._piece_blocks, host_block_id - place

        for (piece, _), places in groupby(range(len(host_block_ids)), run_of):
            first, *others = places
            num_blocks = 1 + len(others)
            start = host_block_ids[first] % self._piece_blocks
            yield slice(first, first + num_blocks), self._pieces[piece][start : start + num_blocks]


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

    def __init__(self, cache: Tensor, host: HostBlocks) -> None:
        """cache: [2 * layers, num_blocks, ...] of kv_cache.allocate; host: blocks of its shape and dtype."""
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
            for block_id, block in self._on_cpu(last):
                block.copy_(self._cache[:, block_id])
            return
        compute = torch.cuda.current_stream(self._cache.device)
        for part, block_ids, host_block_ids in self._staged(last):
            compute.wait_event(part.emptied)
            part.block_ids[: len(block_ids)].copy_(_pinned(block_ids), non_blocking=True)
            gather_blocks(self._cache, part.block_ids[: len(block_ids)], part.blocks[: len(block_ids)])
            part.filled.record(compute)
            self._copy_stream.wait_event(part.filled)
            with torch.cuda.stream(self._copy_stream):
                for places, memory in self._host.runs(host_block_ids):
                    memory.copy_(part.blocks[places], non_blocking=True)
                part.emptied.record(self._copy_stream)

    def load(self, copies: Sequence[BlockCopy]) -> None:
        """Copy blocks from host memory into the cache before whatever the caller's stream is given next.

        Where two copies go to one block, the later counts.  Raises: PlanError if there is no such block.
        """
        self._check(copies)
        last = {copy.block_id: copy for copy in copies}.values()
        if self._copy_stream is None:
            for block_id, block in self._on_cpu(last):
                self._cache[:, block_id].copy_(block)
            return
        compute = torch.cuda.current_stream(self._cache.device)
        for part, block_ids, host_block_ids in self._staged(last):
            self._copy_stream.wait_event(part.emptied)
            with torch.cuda.stream(self._copy_stream):
                for places, memory in self._host.runs(host_block_ids):
                    part.blocks[places].copy_(memory, non_blocking=True)
                part.filled.record(self._copy_stream)
            part.block_ids[: len(block_ids)].copy_(_pinned(block_ids), non_blocking=True)
            compute.wait_event(part.filled)
            scatter_blocks(part.blocks[: len(block_ids)], part.block_ids[: len(block_ids)], self._cache)
            part.emptied.record(compute)

    def _check(self, copies: Sequence[BlockCopy]) -> None:
        num_blocks, num_host_blocks = self._cache.shape[1], len(self._host)
        for copy in copies:
            if not (0 <= copy.block_id < num_blocks and 0 <= copy.host_block_id < num_host_blocks):
                raise PlanError(
                    f"block {copy.block_id} and host block {copy.host_block_id} are not both within "
                    f"the {num_blocks} and {num_host_blocks} there are"
                )

    def _on_cpu(self, copies: Iterable[BlockCopy]) -> Iterator[tuple[int, Tensor]]:
        """(block id, memory of its host block)"""
        for copy in copies:
            for _, memory in self._host.runs([copy.host_block_id]):
                yield copy.block_id, memory[0]

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
