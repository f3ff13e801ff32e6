"""Hash chain of full KV blocks -> block id, so that a prompt's known beginning is not computed again.

The hash of a block covers its parent's hash, its token ids and, for every image row inside it, whose row it is; the
root is the cache_salt.  Equal hashes (256 bits) mean equal keys and values: positions follow from the tokens and grids
before.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from vlmrt.actors.scheduler.block_pool import BlockPool
from vlmrt.runtime.messages import MediaItem

_DIGEST_BYTES = 32
_IMAGE_ROWS = struct.Struct("<6IH")  # place in the block, number, first row, grid_thw, length of the mm_hash behind it


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
    """What identifies the rows of an image within the tokens [begin, end)."""
    first, last = max(item.start, begin), min(item.start + item.num_tokens, end)
    name = item.mm_hash.encode()
    return _IMAGE_ROWS.pack(first - begin, last - first, first - item.start, *item.grid_thw, len(name)) + name


class PrefixCache:
    """The KV blocks' owner: references, and which content of full, confirmed blocks can be found again.

    With enabled=False nothing is ever found.
    """

    def __init__(self, pool: BlockPool, *, enabled: bool) -> None:
        self.pool = pool
        self.enabled = enabled
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self.num_evictions = 0

    def __len__(self) -> int:
        return len(self._block_of)

    def items(self) -> Iterable[tuple[bytes, int]]:
        return self._block_of.items()

    def match(self, block_hashes: Sequence[bytes], num_tokens: int, block_size: int) -> list[int]:
        """The longest known beginning, as block ids without a reference yet.

        At least the last of the num_tokens tokens stays uncovered: its logits choose the next token.
        """
        block_ids: list[int] = []
        if not self.enabled:
            return block_ids
        for block_hash in block_hashes[: (num_tokens - 1) // block_size]:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Blocks to write; what they held is forgotten.  None if fewer are free."""
        block_ids = self.pool.allocate(num_blocks)
        if block_ids and self._hash_of:
            for block_id in block_ids:
                block_hash = self._hash_of.pop(block_id, None)
                if block_hash is not None:
                    del self._block_of[block_hash]
                    self.num_evictions += 1
        return block_ids

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
