"""Full-size vision towers with random weights on the GPU: milliseconds per batch beside the floor of their products.

    python -m benchmarks.vit [--towers qwen2-vl-2b qwen2.5-vl-7b] [--profile "8 x 1024"]

layers: the device's time from embedded patches to rows, launched one by one; graphs: the same through recorded layers,
"-" where a batch is too large for them. engine: the wall clock from pixels in host memory to rows, with quanta of 8 ms,
as the ViT actor runs it, without graphs and with them. Medians; then the kernels that took most of one batch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.vision_shapes import BATCHES, FLOPS_PER_S, PROCESSING, TOWERS, num_patches, random_tower, tower_flops
from vlmrt.actors.models.vision_grid import GridThw
from vlmrt.actors.models.vision_tower import VisionTower
from vlmrt.actors.vit.engines.engine import Pixels
from vlmrt.actors.vit.engines.torch import TorchEngine
from vlmrt.actors.vit.engines.tower_graphs import MAX_PATCHES, TowerGraphs, patch_counts

QUANTUM_S = 0.008
HEAD_START_CYCLES = 8_000_000  # about 5 ms: the host lays a batch out meanwhile, as it does behind the batch before
REPEATS = 7
TOP_KERNELS = 12


def device_ms(run: Callable[[], object]) -> float:
    """Median time between two events around one call, whose launches have a head start."""
    times: list[float] = []
    for repeat in range(REPEATS + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(HEAD_START_CYCLES)  # type: ignore[no-untyped-call]
        begin.record()
        run()
        end.record()
        end.synchronize()
        if repeat >= 2:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def wall_ms(run: Callable[[], object]) -> float:
    times = []
    for repeat in range(REPEATS + 2):
        started_s = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if repeat >= 2:
            times.append((time.perf_counter() - started_s) * 1e3)
    return statistics.median(times)


def layers_of(tower: VisionTower, grids: list[GridThw]) -> Callable[[], object]:
    embedded = torch.randn(num_patches(grids), tower.config.embed_dim, device="cuda", dtype=torch.bfloat16)

    def run() -> object:
        state = tower.lay_out(embedded.clone(), grids)  # the layers write to what they are given
        return tower.finish(tower.run_layers(state, 0, tower.num_layers))

    return run


def recorded_layers_of(tower: VisionTower, graphs: TowerGraphs, grids: list[GridThw]) -> Callable[[], object] | None:
    embedded = torch.randn(num_patches(grids), tower.config.embed_dim, device="cuda", dtype=torch.bfloat16)
    recorded = graphs.find(tower.lay_out(embedded, grids))
    if recorded is None:
        return None

    def run() -> object:
        state = tower.lay_out(embedded, grids)
        recorded.run(state, tower.num_layers, tower.num_layers)
        return tower.finish(state)

    return run


def record(tower: VisionTower) -> TowerGraphs:
    """Graphs of all counts, with a line of what they cost."""
    counts = patch_counts(MAX_PATCHES)
    layers_of(tower, [(1, 64, 128)])()  # compiles what is not there yet, and leaves the memory that one batch needs
    torch.cuda.synchronize()
    started_s, reserved = time.perf_counter(), torch.cuda.memory_reserved()
    free, _ = torch.cuda.mem_get_info()
    graphs = TowerGraphs(tower, counts)
    torch.cuda.synchronize()
    seconds, kept_gib = time.perf_counter() - started_s, (torch.cuda.memory_reserved() - reserved) / 2**30
    taken_gib = (free - torch.cuda.mem_get_info()[0]) / 2**30
    print(
        f"    {len(counts)} counts recorded in {seconds:.2f} s: {kept_gib:.2f} GiB of tensors, {taken_gib:.2f} in all"
    )
    return graphs


def encoding_of(engine: TorchEngine, grids: list[GridThw]) -> Callable[[], object]:
    draw = np.random.default_rng(0)
    images: list[Pixels] = [draw.integers(0, 256, (1, 14 * h, 14 * w, 3), dtype=np.uint8) for _, h, w in grids]

    def encode() -> object:
        run = engine.prepare(images, grids)
        while not engine.run_quantum(run):
            pass
        return engine.rows(run)

    return encode


def print_kernels(run: Callable[[], object]) -> None:
    run()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    kernels = sorted(trace.key_averages(), key=lambda event: -event.self_device_time_total)
    total_us = sum(kernel.self_device_time_total for kernel in kernels)
    print(f"    {'ms':>8} {'share':>6} {'calls':>6}  kernel ({total_us / 1e3:.2f} ms in kernels)")
    for kernel in kernels[:TOP_KERNELS]:
        time_us = kernel.self_device_time_total
        print(f"    {time_us / 1e3:8.3f} {time_us / total_us:6.1%} {kernel.count:6}  {kernel.key[:90]}")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--towers", nargs="+", choices=sorted(TOWERS), default=sorted(TOWERS))
    parser.add_argument("--profile", choices=sorted(BATCHES), default="8 x 1024", help="batch whose kernels are listed")
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16")
    for preset in options.towers:
        tower = random_tower(preset, torch.device("cuda"))
        print(preset)
        graphs = record(tower)
        launching, recorded = (
            TorchEngine(tower, PROCESSING, torch.device("cuda"), QUANTUM_S, each) for each in (None, graphs)
        )
        print(
            f"    {'batch':14} {'patches':>8} {'floor':>8} {'layers':>8} {'/floor':>7} {'graphs':>8} {'/floor':>7} "
            f"{'engine':>8} {'+graphs':>8}  ms"
        )
        for name, grids in BATCHES.items():
            floor_ms = tower_flops(tower.config, grids) / FLOPS_PER_S * 1e3
            layers_ms = device_ms(layers_of(tower, grids))
            run_recorded = recorded_layers_of(tower, graphs, grids)
            columns = f"{'-':>8} {'-':>7}"
            if run_recorded is not None:
                graphs_ms = device_ms(run_recorded)
                columns = f"{graphs_ms:8.2f} {graphs_ms / floor_ms:7.2f}"
            launching_ms, recorded_ms = (wall_ms(encoding_of(engine, grids)) for engine in (launching, recorded))
            print(
                f"    {name:14} {num_patches(grids):8} {floor_ms:8.2f} {layers_ms:8.2f} {layers_ms / floor_ms:7.2f} "
                f"{columns} {launching_ms:8.2f} {recorded_ms:8.2f}"
            )
        peak_gib = torch.cuda.max_memory_allocated() / 2**30
        print(f"    peak {peak_gib:.2f} GiB; kernels of {options.profile}:")
        print_kernels(layers_of(tower, BATCHES[options.profile]))
        del tower, graphs, launching, recorded, run_recorded
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
