"""The tensor-parallel group as the scheduler sees it: which ranks are up, and the steps in flight."""

from __future__ import annotations

from collections import deque

from vlmrt.actors.scheduler.policy import Step
from vlmrt.runtime.control_messages import LlmReady
from vlmrt.runtime.messages import ActorName, Epoch

MAX_STEPS_IN_FLIGHT = 2  # the one that runs and the one that the ranks begin without asking


class LlmGroup:
    """Up while all tp ranks of one epoch are; loses everything at once when any of them goes."""

    def __init__(self, tp: int) -> None:
        self.names = tuple(ActorName(f"llm:{rank}") for rank in range(tp))
        self.is_up = False
        self.epoch = Epoch(0)  # of the group that is up, or was last
        self.in_flight: deque[Step] = deque()
        self.next_step = 1  # never begins anew, so that a result names its step for good
        self._ranks: dict[ActorName, tuple[Epoch, LlmReady]] = {}

    @property
    def has_room(self) -> bool:
        return self.is_up and len(self.in_flight) < MAX_STEPS_IN_FLIGHT

    def rank_up(self, name: ActorName, epoch: Epoch, ready: LlmReady) -> bool:
        """Returns whether the group is complete with this rank."""
        self._ranks[name] = (epoch, ready)
        complete = len(self._ranks) == len(self.names) and len({epoch for epoch, _ in self._ranks.values()}) == 1
        self.is_up = complete
        if complete:
            self.epoch = epoch
        return complete

    def rank_down(self, name: ActorName, epoch: Epoch) -> bool:
        """Returns whether the group was up until now."""
        if self.epoch_of(name) != epoch:
            return False
        del self._ranks[name]
        was_up, self.is_up = self.is_up, False
        return was_up

    def epoch_of(self, name: ActorName) -> Epoch | None:
        return self._ranks[name][0] if name in self._ranks else None

    @property
    def num_blocks(self) -> int:
        return min(ready.num_blocks for _, ready in self._ranks.values())

    @property
    def num_host_blocks(self) -> int:
        return min(ready.num_host_blocks for _, ready in self._ranks.values())

    @property
    def block_bytes(self) -> int:
        """Of one block, on all ranks together."""
        return sum(ready.block_bytes for _, ready in self._ranks.values())
