"""Hash chain of full KV blocks -> block id, so that a prompt's known beginning is not computed again.

The hash of a block covers its parent's hash, its token ids and, for every image row inside it, whose row it is; the
root is the cache_salt.  Equal hashes (256 bits) mean equal keys and values: positions follow from the tokens and grids
before.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from vlmrt.actors.scheduler.block_pool import BlockPool
from vlmrt.actors.scheduler.counters import Counters
from vlmrt.actors.scheduler.host_blocks import HostBlocks
from vlmrt.runtime.messages import BlockCopy, MediaItem

_DIGEST_BYTES = 32
# place in the block, number, first row, grid_thw, time_offset, continues, length of the mm_hash behind it
_IMAGE_ROWS = struct.Struct("<7I?H")


def extend_block_hashes(
    block_hashes: list[bytes],
    token_ids: Sequence[int],
    media: Sequence[MediaItem],
    cache_salt: str,
    block_size: int,
) -> None:
    """Append the hashes of the full blocks of token_ids that block_hashes does not cover yet.

    Raises: OverflowError if a token id is negative or does not fit 32 bits.  Cost: one hash per block.
    """
    first, last = len(block_hashes), len(token_ids) // block_size
    if first >= last:
        return
    packed = array("I", token_ids[first * block_size : last * block_size]).tobytes()
    block_bytes = len(packed) // (last - first)
    parent = block_hashes[-1] if block_hashes else blake2b(cache_salt.encode(), digest_size=_DIGEST_BYTES).digest()
    item = 0
    for block in range(first, last):
        begin, end = block * block_size, (block + 1) * block_size
        offset = (block - first) * block_bytes
        digest = blake2b(parent, digest_size=_DIGEST_BYTES)
        digest.update(packed[offset : offset + block_bytes])
        while item < len(media) and media[item].start + media[item].num_tokens <= begin:
            item += 1
        inside = item
        while inside < len(media) and media[inside].start < end:
            digest.update(_image_rows(media[inside], begin, end))
            inside += 1
        parent = digest.digest()
        block_hashes.append(parent)


def _image_rows(item: MediaItem, begin: int, end: int) -> bytes:
    """What identifies the rows of an image within the tokens [begin, end) and their positions."""
    first, last = max(item.start, begin), min(item.start + item.num_tokens, end)
    name = item.mm_hash.encode()
    place = first - begin, last - first, first - item.start
    return _IMAGE_ROWS.pack(*place, *item.grid_thw, item.time_offset, item.continues, len(name)) + name


@dataclass(frozen=True, slots=True)
class Match:
    """The known beginning of a sequence: blocks, then host blocks.  No reference and no pin comes with it."""

    block_ids: list[int]
    host_block_ids: list[int]

    @property
    def num_blocks(self) -> int:
        return len(self.block_ids) + len(self.host_block_ids)


class PrefixCache:
    """The KV blocks' owner: references, and which content of full, confirmed blocks can be found again.

    What is evicted is kept in host memory as far as there is any.  With enabled=False nothing is ever found.
    """

    def __init__(self, pool: BlockPool, host: HostBlocks, counters: Counters, *, enabled: bool) -> None:
        self.pool = pool
        self.host = host
        self.enabled = enabled
        self._counters = counters
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._saves: dict[int, int] = {}  # host block -> block, not in a plan yet

    def __len__(self) -> int:
        return len(self._block_of)

    def items(self) -> Iterable[tuple[bytes, int]]:
        return self._block_of.items()

    def match(self, block_hashes: Sequence[bytes], num_tokens: int, block_size: int) -> Match:
        """The longest beginning that the KV cache knows, continued as far as host memory does.

        At least the last of the num_tokens tokens stays uncovered: its logits choose the next token.
        """
        block_ids: list[int] = []
        if not self.enabled:
            return Match([], [])
        block_hashes = block_hashes[: (num_tokens - 1) // block_size]
        for block_hash in block_hashes:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            block_ids.append(block_id)
        return Match(block_ids, self.host.match(block_hashes, first=len(block_ids)))

    def touch(self, match: Match) -> None:
        """Evict it after everything else, its end before its beginning."""
        self.pool.touch(reversed(match.block_ids))
        self.host.touch(match.host_block_ids)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Blocks to write, in a plan that has the saves.  None if fewer are free."""
        block_ids = self.pool.allocate(num_blocks)
        if block_ids and self._hash_of:
            for block_id in block_ids:
                block_hash = self._hash_of.pop(block_id, None)
                if block_hash is not None:
                    del self._block_of[block_hash]
                    self._counters.block_evictions += 1
                    host_block_id = self.host.keep(block_hash)
                    if host_block_id is not None:
                        self._saves[host_block_id] = block_id  # a save that was to go there is not worth it any more
        return block_ids

    def take_saves(self) -> tuple[BlockCopy, ...]:
        """What the next plan has to copy to host memory before it writes anything."""
        if not self._saves:
            return ()
        saves, self._saves = self._saves, {}
        return tuple([BlockCopy(block_id, host_block_id) for host_block_id, block_id in saves.items()])

    def release(self, block_ids: Sequence[int]) -> None:
        """Drop one reference each: a sequence's end is evicted before its beginning, unknown content before known."""
        for block_id in reversed(block_ids):
            self.pool.release(block_id, worthless=block_id not in self._hash_of)

    def insert(self, block_hash: bytes, block_id: int) -> None:
        """A full block whose tokens are confirmed and computed.  Content known already keeps its first block."""
        if self.enabled and block_hash not in self._block_of:
            self._block_of[block_hash] = block_id
            self._hash_of[block_id] = block_hash

    def reset(self) -> None:
        """Forget all content; blocks in use stay in use."""
        self._block_of.clear()
        self._hash_of.clear()
        self.host.reset()
