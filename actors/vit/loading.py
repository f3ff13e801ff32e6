"""Loading of one tower: its weights, its slab, a first forward."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlmrt.actors.models.checkpoint_files import check_weight_files
from vlmrt.actors.models.config import CheckpointError, ImageProcessing, VisionConfig
from vlmrt.actors.models.gpu_memory import out_of_memory_text, parameter_bytes
from vlmrt.actors.models.registry import family, load_image_processing, load_model_config
from vlmrt.actors.vit.encoder import Encoder
from vlmrt.actors.vit.engines.engine import GridThw, VisionEngine
from vlmrt.actors.vit.engines.torch import TorchEngine
from vlmrt.runtime.actor import ActorContext
from vlmrt.runtime.config import Config
from vlmrt.runtime.errors import StartupError
from vlmrt.runtime.shared_memory import ArenaReader
from vlmrt.runtime.slab import DTYPE_BYTES, create_slab

GIB = 1 << 30
TO_LOWER = ("--embedding-cache-gib", "--kv-cache-gib", "the checkpoint's max_pixels")


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
    device, dtype = torch.device(context.device), getattr(torch, config.parallel.dtype)
    if device.type == "cpu":
        torch.set_num_threads(config.parallel.vit_threads)
    else:
        torch.cuda.set_device(device)
    directory = Path(config.model.directory)
    try:
        model_config = load_model_config(directory)
        processing = load_image_processing(directory)
        tower = family(model_config.model_type).load_vision(
            check_weight_files(directory), model_config, device, dtype, partial(context.progress, "loading weights")
        )
    except CheckpointError as error:
        raise StartupError(str(error)) from None
    tensors["the weights of the ViT"] = parameter_bytes(tower)
    slab = create_slab(
        context,
        context.device,
        num_pages=_num_pages(config, model_config.vision),
        page_rows=config.memory.page_rows,
        width=model_config.vision.out_hidden_size,
        dtype=config.parallel.dtype,
    )
    beside_torch["embeddings (--embedding-cache-gib)"] = int(config.memory.embedding_cache_gib * GIB)
    engine = TorchEngine(tower, processing, device)
    merge = model_config.vision.spatial_merge_size
    _warm_up(engine, processing, (1, merge, merge))
    if device.type != "cpu":  # let torch's allocator keep the workspace of the largest batch
        _warm_up(engine, processing, _largest_grid(config, processing))
    return Encoder(engine, slab, ArenaReader(context.open_memory), model_config.vision)


def _num_pages(config: Config, vision: VisionConfig) -> int:
    page_bytes = config.memory.page_rows * vision.out_hidden_size * DTYPE_BYTES[config.parallel.dtype]
    num_pages = int(config.memory.embedding_cache_gib * GIB) // page_bytes
    if num_pages < 1:
        raise StartupError(
            f"--embedding-cache-gib {config.memory.embedding_cache_gib:g}: one page takes {page_bytes / GIB:.6f} GiB"
        )
    return num_pages


def _largest_grid(config: Config, processing: ImageProcessing) -> GridThw:
    """About the patches of a full batch or of the largest image, whichever are more, as one image."""
    patches = max(config.parallel.max_patches_per_batch, processing.max_pixels // processing.patch_size**2)
    side = math.isqrt(patches) // processing.merge_size * processing.merge_size
    return (1, max(side, processing.merge_size), max(side, processing.merge_size))


def _warm_up(engine: VisionEngine[Any], processing: ImageProcessing, grid: GridThw) -> None:
    size = processing.patch_size
    run = engine.prepare([np.zeros((1, grid[1] * size, grid[2] * size, 3), np.uint8)], [grid])
    while not engine.run_quantum(run):
        pass
    engine.rows(run)
