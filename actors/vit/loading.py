"""Loading of one tower: its weights, its slab, a first forward."""

from __future__ import annotations

import logging
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlmrt.actors.models.checkpoint_files import check_weight_files
from vlmrt.actors.models.config import CheckpointError, ImageProcessing, ModelConfig, VisionConfig
from vlmrt.actors.models.gpu_memory import out_of_memory_text, parameter_bytes
from vlmrt.actors.models.registry import family, load_image_processing, load_model_config
from vlmrt.actors.models.vision_tower import VisionTower
from vlmrt.actors.vit.encoder import Encoder
from vlmrt.actors.vit.engines.engine import GridThw, Pixels, VisionEngine
from vlmrt.actors.vit.engines.engine_files import MAX_FRAME_PATCHES, EngineSpec, read_about
from vlmrt.actors.vit.engines.onnxruntime import OnnxRuntimeSession
from vlmrt.actors.vit.engines.tensorrt import TensorRtSession
from vlmrt.actors.vit.engines.tensorrt_flavour import load_flavour
from vlmrt.actors.vit.engines.torch import TorchEngine
from vlmrt.actors.vit.engines.tower_graphs import TowerGraphs, patch_counts
from vlmrt.actors.vit.engines.whole_batch import WholeBatchEngine
from vlmrt.actors.vit.host_rows import HostRows
from vlmrt.runtime.actor import ActorContext
from vlmrt.runtime.config import Config
from vlmrt.runtime.errors import StartupError
from vlmrt.runtime.shared_memory import ArenaReader
from vlmrt.runtime.slab import DTYPE_BYTES, create_slab

GIB = 1 << 30
TO_LOWER = ("--embedding-cache-gib", "--kv-cache-gib", "the checkpoint's max_pixels")
WARM_UP_CELLS = 16
MAX_CPU_CALL_PATCHES = 1024  # more at once are no faster there, and between calls the encoder shows that it moves
CPU_QUANTUM_S = 0.1  # nobody else waits for the device; it only says how often the encoder shows that it moves

logger = logging.getLogger(__name__)


def load_encoder(context: ActorContext) -> Encoder:
    """Do everything that a first image should not have to wait for; blocks, in the thread that will encode.

    Raises: StartupError where another try cannot help.
    """
    tensors: dict[str, int] = {}  # what is loaded so far, for whoever has to make room
    beside_torch: dict[str, int] = {}
    try:
        return _load(context, tensors, beside_torch)
    except torch.OutOfMemoryError:
        device = torch.device(context.device)
        raise StartupError(out_of_memory_text("the ViT", device, tensors, TO_LOWER, beside_torch)) from None


def _load(context: ActorContext, tensors: dict[str, int], beside_torch: dict[str, int]) -> Encoder:
    config = context.config
    device = _use_device(context)
    directory = Path(config.model.directory)
    try:
        model_config, processing = load_model_config(directory), load_image_processing(directory)
        tower = None if config.parallel.vit_engine != "torch" else _load_tower(context, model_config, device)
    except CheckpointError as error:
        raise StartupError(str(error)) from None
    if tower is not None:
        tensors["the weights of the ViT"] = parameter_bytes(tower)
    vision = model_config.vision
    slab = create_slab(
        context,
        context.device,
        num_pages=_num_pages("--embedding-cache-gib", config.memory.embedding_cache_gib, config, vision),
        page_rows=config.memory.page_rows,
        width=vision.out_hidden_size,
        dtype=config.parallel.dtype,
    )
    beside_torch["embeddings (--embedding-cache-gib)"] = int(config.memory.embedding_cache_gib * GIB)
    host_rows = HostRows(slab, _num_host_pages(config, vision))
    engine: VisionEngine[Any]
    if tower is None:
        beside_torch[f"{config.parallel.vit_engine} (--vit-engine-gib)"] = int(config.memory.vit_engine_gib * GIB)
        engine = _other_engine(context, vision, processing, device)
    else:
        engine = _torch_engine(context, tower, processing, device)
    return Encoder(engine, slab, host_rows, ArenaReader(context.open_memory), vision)


def _torch_engine(
    context: ActorContext, tower: VisionTower, processing: ImageProcessing, device: torch.device
) -> TorchEngine:
    config = context.config
    quantum_s = config.parallel.vit_quantum_ms / 1e3 if device.type == "cuda" else CPU_QUANTUM_S
    engine = TorchEngine(tower, processing, device, quantum_s)
    _encode_black(engine, processing, _grid(processing, 1))
    if device.type == "cuda":
        _encode_black(engine, processing, _grid(processing, WARM_UP_CELLS))
        _reserve_workspace(engine, config, processing, device)
        if config.parallel.dtype != "float32":
            graphs = _record(tower, context)
            engine = TorchEngine(tower, processing, device, quantum_s, graphs)
            _encode_black(engine, processing, _grid(processing, WARM_UP_CELLS))
    return engine


def _other_engine(
    context: ActorContext, vision: VisionConfig, processing: ImageProcessing, device: torch.device
) -> WholeBatchEngine:
    """One whose tower was exported before.  Raises: StartupError if its files or its package will not do."""
    parallel = context.config.parallel
    directory = Path(parallel.vit_engine_directory or "")
    spec = read_about(directory)
    context.progress(f"loading {spec.format}", 0, 1)
    session = _open_session(context, directory, spec, device)
    context.progress(f"loading {spec.format}", 1, 1)
    max_call_patches = parallel.max_patches_per_batch if device.type == "cuda" else MAX_CPU_CALL_PATCHES
    dtype: torch.dtype = getattr(torch, parallel.dtype)
    engine = WholeBatchEngine(session, vision, processing, device, dtype, max_call_patches)
    _encode_black(engine, processing, _grid(processing, 1))
    if device.type == "cuda":
        _reserve_other(engine, context.config, processing, device)
    return engine


