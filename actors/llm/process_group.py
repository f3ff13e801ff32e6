"""The tensor-parallel group of ranks: how they meet, and how they agree on the step that runs next."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from vlmrt.actors.models.layers import TensorParallel
from vlmrt.runtime.config import Device
from vlmrt.runtime.messages import Epoch

STEP_BITS = 40
LAST_STEP = (1 << STEP_BITS) - 1


def step_key(epoch: Epoch, step: int) -> int:
    """Orders what ranks do: by the scheduler's epoch, then by step; LAST_STEP stands for the end of that epoch."""
    return epoch << STEP_BITS | step


@dataclass(frozen=True, slots=True)
class RankGroup:
    """This rank's group; size 1 communicates nothing."""

    tp: TensorParallel
    host_group: dist.ProcessGroup | None = None  # gloo, for numbers that the host reads
    store: FileStore | None = None

    def smallest(self, value: int) -> int:
        """The smallest of the ranks' values."""
        if self.host_group is None:
            return value
        number = torch.tensor([value])
        dist.all_reduce(number, dist.ReduceOp.MIN, group=self.host_group)
        return int(number)

    def agrees(self, key: int) -> bool:
        """Whether this rank does what its key says now, or drops it because another rank is further on.

        When a scheduler dies, some ranks may have got its last plans and others not: a rank whose key is below the
        group's largest drops what it has and comes back with its next; when all keys are equal, all go on.
        Raises: RuntimeError if the ranks hold different steps of one living scheduler, which no order can mend.
        """
        if self.host_group is None:
            return True
        while True:
            bounds = torch.tensor([key, -key])
            dist.all_reduce(bounds, dist.ReduceOp.MAX, group=self.host_group)
            largest, smallest = int(bounds[0]), -int(bounds[1])
            if smallest == largest:
                return True
            if smallest >> STEP_BITS == largest >> STEP_BITS and largest & LAST_STEP != LAST_STEP:
                raise RuntimeError(f"ranks disagree on the step: {smallest & LAST_STEP} and {largest & LAST_STEP}")
            if key < largest:
                return False

    def wait_for_all(self, stage: str, timeout_s: float) -> None:
        """Meet the other ranks, however long each takes within timeout_s; collectives have a shorter limit."""
        if self.store is None:
            return
        self.store.set(f"{stage}/{self.tp.rank}", "1")
        self.store.wait([f"{stage}/{rank}" for rank in range(self.tp.size)], timedelta(seconds=timeout_s))


def join_group(
    rank: int, size: int, device: Device, rendezvous: Path, start_timeout_s: float, step_timeout_s: float
) -> RankGroup:
    """Meet the other ranks through a file and make the groups: gloo on a CPU, NCCL beside gloo on GPUs.

    A collective fails at once when a peer's connection closes, and after step_timeout_s when a peer says nothing.
    """
    if size == 1:
        return RankGroup(TensorParallel())
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast memory needs rights that containers lack
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    store = FileStore(str(rendezvous), size)
    store.set_timeout(timedelta(seconds=start_timeout_s))
    group = RankGroup(TensorParallel(rank, size), store=store)
    group.wait_for_all("started", start_timeout_s)
    timeout = timedelta(seconds=step_timeout_s)
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=None if device == "cpu" else torch.device("cuda", torch.cuda.current_device()),
    )
    world = dist.group.WORLD
    host_group = world if device == "cpu" else dist.new_group(backend="gloo", timeout=timeout)
    return RankGroup(TensorParallel(rank, size, world), host_group, store)
