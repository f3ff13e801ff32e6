"""KV blocks: the free list in eviction order, and reference counts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class BlockPool:
    """num_blocks blocks with reference counts; a block without references is free, and may still hold content.

    The free list is in eviction order: allocate takes the block that was released longest ago, those released as
    worthless first.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._num_references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def is_free(self, block_id: int) -> bool:
        return block_id in self._free

    def num_references(self, block_id: int) -> int:
        return self._num_references[block_id]

    def free_in_eviction_order(self) -> Iterable[int]:
        return iter(self._free)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """num_blocks blocks with one reference each, their content up for overwriting; None if fewer are free."""
        if num_blocks > len(self._free):
            return None
        block_ids = [self._free.popitem(last=False)[0] for _ in range(num_blocks)]
        for block_id in block_ids:
            self._num_references[block_id] = 1
        return block_ids

    def acquire(self, block_ids: Iterable[int]) -> None:
        """One more reference to blocks whose content is wanted, whether they are free or in use."""
        for block_id in block_ids:
            if self._num_references[block_id] == 0:
                del self._free[block_id]
            self._num_references[block_id] += 1

    def release(self, block_id: int, *, worthless: bool) -> None:
        """One reference less; a block that becomes free is evicted next if worthless, else last."""
        assert self._num_references[block_id] > 0, f"block {block_id} released once too often"
        self._num_references[block_id] -= 1
        if self._num_references[block_id] == 0:
            self._free[block_id] = None
            if worthless:
                self._free.move_to_end(block_id, last=False)

    def touch(self, block_ids: Iterable[int]) -> None:
        """Evict those of them that are free after everything else."""
        for block_id in block_ids:
            if block_id in self._free:
                self._free.move_to_end(block_id)
