"""Small steps run on one thread, large ones on all."""

from __future__ import annotations

import torch
from torch import nn

from vlmrt.actors.llm.cpu_threads import CpuThreads


def test_a_step_gets_threads_by_its_work() -> None:
    model = nn.Linear(1000, 5000, bias=False)  # 10 MFLOP per token
    threads = CpuThreads(model, 4)
    assert [threads.threads_for(count) for count in (0, 1, 20, 39, 40, 60, 80, 1000)] == [1, 1, 1, 1, 2, 3, 4, 4]


def test_the_number_is_set_for_the_thread_that_asks() -> None:
    before = torch.get_num_threads()
    try:
        CpuThreads(nn.Linear(10, 10), 8).set_for(1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
