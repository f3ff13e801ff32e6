"""`vlmrt export`: a vision tower -> the files that another engine runs it from."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from vlmrt.actors.models.checkpoint_files import check_weight_files
from vlmrt.actors.models.config import CheckpointError, ModelConfig
from vlmrt.actors.models.registry import family, load_image_processing, load_model_config
from vlmrt.actors.vit.engines.engine_files import EngineSpec, build_once, is_built, write_about
from vlmrt.runtime.config import ParallelOptions
from vlmrt.runtime.errors import StartupError
from vlmrt.tools.launch import resolve_device
from vlmrt.tools.model_source import locate_model
from vlmrt.tools.vit_engines import engine_cache, engine_specs

MIB = 1 << 20


def export(arguments: argparse.Namespace) -> int:
    """Make what is not there yet.  Returns the exit status."""
    try:
        _export(arguments)
    except (StartupError, CheckpointError) as error:
        print(f"vlmrt: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _export(arguments: argparse.Namespace) -> None:
    directory = locate_model(arguments.model, arguments.revision)
    model = load_model_config(directory)
    device, dtype = resolve_device(arguments.device, arguments.dtype, 1, model)
    specs = engine_specs(arguments.engine, directory, model, load_image_processing(directory), device, dtype)
    cache = engine_cache(arguments.engine_cache)
    output = None if arguments.output is None else new_directory(arguments.output)
    exported = cache / specs[0].name
    for spec in specs:
        if spec.format == "onnx":
            build = partial(_to_onnx, spec, directory, model)
        else:
            build = partial(_to_tensorrt, spec, exported, arguments.vit_engine_gib)
        if output is None or spec != specs[-1]:
            place = cache / spec.name
            if not is_built(place):
                build_once(cache, spec, build)
        else:
            place = output
            build(output)
            write_about(output, spec)
        print(f"vlmrt: {spec.format} in {place}", flush=True)


def new_directory(output: str) -> Path:
    """Raises: StartupError if there is something in it, or it cannot be made."""
    place = Path(output).expanduser().resolve()
    try:
        place.mkdir(parents=True, exist_ok=True)
        if any(place.iterdir()):
            raise StartupError(f"--output {output}: is not empty")
    except OSError as error:
        raise StartupError(f"--output {output}: {error}") from None
    return place


def _to_onnx(spec: EngineSpec, directory: Path, model: ModelConfig, place: Path) -> None:
    import torch

    from vlmrt.actors.vit.engines.traced_tower import export_tower

    vision = model.vision
    print(
        f"vlmrt: exporting the vision tower of {directory.name} to ONNX (opset {spec.opset}, {spec.dtype}, "
        f"{vision.depth} layers); this takes minutes, once",
        flush=True,
    )
    began_s = time.monotonic()
    files = check_weight_files(directory)
    tower = family(model.model_type).load_vision(files, model, torch.device("cpu"), getattr(torch, spec.dtype))
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", scratch)  # tracing leaves a directory there
        export_tower(tower, place, spec.opset)
    _done(place, began_s)


def _to_tensorrt(spec: EngineSpec, exported: Path, memory_gib: float, place: Path) -> None:
    from vlmrt.actors.vit.engines.tensorrt_build import build_engine, row_lengths
    from vlmrt.actors.vit.engines.tensorrt_flavour import load_flavour

    flavour = load_flavour()
    profiles = len(row_lengths(spec.max_patches))
    print(
        f"vlmrt: building it with {flavour.name} {flavour.version} for {spec.device or 'any GPU it runs on'} "
        f"({profiles} profiles, up to {spec.max_patches} patches); this takes minutes, once",
        flush=True,
    )
    began_s = time.monotonic()
    usual = ParallelOptions().max_patches_per_batch
    build_engine(flavour, exported, place, spec.vision, usual, spec.max_patches, memory_gib)
    _done(place, began_s)


def _done(place: Path, began_s: float) -> None:
    size = sum(file.stat().st_size for file in place.iterdir())
    print(f"vlmrt: done after {time.monotonic() - began_s:.1f} s, {size / MIB:.1f} MiB", flush=True)
