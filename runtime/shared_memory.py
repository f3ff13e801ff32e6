"""Host memory between processes: memfds without names in /dev/shm, and the arena in which a media worker puts pixels.

The supervisor makes and holds the memory of each incarnation (memory_server.py); actors get descriptors of it, so
whoever is killed, the memory goes with the last process that maps it.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from bisect import bisect_left
from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from vlmrt.runtime.messages import ActorName, ArenaRef, Epoch

Pixels = npt.NDArray[np.uint8]

ALIGNMENT = 64


def memory_name(use: Literal["arena", "slab"], actor: ActorName, epoch: Epoch) -> str:
    """The name under which an incarnation's memory is created and opened."""
    return f"{use}/{actor}/{epoch}"


class MemoryAccess(Protocol):
    """The part of ActorContext that reaches host memory."""

    name: ActorName
    epoch: Epoch

    def create_memory(self, name: str, num_bytes: int) -> int: ...

    def open_memory(self, name: str) -> int: ...


class HostMemory:
    """A mapping of a memfd.  Owns the mapping, not the descriptor."""

    def __init__(self, descriptor: int) -> None:
        self.num_bytes = os.fstat(descriptor).st_size
        self._mapping = mmap.mmap(descriptor, self.num_bytes)
        self.buffer = memoryview(self._mapping)

    @classmethod
    def adopt(cls, descriptor: int) -> HostMemory:
        """Map it and close the descriptor."""
        try:
            return cls(descriptor)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Give the mapping up.  Where arrays still look into it, it goes away with the last of them."""
        with contextlib.suppress(BufferError):
            self.buffer.release()
        with contextlib.suppress(BufferError):
            self._mapping.close()


# ---------------------------------------------------------------- the arena


class ArenaAllocator:
    """First fit over [0, num_bytes); freed neighbours are joined; blocks are multiples of ALIGNMENT.  Pure."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes // ALIGNMENT * ALIGNMENT
        self.used_bytes = 0
        self._free = [(0, self.num_bytes)] if self.num_bytes else []  # (offset, length), by offset, never touching
        self._allocated: dict[int, int] = {}

    def allocate(self, num_bytes: int) -> int | None:
        """Offset of a block, or None if no gap is large enough.  Raises ValueError if num_bytes < 1."""
        if num_bytes < 1:
            raise ValueError(f"num_bytes is {num_bytes}, must be at least 1")
        length = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        for index, (offset, gap) in enumerate(self._free):
            if gap >= length:
                self._free[index : index + 1] = [(offset + length, gap - length)] if gap > length else []
                self._allocated[offset] = length
                self.used_bytes += length
                return offset
        return None

    def free(self, offset: int) -> None:
        """Raises ValueError if no block starts there (never allocated, or freed before)."""
        length = self._allocated.pop(offset, None)
        if length is None:
            raise ValueError(f"no block at offset {offset}: freed twice?")
        self.used_bytes -= length
        index = bisect_left(self._free, (offset, 0))
        start, end, first, last = offset, offset + length, index, index
        if index < len(self._free) and self._free[index][0] == end:
            end += self._free[index][1]
            last += 1
        if index > 0 and sum(self._free[index - 1]) == start:
            start = self._free[index - 1][0]
            first -= 1
        self._free[first:last] = [(start, end - start)]

    def check(self) -> None:
        """Raise AssertionError unless blocks and gaps tile the arena exactly and no two gaps touch."""
        spans = sorted([*((o, n, True) for o, n in self._free), *((o, n, False) for o, n in self._allocated.items())])
        position, was_gap = 0, False
        for offset, length, is_gap in spans:
            assert offset == position, f"hole or overlap at {position}: next is {offset}"
            assert length > 0, f"empty span at {offset}"
            assert length % ALIGNMENT == 0, f"span of {length} bytes at {offset}"
            assert not (is_gap and was_gap), f"two gaps touch at {offset}"
            position, was_gap = offset + length, is_gap
        assert position == self.num_bytes
        assert self.used_bytes == sum(self._allocated.values())


