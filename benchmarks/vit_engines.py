"""A vision tower with random weights on another engine beside torch: how far apart the rows are, milliseconds of each.

    python -m benchmarks.vit_engines [--tower qwen2.5-vl-7b] [--depth N] [--engine onnxruntime] [--device cuda]

The tower is exported to --files first, if nothing is there. From pixels in host memory to rows, as the ViT actor runs
it, medians; on a GPU torch goes through its recorded graphs. Exit status 1 if a cosine of two rows is below the bound.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.vision_shapes import BATCHES, PROCESSING, TOWERS, num_patches, random_tower
from vlmrt.actors.models.vision_grid import GridThw
from vlmrt.actors.models.vision_tower import VisionTower
from vlmrt.actors.vit.engines.engine import Pixels, VisionEngine
from vlmrt.actors.vit.engines.engine_files import NATIVE_OPSET, ONNX_FILE, PLAIN_OPSET, TENSORRT_FILE
from vlmrt.actors.vit.engines.onnxruntime import OnnxRuntimeSession
from vlmrt.actors.vit.engines.tensorrt import TensorRtSession
from vlmrt.actors.vit.engines.tensorrt_build import build_engine
from vlmrt.actors.vit.engines.tensorrt_flavour import load_flavour
from vlmrt.actors.vit.engines.torch import TorchEngine
from vlmrt.actors.vit.engines.tower_graphs import MAX_PATCHES, TowerGraphs, patch_counts
from vlmrt.actors.vit.engines.traced_tower import export_tower
from vlmrt.actors.vit.engines.whole_batch import TowerSession, WholeBatchEngine

QUANTUM_S = 0.008
REPEATS = 5
LARGEST_PATCHES = 16384  # of BATCHES
LEAST_COSINE = {torch.float32: 0.9999, torch.bfloat16: 0.999}


def open_session(engine: str, tower: VisionTower, files: Path, device: torch.device, gib: float) -> TowerSession:
    """Of files that are made if they are not there."""
    is_plain = engine == "tensorrt" and tower.patch_embed.dtype == torch.float32
    if not (files / ONNX_FILE).exists():
        began_s = time.perf_counter()
        export_tower(tower, files, PLAIN_OPSET if is_plain else NATIVE_OPSET)
        print(f"    exported in {time.perf_counter() - began_s:.1f} s")
    if engine == "onnxruntime":
        return OnnxRuntimeSession(files, device, torch.get_num_threads(), gib)
    flavour = load_flavour()
    if not (files / TENSORRT_FILE).exists():
        began_s = time.perf_counter()
        build_engine(flavour, files, files, tower.config, MAX_PATCHES, LARGEST_PATCHES, gib)
        print(f"    built in {time.perf_counter() - began_s:.1f} s")
    return TensorRtSession(flavour, files, device, LARGEST_PATCHES)


def encode(engine: VisionEngine[Any], images: list[Pixels], grids: list[GridThw]) -> Tensor:
    run = engine.prepare(images, grids)
    while not engine.run_quantum(run):
        pass
    rows = engine.rows(run)
    if rows.is_cuda:
        torch.cuda.synchronize()
    return rows


def timed(engine: VisionEngine[Any], images: list[Pixels], grids: list[GridThw]) -> tuple[Tensor, float]:
    """(rows, median milliseconds)."""
    rows, times = encode(engine, images, grids), []
    for _ in range(REPEATS):
        began_s = time.perf_counter()
        encode(engine, images, grids)
        times.append((time.perf_counter() - began_s) * 1e3)
    return rows, statistics.median(times)


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", choices=sorted(TOWERS), default="qwen2-vl-2b")
    parser.add_argument("--depth", type=int, help="fewer layers than the tower's own")
    parser.add_argument("--engine", choices=("onnxruntime", "tensorrt"), default="onnxruntime")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--files", type=Path, help="directory of the exported tower; default: a temporary one")
    parser.add_argument("--batches", nargs="+", choices=sorted(BATCHES), default=list(BATCHES))
    parser.add_argument("--gib", type=float, default=16.0, help="of a GPU, for the other engine")
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    on_host = random_tower(options.tower, torch.device("cpu"), dtype, options.depth)
    print(f"{options.tower}, {on_host.num_layers} layers, {dtype}, {device}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as temporary:
        session = open_session(options.engine, on_host, options.files or Path(temporary), device, options.gib)
        other = WholeBatchEngine(session, on_host.config, PROCESSING, device, dtype, LARGEST_PATCHES)
        tower = on_host.to(device)
        tower.inverse_frequency = tower.inverse_frequency.to(device)
        recorded = device.type == "cuda" and dtype != torch.float32
        graphs = TowerGraphs(tower, patch_counts(MAX_PATCHES)) if recorded else None
        ours = TorchEngine(tower, PROCESSING, device, QUANTUM_S, graphs)
        print(f"    {'batch':14} {'patches':>8} {'torch':>10} {options.engine:>12}  ms   least cosine")
        least = 1.0
        for name in options.batches:
            grids = BATCHES[name]
            draw = np.random.default_rng(0)
            images: list[Pixels] = [draw.integers(0, 256, (1, 14 * h, 14 * w, 3), dtype=np.uint8) for _, h, w in grids]
            (rows, ours_ms), (others, other_ms) = timed(ours, images, grids), timed(other, images, grids)
            cosine = float(F.cosine_similarity(rows.float(), others.float(), dim=1).min())
            least = min(least, cosine)
            print(f"    {name:14} {num_patches(grids):8} {ours_ms:10.1f} {other_ms:12.1f}       {cosine:.6f}")
    return int(least <= LEAST_COSINE[dtype])


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # ONNX Runtime's CUDA provider at times aborts where the interpreter takes it down
