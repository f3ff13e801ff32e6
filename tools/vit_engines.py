"""Which files a ViT's engine runs from, and the command that makes them (no torch)."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from vlmrt.actors.models.checkpoint_files import check_weight_files
from vlmrt.actors.models.config import ImageProcessing, ModelConfig
from vlmrt.actors.vit.engines.engine_files import (
    MAX_FRAME_PATCHES,
    NATIVE_OPSET,
    PLAIN_OPSET,
    EngineSpec,
    Format,
    default_cache,
    is_built,
    versions_of,
    weights_hash,
)
from vlmrt.actors.vit.engines.tensorrt_flavour import Flavour, Gpu, load_flavour
from vlmrt.runtime.config import Config, Device, Dtype, ParallelOptions, VitEngine
from vlmrt.runtime.errors import StartupError
from vlmrt.tools.devices import cuda_gpu, num_cuda_devices

FORMATS: dict[VitEngine, Format] = {"onnxruntime": "onnx", "tensorrt": "tensorrt"}
EXPORTERS = ("torch", "onnx", "onnxscript")


def engine_specs(
    format: Format, directory: Path, model: ModelConfig, processing: ImageProcessing, device: Device, dtype: Dtype
) -> list[EngineSpec]:
    """What has to be built, in this order; the last is what the engine loads.

    Raises: StartupError if a package is missing, or does not run on these GPUs.
    """
    flavour = None if format == "onnx" else load_flavour()
    gpu = None if flavour is None else _gpu(flavour, device)
    extra = "onnx" if flavour is None else flavour.name.replace("_", "-")
    exported = EngineSpec(
        format="onnx",
        model_type=model.model_type,
        weights=weights_hash(check_weight_files(directory)),
        vision=model.vision,
        dtype=dtype,
        # TensorRT's Attention has kernels for 16 bits alone.
        opset=PLAIN_OPSET if flavour is not None and dtype == "float32" else NATIVE_OPSET,
        versions=versions_of(EXPORTERS, extra, f"engine {format}"),
    )
    if flavour is None:
        return [exported]
    largest = processing.max_pixels // processing.patch_size**2
    built = EngineSpec(
        format="tensorrt",
        model_type=exported.model_type,
        weights=exported.weights,
        vision=exported.vision,
        dtype=dtype,
        opset=exported.opset,
        versions={**exported.versions, flavour.name: flavour.version},
        device="" if gpu is None else str(gpu),
        max_patches=min(max(largest, ParallelOptions().max_patches_per_batch), MAX_FRAME_PATCHES),
    )
    return [exported, built]


def engine_directory(
    engine: VitEngine,
    cache: str | None,
    directory: Path,
    model: ModelConfig,
    processing: ImageProcessing,
    device: Device,
    dtype: Dtype,
) -> str | None:
    """Where the exported tower of an engine is, or will be; None for torch.

    Raises: StartupError if the engine cannot run there, or its package is missing.
    """
    if engine == "torch":
        return None
    if engine == "tensorrt" and device == "cpu":
        raise StartupError("--vit-engine tensorrt: needs a GPU; on a CPU there are torch and onnxruntime")
    if engine == "onnxruntime":
        if device == "cpu" and dtype != "float32":
            raise StartupError(f"--vit-engine onnxruntime: on a CPU it computes in float32, not in {dtype}")
        if importlib.util.find_spec("onnxruntime") is None:
            extra = "onnx" if device == "cpu" else "onnx-gpu"
            raise StartupError(f"--vit-engine onnxruntime: it is not installed; pip install 'vlmrt[{extra}]'")
    spec = engine_specs(FORMATS[engine], directory, model, processing, device, dtype)[-1]
    return str(engine_cache(cache) / spec.name)


def engine_cache(cache: str | None) -> Path:
    return default_cache() if cache is None else Path(cache).expanduser().resolve()


def build_engine_files(config: Config) -> None:
    """Make what the ViTs will load, if it is not there, in a process of its own: this one stays without torch.

    Raises: StartupError if that process failed; it has said why.
    """
    parallel = config.parallel
    if parallel.vit_engine == "torch" or parallel.vit_engine_directory is None:
        return
    place = Path(parallel.vit_engine_directory)
    if is_built(place):
        return
    command = [
        *(sys.executable, "-m", "vlmrt.tools.cli", "export", "--model", config.model.directory),
        *("--engine", FORMATS[parallel.vit_engine], "--engine-cache", str(place.parent)),
        *("--device", parallel.device, "--dtype", parallel.dtype),
        *("--vit-engine-gib", f"{config.memory.vit_engine_gib:g}"),
    ]
    if subprocess.run(command, check=False).returncode != 0:
        raise StartupError(f"--vit-engine {parallel.vit_engine}: the vision tower could not be exported")
    if not is_built(place):
        raise StartupError(f"--vit-engine {parallel.vit_engine}: the export did not leave {place}")


def _gpu(flavour: Flavour, device: Device) -> Gpu | None:
    """The GPU that a TensorRT engine is built for; None: any that the flavour runs on."""
    gpus: Sequence[Gpu] = [cuda_gpu(index) for index in range(num_cuda_devices())] if device == "cuda" else []
    for gpu in gpus:
        flavour.check_gpu(gpu)
    if len(set(gpus)) > 1:
        raise StartupError(f"engine tensorrt: GPUs of one kind are needed, not {', '.join(map(str, set(gpus)))}")
    if not gpus and flavour.needs_gpu_to_build:
        raise StartupError(f"engine tensorrt: {flavour.name} builds on a GPU, and there is none")
    return gpus[0] if gpus else None
