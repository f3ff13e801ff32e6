"""Which queued images go into the next forward (pure)."""

from __future__ import annotations

import math
from collections import OrderedDict

from vlmrt.runtime.messages import Encode


class EncodeQueue:
    """Images in order of arrival, at most max_queued of them, taken in batches within a patch budget.

    A batch never skips the oldest image, so none starves, however large it is.
    """

    def __init__(self, max_patches: int, max_queued: int) -> None:
        self._max_patches = max_patches
        self._max_queued = max_queued
        self._queue: OrderedDict[int, Encode] = OrderedDict()  # by encode_id

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, encode: Encode) -> bool:
        """Queue an image; False if the queue is full."""
        if len(self._queue) >= self._max_queued:
            return False
        self._queue[encode.encode_id] = encode
        return True

    def cancel(self, encode_id: int) -> bool:
        """Take an image out again; False if it is not (or no longer) queued."""
        return self._queue.pop(encode_id, None) is not None

    def take(self) -> list[Encode]:
        """The oldest images whose patches fit the budget together; one at least, if any is queued."""
        batch: list[Encode] = []
        num_patches = 0
        while self._queue:
            oldest = next(iter(self._queue.values()))
            num_patches += math.prod(oldest.grid_thw)
            if batch and num_patches > self._max_patches:
                break
            del self._queue[oldest.encode_id]
            batch.append(oldest)
        return batch

    def clear(self) -> None:
        self._queue.clear()
