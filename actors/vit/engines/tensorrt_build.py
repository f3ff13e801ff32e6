"""A TensorRT engine of an exported tower: one optimisation profile for each length of its rows of frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from vlmrt.actors.models.config import VisionConfig
from vlmrt.actors.vit.engines.engine_files import ONNX_FILE, TENSORRT_FILE
from vlmrt.actors.vit.engines.tensorrt_flavour import Flavour
from vlmrt.kernels.segment_rows import most_rows
from vlmrt.runtime.errors import StartupError

GIB = 1 << 30
SHORTEST_ROW = 256  # patches
ROW_STEP = 4  # a row is at most so many times longer than a frame in it


class ShapeRange(NamedTuple):
    least: tuple[int, ...]
    usual: tuple[int, ...]
    most: tuple[int, ...]


def row_lengths(max_patches: int) -> tuple[int, ...]:
    """Of the profiles, ascending; the last holds a frame of max_patches.

    With the length open, a profile would have to hold the most rows at the greatest length: the square of the patches.
    """
    lengths = [SHORTEST_ROW]
    while lengths[-1] < max_patches:
        lengths.append(min(ROW_STEP * lengths[-1], max(max_patches, SHORTEST_ROW)))
    return tuple(lengths)


def shape_ranges(vision: VisionConfig, row_length: int, usual_patches: int, max_patches: int) -> dict[str, ShapeRange]:
    """Of each input of the graph in one profile."""
    fewest = vision.spatial_merge_size**2
    counts = (fewest, usual_patches, max_patches)

    def patches(*rest: int) -> ShapeRange:
        return ShapeRange(*((count, *rest) for count in counts))

    def rows(length: int) -> ShapeRange:
        return ShapeRange(
            (1, length), (max(1, usual_patches // length), length), (most_rows(max_patches, length), length)
        )

    ranges = {
        "patches": patches(vision.patch_dim),
        "cos": patches(vision.head_dim),
        "sin": patches(vision.head_dim),
        "frame_patch": rows(row_length),
        "frame_segment": rows(row_length),
        "frame_cell": patches(),
    }
    if vision.window_cells is not None:
        window = (vision.window_cells * vision.spatial_merge_size) ** 2
        ranges |= {"window_patch": rows(window), "window_segment": rows(window), "window_cell": patches()}
    return ranges


def build_engine(
    flavour: Flavour,
    exported: Path,
    directory: Path,
    vision: VisionConfig,
    usual_patches: int,
    max_patches: int,
    memory_gib: float,
) -> Path:
    """Build the tower that is exported to one directory into TENSORRT_FILE of another.

    Raises: StartupError with what the parser or the builder found wrong.
    """
    trt = flavour.module
    logger = _logger(trt)
    builder = trt.Builder(logger)
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # newer ones know nothing else
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(exported / ONNX_FILE)):
        errors = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise StartupError(f"--vit-engine tensorrt: {flavour.name} {flavour.version} cannot read the tower: {errors}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(memory_gib * GIB))
    for length in row_lengths(max_patches):
        profile = builder.create_optimization_profile()
        for name, shapes in shape_ranges(vision, length, min(usual_patches, max_patches), max_patches).items():
            profile.set_shape(name, *shapes)
        config.add_optimization_profile(profile)
    built = builder.build_serialized_network(network, config)
    if built is None:
        errors = "; ".join(logger.errors)
        raise StartupError(f"--vit-engine tensorrt: {flavour.name} {flavour.version} cannot build the tower: {errors}")
    file = directory / TENSORRT_FILE
    file.write_bytes(memoryview(built))
    return file


def _logger(trt: Any) -> Any:
    class Errors(trt.ILogger):  # type: ignore[misc]
        """Keeps what went wrong."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Errors()