class PixelArena:
    """A media worker's side: places for pixels in memory that ViTs read in place."""

    def __init__(self, actor: ActorName, epoch: Epoch, memory: HostMemory) -> None:
        self._actor = actor
        self._epoch = epoch
        self._memory = memory
        self._allocator = ArenaAllocator(memory.num_bytes)

    @classmethod
    def create(cls, context: MemoryAccess, num_bytes: int) -> PixelArena:
        """An arena of this incarnation.  Raises StartupError if the supervisor refuses."""
        name = memory_name("arena", context.name, context.epoch)
        return cls(context.name, context.epoch, HostMemory.adopt(context.create_memory(name, num_bytes)))

    @property
    def num_bytes(self) -> int:
        return self._allocator.num_bytes

    @property
    def used_bytes(self) -> int:
        return self._allocator.used_bytes

    def allocate(self, shape: tuple[int, ...]) -> tuple[ArenaRef, Pixels] | None:
        """A place for uint8 pixels of this shape and the array to fill, or None if there is no room now."""
        num_bytes = math.prod(shape)
        offset = self._allocator.allocate(num_bytes)
        if offset is None:
            return None
        ref = ArenaRef(self._actor, self._epoch, offset, num_bytes)
        return ref, np.frombuffer(self._memory.buffer, np.uint8, num_bytes, offset).reshape(shape)

    def write(self, pixels: Pixels) -> ArenaRef | None:
        """Copy pixels in, or None if there is no room now."""
        place = self.allocate(pixels.shape)
        if place is None:
            return None
        ref, target = place
        target[...] = pixels
        return ref

    def free(self, ref: ArenaRef) -> None:
        """Raises ValueError for a place of another arena or incarnation, or one freed before."""
        if (ref.arena, ref.epoch) != (self._actor, self._epoch):
            raise ValueError(f"{ref} is not of {self._actor} epoch {self._epoch}")
        self._allocator.free(ref.offset)

    def close(self) -> None:
        self._memory.close()


class ArenaReader:
    """The other side: arenas of media workers, opened when first read, closed when their incarnation is gone."""

    def __init__(self, open_memory: Callable[[str], int]) -> None:
        """`open_memory` is the context's."""
        self._open_memory = open_memory
        self._arenas: dict[tuple[ActorName, Epoch], HostMemory] = {}

    def view(self, ref: ArenaRef, shape: tuple[int, ...]) -> Pixels:
        """Read-only uint8 pixels in place, valid until FreePixels.

        Raises KeyError if that incarnation is gone, ValueError if ref and shape disagree or leave the arena.
        """
        key = (ref.arena, ref.epoch)
        memory = self._arenas.get(key)
        if memory is None:
            memory = HostMemory.adopt(self._open_memory(memory_name("arena", *key)))
            self._arenas[key] = memory
        if min(shape, default=0) < 1 or math.prod(shape) != ref.num_bytes:
            raise ValueError(f"shape {shape} does not have {ref.num_bytes} bytes")
        if ref.offset < 0 or ref.offset + ref.num_bytes > memory.num_bytes:
            raise ValueError(f"{ref} leaves its arena of {memory.num_bytes} bytes")
        pixels = np.frombuffer(memory.buffer, np.uint8, ref.num_bytes, ref.offset).reshape(shape)
        pixels.flags.writeable = False
        return pixels

    def drop(self, actor: ActorName, epoch: Epoch) -> None:
        """That incarnation is gone: close its arena and those of its predecessors."""
        for key in [key for key in self._arenas if key[0] == actor and key[1] <= epoch]:
            self._arenas.pop(key).close()

    def close(self) -> None:
        for memory in self._arenas.values():
            memory.close()
        self._arenas.clear()
