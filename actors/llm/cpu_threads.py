"""How many CPU threads a step is worth."""

from __future__ import annotations

import torch
from torch import nn

# A thread does about 25 GFLOP/s on narrow float32 products. Each product of a step, some hundred, ends at a barrier,
# which costs microseconds on idle cores and, measured, 100 ms and more where other processes want the cores.
FLOPS_PER_THREAD = 200_000_000


class CpuThreads:
    """Sets torch's threads by a step's size: one for a few tokens of a small model, all for the rest."""

    def __init__(self, model: nn.Module, max_threads: int) -> None:
        self._flops_per_token = 2 * sum(parameter.numel() for parameter in model.parameters())
        self._max_threads = max_threads
        self._current = 0

    def set_for(self, num_tokens: int) -> None:
        """Call it in the thread that runs the step."""
        num_threads = self.threads_for(num_tokens)
        if num_threads != self._current:
            torch.set_num_threads(num_threads)
            self._current = num_threads

    def threads_for(self, num_tokens: int) -> int:
        return max(1, min(self._max_threads, self._flops_per_token * num_tokens // FLOPS_PER_THREAD))
