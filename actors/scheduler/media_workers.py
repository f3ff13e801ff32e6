"""Media workers, and which of them has which clip open."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from vlmrt.runtime.messages import ActorName, Epoch, MmHash

MAX_REMEMBERED_CLIPS = 256


@dataclass(slots=True, eq=False)
class Worker:
    """A media worker that is up."""

    name: ActorName
    epoch: Epoch
    arena_bytes: int
    num_decoding: int = 0
    num_bytes: int = 0  # of pixels there or to come

    def has_room(self, num_bytes: int) -> bool:
        return not self.num_bytes or self.num_bytes + num_bytes <= self.arena_bytes


def least_busy(workers: Sequence[Worker]) -> Worker:
    return min(workers, key=lambda worker: (worker.num_decoding, worker.num_bytes))


class ClipWorkers:
    """Who has which clip open; the clips least recently asked for are forgotten."""

    def __init__(self) -> None:
        self._homes: OrderedDict[MmHash, ActorName] = OrderedDict()

    def choose(self, clip: MmHash, workers: Sequence[Worker]) -> Worker:
        """Of these workers its home or, where that is not among them, the least busy, which becomes a clip's first."""
        name = self._homes.get(clip)
        worker = next((worker for worker in workers if worker.name == name), None) or least_busy(workers)
        self._homes.setdefault(clip, worker.name)
        self._homes.move_to_end(clip)
        if len(self._homes) > MAX_REMEMBERED_CLIPS:
            self._homes.popitem(last=False)
        return worker

    def drop(self, name: ActorName) -> None:
        """That worker is gone, and what it had open."""
        for clip in [clip for clip, home in self._homes.items() if home == name]:
            del self._homes[clip]