def _reserve_other(engine: WholeBatchEngine, config: Config, processing: ImageProcessing, device: torch.device) -> None:
    """Have the engine take the memory of the largest image, or at least of the largest batch, while there is some.

    Raises: StartupError if it has not enough for that.
    """
    side = math.isqrt(config.parallel.max_patches_per_batch) // processing.merge_size
    batch, largest = _grid(processing, side), _largest_grid(config, processing)
    engine_gib = config.memory.vit_engine_gib
    for grid in (batch, largest):
        try:
            _encode_black(engine, processing, grid)
            torch.cuda.synchronize(device)
        except torch.OutOfMemoryError:
            problem = f"--vit-engine-gib {engine_gib:g}: too little for {math.prod(grid)} patches"
            if grid == batch:
                raise StartupError(f"{problem} of one batch; raise it, or lower --kv-cache-gib") from None
            logger.warning("%s of one image: such large images will fail", problem)
            torch.cuda.empty_cache()


def _open_session(
    context: ActorContext, directory: Path, spec: EngineSpec, device: torch.device
) -> OnnxRuntimeSession | TensorRtSession:
    config = context.config
    if spec.format == "tensorrt":
        return TensorRtSession(load_flavour(), directory, device, spec.max_patches)
    return OnnxRuntimeSession(directory, device, config.parallel.vit_threads, config.memory.vit_engine_gib)


def _use_device(context: ActorContext) -> torch.device:
    """The actor's device, made this process's own."""
    device = torch.device(context.device)
    if device.type == "cpu":
        torch.set_num_threads(context.config.parallel.vit_threads)
    else:
        torch.cuda.set_device(device)
    return device


def _load_tower(context: ActorContext, model_config: ModelConfig, device: torch.device) -> VisionTower:
    return family(model_config.model_type).load_vision(
        check_weight_files(Path(context.config.model.directory)),
        model_config,
        device,
        getattr(torch, context.config.parallel.dtype),
        partial(context.progress, "loading weights"),
    )


def _num_pages(option: str, gib: float, config: Config, vision: VisionConfig) -> int:
    """Raises: StartupError if not even one fits."""
    page_bytes = config.memory.page_rows * vision.out_hidden_size * DTYPE_BYTES[config.parallel.dtype]
    num_pages = int(gib * GIB) // page_bytes
    if num_pages < 1:
        raise StartupError(f"{option} {gib:g}: one page takes {page_bytes / GIB:.6f} GiB")
    return num_pages


def _num_host_pages(config: Config, vision: VisionConfig) -> int:
    gib = config.memory.embedding_host_cache_gib
    return _num_pages("--embedding-host-cache-gib", gib, config, vision) if gib else 0


def _grid(processing: ImageProcessing, cells: int) -> GridThw:
    """Of a square still image with so many merge blocks to a side."""
    return (1, cells * processing.merge_size, cells * processing.merge_size)


def _largest_grid(config: Config, processing: ImageProcessing) -> GridThw:
    """About the patches of a full batch or of the largest image, whichever are more, as one image."""
    patches = max(config.parallel.max_patches_per_batch, processing.max_pixels // processing.patch_size**2)
    if config.parallel.vit_engine != "torch":
        patches = min(patches, MAX_FRAME_PATCHES)
    return _grid(processing, max(1, math.isqrt(patches) // processing.merge_size))


def _reserve_workspace(
    engine: VisionEngine[Any], config: Config, processing: ImageProcessing, device: torch.device
) -> None:
    """Run the first layer of the largest batch, so that torch's allocator keeps its workspace."""
    grid = _largest_grid(config, processing)
    num_patches = math.prod(grid)
    torch.cuda.reset_peak_memory_stats(device)
    run = engine.prepare(_black(processing, grid), [grid])
    engine.run_quantum(run)
    torch.cuda.synchronize(device)
    peak, kept = torch.cuda.max_memory_allocated(device), torch.cuda.memory_reserved(device)
    logger.info(
        "vision tower on %s: peak %.2f GiB at %d patches, %.2f GiB kept", device, peak / GIB, num_patches, kept / GIB
    )


def _record(tower: VisionTower, context: ActorContext) -> TowerGraphs:
    """Graphs of every batch that the queue puts together; what is larger is one image."""
    device = torch.device(context.device)
    started_s, kept = time.perf_counter(), torch.cuda.memory_reserved(device)
    counts = patch_counts(context.config.parallel.max_patches_per_batch)
    graphs = TowerGraphs(tower, counts, partial(context.progress, "recording the tower"))
    torch.cuda.synchronize(device)
    seconds, kept = time.perf_counter() - started_s, torch.cuda.memory_reserved(device) - kept
    logger.info("vision tower on %s: %d sizes recorded in %.1f s, %.2f GiB", device, len(counts), seconds, kept / GIB)
    return graphs


def _encode_black(engine: VisionEngine[Any], processing: ImageProcessing, grid: GridThw) -> None:
    """Run every kernel once: the first call loads it."""
    run = engine.prepare(_black(processing, grid), [grid])
    while not engine.run_quantum(run):
        pass
    engine.rows(run)


def _black(processing: ImageProcessing, grid: GridThw) -> list[Pixels]:
    size = processing.patch_size
    return [np.zeros((1, grid[1] * size, grid[2] * size, 3), np.uint8)]
