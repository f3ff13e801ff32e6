"""What a launch and `vlmrt export` make of --vit-engine: files by name, errors in a line, one build."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vlmrt.actors.vit.engines.engine_files import ABOUT_FILE, ONNX_FILE, EngineSpec, is_built, read_about
from vlmrt.actors.vit.engines.tensorrt_flavour import Gpu
from vlmrt.runtime.config import Config
from vlmrt.runtime.errors import StartupError
from vlmrt.tools import vit_engines
from vlmrt.tools.cli import build_parser
from vlmrt.tools.export import export
from vlmrt.tools.launch import build_config
from vlmrt.tools.vit_engines import build_engine_files

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs the extra onnx",
)


def config(*options: str, cache: Path) -> Config:
    arguments = ["launch", "--device", "cpu", "--engine-cache", str(cache), *options]
    return build_config(build_parser().parse_args(arguments))[0]


def test_torch_needs_no_files(tmp_path: Path) -> None:
    made = config(cache=tmp_path)
    assert (made.parallel.vit_engine, made.parallel.vit_engine_directory) == ("torch", None)
    build_engine_files(made)
    assert list(tmp_path.iterdir()) == []


@needs_onnx
def test_onnxruntime_has_a_directory_in_the_cache(tmp_path: Path) -> None:
    made = config("--vit-engine", "onnxruntime", cache=tmp_path)
    assert made.parallel.vit_engine == "onnxruntime"
    directory = Path(made.parallel.vit_engine_directory or "")
    assert directory.parent == tmp_path
    assert directory.name.startswith("onnx-float32-")
    assert config("--vit-engine", "onnxruntime", cache=tmp_path) == made


@needs_onnx
def test_files_that_are_there_are_not_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = config("--vit-engine", "onnxruntime", cache=tmp_path)
    directory = Path(made.parallel.vit_engine_directory or "")
    commands: list[list[str]] = []

    def run(command: list[str], check: bool) -> Any:
        commands.append(command)
        directory.mkdir()
        (directory / ABOUT_FILE).write_text("{}")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    build_engine_files(made)
    build_engine_files(made)
    assert len(commands) == 1
    asked = build_parser().parse_args(commands[0][3:])
    assert commands[0][:3] == [sys.executable, "-m", "vlmrt.tools.cli"]
    assert (asked.engine, asked.engine_cache, asked.device, asked.dtype) == ("onnx", str(tmp_path), "cpu", "float32")


@needs_onnx
def test_an_export_that_fails_ends_the_launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = config("--vit-engine", "onnxruntime", cache=tmp_path)
    for code, problem in ((1, "could not be exported"), (0, "did not leave")):
        monkeypatch.setattr(
            subprocess, "run", lambda command, check, code=code: subprocess.CompletedProcess(command, code)
        )
        with pytest.raises(StartupError, match=problem):
            build_engine_files(made)


def test_what_an_engine_cannot_do_is_said_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="--vit-engine tensorrt: needs a GPU"):
        config("--vit-engine", "tensorrt", cache=tmp_path)
    with pytest.raises(StartupError, match="on a CPU it computes in float32, not in bfloat16"):
        config("--vit-engine", "onnxruntime", "--dtype", "bfloat16", cache=tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(StartupError, match=r"it is not installed; pip install 'vlmrt\[onnx\]'"):
        config("--vit-engine", "onnxruntime", cache=tmp_path)


def test_a_gpu_that_tensorrt_does_not_run_on_is_named_before_the_build(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the drivers' answers in place of theirs."""
    (tmp_path / "tensorrt_rtx.py").write_text("__version__ = '1.7'")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    del sys.modules["tensorrt_rtx"]
    gpus = [Gpu("NVIDIA H100", (9, 0))]
    for module in ("vlmrt.tools.launch", "vlmrt.tools.vit_engines"):
        monkeypatch.setattr(f"{module}.num_cuda_devices", lambda: len(gpus))
    monkeypatch.setattr(vit_engines, "cuda_gpu", gpus.__getitem__)
    arguments = build_parser().parse_args(["launch", "--vit-engine", "tensorrt", "--engine-cache", str(tmp_path)])
    with pytest.raises(StartupError, match=r"tensorrt_rtx 1\.7 does not run on NVIDIA H100"):
        build_config(arguments)
    gpus[:] = [Gpu("NVIDIA L4", (8, 9)), Gpu("NVIDIA A100", (8, 0))]
    with pytest.raises(StartupError, match="GPUs of one kind are needed"):
        build_config(arguments)
    gpus[:] = [Gpu("NVIDIA L4", (8, 9))]
    monkeypatch.setattr(vit_engines, "versions_of", lambda *_: {"torch": "2"})
    directory = Path(build_config(arguments)[0].parallel.vit_engine_directory or "")
    assert directory.name.startswith("tensorrt-bfloat16-")


@needs_onnx
def test_an_export_leaves_the_files_and_what_they_are_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The export itself is the ViT's test."""
    exported: list[int] = []

    def export_tower(tower: object, place: Path, opset: int) -> None:
        (place / ONNX_FILE).write_text("x")
        exported.append(opset)

    monkeypatch.setattr("vlmrt.actors.vit.engines.traced_tower.export_tower", export_tower)
    command = ["export", "--device", "cpu", "--engine-cache", str(tmp_path / "cache")]
    assert export(build_parser().parse_args(command)) == 0
    said = capsys.readouterr().out
    assert "opset 23, float32, 6 layers" in said
    assert export(build_parser().parse_args(command)) == 0
    assert exported == [23]
    (directory,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert f"vlmrt: onnx in {directory}" in capsys.readouterr().out
    assert is_built(directory)
    spec = read_about(directory)
    assert isinstance(spec, EngineSpec)
    assert spec.name == directory.name
    made = config("--vit-engine", "onnxruntime", cache=tmp_path / "cache")
    assert made.parallel.vit_engine_directory == str(directory)
    assert export(build_parser().parse_args([*command, "--output", str(tmp_path / "out")])) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [ABOUT_FILE, ONNX_FILE]
    assert export(build_parser().parse_args([*command, "--output", str(tmp_path / "out")])) == 1
    assert "is not empty" in capsys.readouterr().err
