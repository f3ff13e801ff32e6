"""The books of KV blocks in host memory: what lies in which of them, who is about to read it, what goes first.

The ranks own the memory, this file decides about it.  A host block is free, idle (its content can be found, and is
evicted least recently used first) or pinned: somebody has found its content and is going to load it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from vlmrt.actors.scheduler.counters import Counters


class HostBlocks:
    """num_blocks host blocks; with none of them nothing is ever kept or found."""

    def __init__(self, num_blocks: int, counters: Counters) -> None:
        self.num_blocks = num_blocks
        self._counters = counters
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # next to go first
        self._num_pins: dict[int, int] = {}  # of the pinned ones

    def __len__(self) -> int:
        return len(self._block_of)

    def items(self) -> Iterable[tuple[bytes, int]]:
        return self._block_of.items()

    def free(self) -> Sequence[int]:
        return self._free

    def idle_in_eviction_order(self) -> Iterable[int]:
        return iter(self._idle)

    def pins(self) -> Iterable[tuple[int, int]]:
        """The pinned host blocks and how often each is pinned."""
        return self._num_pins.items()

    def match(self, block_hashes: Sequence[bytes], first: int = 0) -> list[int]:
        """As many of block_hashes, from the first on, as are known without a gap; they are not pinned by this."""
        host_block_ids: list[int] = []
        if not self._block_of:
            return host_block_ids
        for index in range(first, len(block_hashes)):
            host_block_id = self._block_of.get(block_hashes[index])
            if host_block_id is None:
                break
            host_block_ids.append(host_block_id)
        return host_block_ids

    def keep(self, block_hash: bytes) -> int | None:
        """A host block to copy this content to, which can be found from now on.

        None if it is there already, or if there is no place: none free, and every other pinned.
        """
        known = self._block_of.get(block_hash)
        if known is not None:
            self.touch((known,))
            return None
        if self._free:
            host_block_id = self._free.pop()
        elif self._idle:
            host_block_id, _ = self._idle.popitem(last=False)
            del self._block_of[self._hash_of[host_block_id]]
            self._counters.host_block_evictions += 1
        else:
            return None
        self._block_of[block_hash] = host_block_id
        self._hash_of[host_block_id] = block_hash
        self._idle[host_block_id] = None
        return host_block_id

    def pin(self, host_block_ids: Iterable[int]) -> None:
        """Keep their content until as many unpins; each may be pinned any number of times."""
        for host_block_id in host_block_ids:
            self._idle.pop(host_block_id, None)
            self._num_pins[host_block_id] = self._num_pins.get(host_block_id, 0) + 1

    def unpin(self, host_block_ids: Sequence[int]) -> None:
        """A sequence's end is evicted before its beginning."""
        for host_block_id in reversed(host_block_ids):
            num_pins = self._num_pins.pop(host_block_id) - 1
            if num_pins:
                self._num_pins[host_block_id] = num_pins
            elif host_block_id in self._hash_of:
                self._idle[host_block_id] = None
            else:
                self._free.append(host_block_id)

    def touch(self, host_block_ids: Sequence[int]) -> None:
        """Evict those of them that are idle after everything else, the last of them first."""
        for host_block_id in reversed(host_block_ids):
            if host_block_id in self._idle:
                self._idle.move_to_end(host_block_id)

    def reset(self) -> None:
        """Forget all content; pinned blocks stay as they are for those that pinned them."""
        self._free += self._idle
        self._idle.clear()
        self._block_of.clear()
        self._hash_of.clear()
