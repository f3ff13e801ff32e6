"""TensorRT: which package runs on which GPU, profiles that hold every batch, and a build where there is no GPU."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from tests.actors.vit.conftest import Checkpoint, mixed_batch
from vlmrt.actors.models.checkpoint_files import check_weight_files
from vlmrt.actors.models.registry import family
from vlmrt.actors.vit.engines.engine_files import NATIVE_OPSET, ONNX_FILE, PLAIN_OPSET, TENSORRT_FILE
from vlmrt.actors.vit.engines.tensorrt_build import build_engine, row_lengths, shape_ranges
from vlmrt.actors.vit.engines.tensorrt_flavour import MODULES, Flavour, Gpu, load_flavour, runs_on
from vlmrt.actors.vit.engines.tower_inputs import InputLayout
from vlmrt.actors.vit.engines.traced_tower import export_tower
from vlmrt.runtime.errors import StartupError

CPU = torch.device("cpu")
MAX_PATCHES = 1024
needs_rtx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("tensorrt_rtx", "onnxscript")), reason="needs tensorrt-rtx"
)
H100, ADA = Gpu("NVIDIA H100", (9, 0)), Gpu("NVIDIA L4", (8, 9))


def flavour(name: str) -> Flavour:
    module = ModuleType(name)
    module.__version__ = "1.2"  # type: ignore[attr-defined]
    return Flavour(name, module)


def hide(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Until the end of the test the module is not imported; then it is again, if it was."""
    monkeypatch.setitem(sys.modules, name, None)
    del sys.modules[name]


@pytest.mark.parametrize(
    ("capability", "full", "rtx"),
    [
        ((7, 0), False, False),
        ((7, 5), True, False),
        ((8, 0), True, True),
        ((8, 6), True, True),
        ((8, 7), True, False),
        ((8, 9), True, True),
        ((9, 0), True, False),
        ((10, 0), True, False),
        ((12, 0), True, True),
        ((12, 1), True, True),
        ((13, 0), True, True),
    ],
)
def test_gpus_that_each_flavour_runs_on(capability: tuple[int, int], full: bool, rtx: bool) -> None:
    assert (runs_on("tensorrt", capability), runs_on("tensorrt_rtx", capability)) == (full, rtx)


def test_a_gpu_that_the_flavour_does_not_run_on_is_named() -> None:
    flavour("tensorrt").check_gpu(H100)
    flavour("tensorrt_rtx").check_gpu(ADA)
    with pytest.raises(StartupError, match=r"tensorrt_rtx 1\.2 does not run on NVIDIA H100 \(compute .* 9\.0\); pip"):
        flavour("tensorrt_rtx").check_gpu(H100)
    with pytest.raises(StartupError, match=r"tensorrt 1\.2 does not run on Old \(compute capability 6\.1\)$"):
        flavour("tensorrt").check_gpu(Gpu("Old", (6, 1)))


def test_the_full_package_is_taken_where_both_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in MODULES:
        (tmp_path / f"{name}.py").write_text("__version__ = '1.2'")
        hide(monkeypatch, name)
    monkeypatch.syspath_prepend(tmp_path)
    found = load_flavour()
    assert (found.name, found.version, found.needs_gpu_to_build) == ("tensorrt", "1.2", True)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    found = load_flavour()
    assert (found.name, found.version, found.needs_gpu_to_build) == ("tensorrt_rtx", "1.2", False)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(StartupError, match=r"pip install 'vlmrt\[tensorrt\]', or 'vlmrt\[tensorrt-rtx\]'"):
        load_flavour()


def test_a_package_without_its_library_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10 is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    hide(monkeypatch, "tensorrt")
    with pytest.raises(StartupError, match=r"the package tensorrt cannot be loaded: libnvinfer\.so\.10 is missing"):
        load_flavour()


@pytest.mark.parametrize("max_patches", [4, 256, 260, 8192, 16384])
def test_the_longest_rows_hold_the_largest_frame(max_patches: int) -> None:
    lengths = row_lengths(max_patches)
    assert lengths[-1] == max(max_patches, 256)
    assert list(lengths) == sorted(set(lengths))
    assert all(longer <= 4 * shorter for shorter, longer in itertools.pairwise(lengths))


@torch.inference_mode()
def test_a_profile_holds_every_batch_of_its_row_length(checkpoint: Checkpoint) -> None:
    vision = checkpoint.config.vision
    lengths = row_lengths(MAX_PATCHES)
    layout = InputLayout(vision, CPU, lengths)
    taken = set()
    for seed in range(60):
        _, grids = mixed_batch(seed)
        if seed % 3 == 0:
            grids = grids[:1] * 3
        patches = torch.zeros(sum(math.prod(grid) for grid in grids), vision.patch_dim)
        if len(patches) > MAX_PATCHES:
            continue
        inputs = layout.inputs(patches, grids).named()
        row_length = inputs["frame_patch"].shape[1]
        taken.add(row_length)
        ranges = shape_ranges(vision, row_length, 512, MAX_PATCHES)
        assert ranges.keys() == inputs.keys()
        for name, tensor in inputs.items():
            least, usual, most = (np.array(shape) for shape in ranges[name])
            assert (least <= usual).all()
            assert (usual <= most).all()
            assert (least <= tensor.shape).all(), name
            assert (np.array(tensor.shape) <= most).all(), name
    assert taken >= {256, 1024}
    with pytest.raises(ValueError, match="at most 1024"):
        layout.inputs(torch.zeros(2048, vision.patch_dim), [(1, 32, 64)])


@needs_rtx
def test_an_engine_in_bfloat16_is_built_without_a_gpu(checkpoint: Checkpoint, tmp_path: Path) -> None:
    rtx = build(checkpoint, "bfloat16", NATIVE_OPSET, tmp_path)
    (tmp_path / ONNX_FILE).write_bytes(b"not a graph")
    with pytest.raises(StartupError, match="cannot read the tower"):
        build_engine(rtx, tmp_path, tmp_path, checkpoint.config.vision, 512, MAX_PATCHES, 1.0)


@needs_rtx
def test_an_engine_in_float32_is_built_without_a_gpu(one_checkpoint: Checkpoint, tmp_path: Path) -> None:
    build(one_checkpoint, "float32", PLAIN_OPSET, tmp_path)


def build(checkpoint: Checkpoint, dtype: str, opset: int, place: Path) -> Flavour:
    files, config = check_weight_files(checkpoint.directory), checkpoint.config
    tower = family(config.model_type).load_vision(files, config, CPU, getattr(torch, dtype))
    export_tower(tower, place, opset)
    rtx = Flavour("tensorrt_rtx", importlib.import_module("tensorrt_rtx"))
    file = build_engine(rtx, place, place, config.vision, 512, MAX_PATCHES, 1.0)
    assert file == place / TENSORRT_FILE
    assert file.stat().st_size > sum(parameter.nbytes for parameter in tower.parameters())
    return rtx
