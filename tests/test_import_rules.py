"""Imports point one way, the light processes stay light, and nothing unpickles."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("runtime", "actors", "kernels", "tools")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

# what each part may import of vlmrt: kernels <- models <- actors -> runtime; tools see everything
ALLOWED = {
    "kernels": ("vlmrt.kernels",),
    "runtime": ("vlmrt.runtime",),
    "actors/models": ("vlmrt.actors.models", "vlmrt.kernels"),
    "actors/scheduler": ("vlmrt.actors.scheduler", "vlmrt.runtime"),
    "actors/media": ("vlmrt.actors.media", "vlmrt.actors.models", "vlmrt.runtime"),
    "actors/edge": ("vlmrt.actors.edge", "vlmrt.actors.models", "vlmrt.runtime"),
    "actors/vit": ("vlmrt.actors.vit", "vlmrt.actors.models", "vlmrt.kernels", "vlmrt.runtime"),
    "actors/llm": ("vlmrt.actors.llm", "vlmrt.actors.models", "vlmrt.kernels", "vlmrt.runtime"),
}
LIGHT = (
    "vlmrt.actors.edge.actor",
    "vlmrt.actors.media.actor",
    "vlmrt.actors.scheduler.actor",
    "vlmrt.runtime.supervisor",
    "vlmrt.runtime.process",
    "vlmrt.runtime.sweeper",
    "vlmrt.tools.admin.command",
    "vlmrt.tools.admin.top.app",
    "vlmrt.tools.cli",
    "vlmrt.tools.launch",
    "vlmrt.tools.export",
    "vlmrt.tools.chat.chat",
    "vlmrt.tools.doctor.host",
    "vlmrt.tools.doctor.probes",
)
OTHER_ENGINES = ("onnx", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_rtx")
HEAVY = ("torch", "transformers", "numba", "triton", *OTHER_ENGINES)
UNPICKLERS = ("pickle", "cloudpickle", "dill", "marshal", "shelve")


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(path: Path) -> str | None:
    relative = path.relative_to(ROOT).as_posix()
    return next((part for part in ALLOWED if relative.startswith(part + "/")), None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_imports_only_what_its_part_may_import(path: Path) -> None:
    part = part_of(path)
    if part is None:
        return
    for name in imported(path):
        if name.startswith("vlmrt."):
            assert name.startswith(ALLOWED[part]), f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_can_unpickle(path: Path) -> None:
    for name in imported(path):
        assert name.split(".")[0] not in UNPICKLERS, f"{path.relative_to(ROOT)} imports {name}"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            called = ast.unparse(node)
            assert called not in ("torch.load", "yaml.load"), f"{path.relative_to(ROOT)} uses {called}"
            assert node.attr not in ("recv_pyobj", "send_pyobj", "all_gather_object", "broadcast_object_list"), called


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_process_imports_nothing_heavy(module: str) -> None:
    program = f"import sys; sys.modules.update(dict.fromkeys({HEAVY})); import {module}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_vit_on_torch_needs_no_package_of_another_engine() -> None:
    program = f"import sys; sys.modules.update(dict.fromkeys({OTHER_ENGINES})); import vlmrt.actors.vit.actor"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
