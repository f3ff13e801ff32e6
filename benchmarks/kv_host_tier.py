"""Copies of KV blocks to host memory and back on one GPU, beside one large copy over the same link.

python -m benchmarks.kv_host_tier

Checked first: what comes back is what went.  GB/s are from the call to the end of all copies on an idle GPU.  Held is
how long the step behind the copies waits for them: where the GPU was idle, and where it ran a step of 20 ms before.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from vlmrt.actors.llm.kv_host_tier import KvHostTier
from vlmrt.runtime.host_buffer import HostBuffer
from vlmrt.runtime.messages import BlockCopy

DEVICE = torch.device("cuda", 0)
SHAPES = {"2B": (56, 16, 2, 128), "7B": (56, 16, 4, 128)}  # of a block: keys and values of 28 layers
NUM_COPIES = (1, 16, 64, 256)
NUM_BLOCKS = 512
NUM_RUNS = 7
STEP_MS = 20
CYCLES_PER_MS = 1_700_000
LINK_BYTES = 1 << 30

Copy = Callable[[Sequence[BlockCopy]], None]


class Times(NamedTuple):
    """Of one call, in ms."""

    host: float  # until it returns
    whole: float  # until everything is copied
    held: float  # the compute stream, on an idle GPU
    held_behind_step: float


def main() -> int:
    if not torch.cuda.is_available():
        print("needs a CUDA device", file=sys.stderr)
        return 1
    torch.cuda.set_device(DEVICE)
    torch.cuda.set_stream(torch.cuda.Stream(DEVICE, priority=-1))  # type: ignore[no-untyped-call]
    to_host, to_device = link_gb_s()
    print(f"{torch.cuda.get_device_name(DEVICE)}; the link: {to_host:.1f} GB/s to the host, {to_device:.1f} back")
    for name, shape in SHAPES.items():
        layers, *rest = shape
        cache = torch.randn(layers, NUM_BLOCKS, *rest, dtype=torch.bfloat16, device=DEVICE)
        host = HostBuffer((NUM_BLOCKS, *shape), torch.bfloat16, DEVICE, "--kv-host-cache-gib")
        tier = KvHostTier(cache, host)
        if not comes_back(cache, tier):
            print(f"{name}: what came back is not what went", file=sys.stderr)
            return 1
        block_bytes = cache[:, 0].nbytes
        print(f"\n{name}: {block_bytes / 1024:.0f} KiB a block")
        print(
            f"{'':22} {'blocks':>6} {'GB/s':>6} {'of link':>7} {'ms':>7} {'host ms':>7} {'held':>6} {'behind step':>11}"
        )
        for direction, copy, floor in (("save", tier.save, to_host), ("load", tier.load, to_device)):
            for layout, places in layouts():
                for num_blocks in NUM_COPIES:
                    copies = [BlockCopy(block, places[block]) for block in range(num_blocks)]
                    times = measured(copy, copies)
                    gb_s = num_blocks * block_bytes / times.whole / 1e6
                    print(
                        f"{direction + ', ' + layout:22} {num_blocks:6} {gb_s:6.1f} {gb_s / floor:7.0%} "
                        f"{times.whole:7.3f} {times.host:7.3f} {times.held:6.3f} {times.held_behind_step:11.3f}"
                    )
    return 0


def layouts() -> list[tuple[str, list[int]]]:
    """Host blocks side by side, and all over the place."""
    return [
        ("neighbours", list(range(NUM_BLOCKS))),
        ("scattered", random.Random(0).sample(range(0, NUM_BLOCKS, 2), NUM_BLOCKS // 2)),
    ]


def link_gb_s() -> tuple[float, float]:
    """(to the host, back) of one large copy of pinned memory."""
    host = torch.empty(LINK_BYTES, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(LINK_BYTES, dtype=torch.uint8, device=DEVICE)
    found = []
    for target, source in ((host, device), (device, host)):
        times = []
        for _ in range(4):
            torch.cuda.synchronize()
            began_s = time.perf_counter()
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began_s)
        found.append(LINK_BYTES / min(times) / 1e9)
    return found[0], found[1]


def comes_back(cache: torch.Tensor, tier: KvHostTier) -> bool:
    """Every block through the host to another place."""
    before = cache.clone()
    places = random.SystemRandom().sample(range(NUM_BLOCKS), NUM_BLOCKS)
    tier.save([BlockCopy(block, place) for block, place in enumerate(places)])
    cache.zero_()
    tier.load([BlockCopy((block + 1) % NUM_BLOCKS, place) for block, place in enumerate(places)])
    return torch.equal(cache.roll(-1, 1), before)


def measured(copy: Copy, copies: Sequence[BlockCopy]) -> Times:
    """Medians; the first run is not counted."""
    runs = []
    for _ in range(1 + NUM_RUNS):
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        held = stream_time(copy, copies)
        returned_s = time.perf_counter()
        torch.cuda.synchronize()
        ended_s = time.perf_counter()
        torch.cuda._sleep(STEP_MS * CYCLES_PER_MS)  # type: ignore[no-untyped-call]
        held_behind_step = stream_time(copy, copies)
        torch.cuda.synchronize()
        runs.append(
            Times(
                1e3 * (returned_s - began_s),
                1e3 * (ended_s - began_s),
                held[0].elapsed_time(held[1]),
                held_behind_step[0].elapsed_time(held_behind_step[1]),
            )
        )
    return Times(*(statistics.median(values) for values in zip(*runs[1:], strict=True)))


def stream_time(copy: Copy, copies: Sequence[BlockCopy]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Events on the compute stream before and after."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    before.record()
    copy(copies)
    after.record()
    return before, after


if __name__ == "__main__":
    sys.exit(main())
