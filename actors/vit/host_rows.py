"""HostRows: pages of rows in the ViT's host memory, the second tier behind its slab.

Which image lies in which page is decided by the scheduler alone.  Rows go there on the stream that computed them; they
come back on a stream of their own, so that a restored image does not wait for the batch that is being encoded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from vlmrt.runtime.host_buffer import HostBuffer
from vlmrt.runtime.messages import Restore
from vlmrt.runtime.slab import EmbeddingSlab


class HostRows:
    """As many rows to a page as in the slab, in its dtype; pinned if the slab lies on a GPU."""

    def __init__(self, slab: EmbeddingSlab, num_pages: int) -> None:
        """Raises: StartupError naming --embedding-host-cache-gib if the host has not so much memory."""
        self.num_pages = num_pages
        self._slab = slab
        self._page_rows = slab.page_rows
        dtype: torch.dtype = getattr(torch, slab.dtype)
        device = slab.tensor().device
        shape = (num_pages * slab.page_rows, slab.width)
        self._buffer = HostBuffer(shape, dtype, device, "--embedding-host-cache-gib")
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda" and num_pages:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def save(self, rows: Tensor, pages: Sequence[int]) -> None:
        """Queue the copy of an image's rows [n, width], on the slab's device, into these pages."""
        for start, count in _stretches(pages):
            part = rows[start * self._page_rows : (start + count) * self._page_rows]
            self._at(pages[start], len(part)).copy_(part, non_blocking=True)

    def restore(self, restores: Sequence[Restore]) -> None:
        """Copy rows back into pages of the slab; returns when they are there."""
        with torch.inference_mode(), self._own_stream():
            for restore in restores:
                self._copy_back(restore)
        if self._stream is not None:
            self._stream.synchronize()

    def _copy_back(self, restore: Restore) -> None:
        target = self._slab.tensor()
        for start, count in _stretches(restore.host_pages, restore.pages):
            num_rows = min((start + count) * self._page_rows, restore.num_rows) - start * self._page_rows
            first = restore.pages[start] * self._page_rows
            part = self._at(restore.host_pages[start], num_rows)
            target[first : first + num_rows].copy_(part, non_blocking=True)

    def _at(self, page: int, num_rows: int) -> Tensor:
        first = page * self._page_rows
        return self._buffer.tensor[first : first + num_rows]

    def _own_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def _stretches(*pages: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first index, length) of each stretch in which the pages of every sequence are neighbours: one copy each."""
    start, num_pages = 0, len(pages[0])
    for index in range(1, num_pages + 1):
        if index == num_pages or any(each[index] != each[index - 1] + 1 for each in pages):
            yield start, index - start
            start = index
