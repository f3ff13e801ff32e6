"""The books of one ViT's host memory: which images' rows are kept there, and which copy goes first.

A copy is made as its rows are encoded and is only read afterwards; so it is dropped without a message to anybody.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from vlmrt.runtime.messages import MmHash
from vlmrt.runtime.slab import SlabBooks


class HostCopies:
    """Copies by mm_hash, the one used longest ago first.  Pages of a copy being made are allocated, and in no copy."""

    def __init__(self, num_pages: int) -> None:
        self.books = SlabBooks(num_pages)
        self.pages: OrderedDict[MmHash, tuple[int, ...]] = OrderedDict()
        self.num_copy_pages = 0

    def victims(self, num_pages: int, is_pinned: Callable[[MmHash], bool]) -> list[MmHash] | None:
        """What to drop so that num_pages are free; None if that is too little."""
        victims: list[MmHash] = []
        num_missing = num_pages - self.books.num_free
        for mm_hash, pages in self.pages.items():
            if num_missing <= 0:
                break
            if not is_pinned(mm_hash):
                victims.append(mm_hash)
                num_missing -= len(pages)
        return victims if num_missing <= 0 else None

    def add(self, mm_hash: MmHash, pages: tuple[int, ...]) -> None:
        """The copy in these pages, which were allocated for it, is complete."""
        self.pages[mm_hash] = pages
        self.num_copy_pages += len(pages)

    def touch(self, mm_hash: MmHash) -> None:
        """These rows are used, in whatever tier."""
        if mm_hash in self.pages:
            self.pages.move_to_end(mm_hash)

    def drop(self, mm_hash: MmHash) -> None:
        """Forget a copy, if there is one."""
        pages = self.pages.pop(mm_hash, None)
        if pages is not None:
            self.num_copy_pages -= len(pages)
            self.books.free(pages)
