"""TensorRT by either of its packages, which have one interface: `tensorrt`, or `tensorrt_rtx` (no torch)."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, NamedTuple

from vlmrt.runtime.errors import StartupError

MODULES = ("tensorrt", "tensorrt_rtx")
OLDEST = (7, 5)  # compute capability that TensorRT 10 and later build for
RTX_AMPERE_AND_ADA = ((8, 0), (8, 6), (8, 9))  # as TensorRT-RTX 1.7 names what it supports,
RTX_OLDEST_BLACKWELL = (12, 0)  # and everything from here on


class Gpu(NamedTuple):
    name: str
    capability: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]})"


class Flavour(NamedTuple):
    """An imported package."""

    name: str
    module: Any

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    @property
    def needs_gpu_to_build(self) -> bool:
        return self.name == "tensorrt"

    def check_gpu(self, gpu: Gpu) -> None:
        """Raises: StartupError naming a GPU that this flavour does not run on."""
        if runs_on(self.name, gpu.capability):
            return
        other = "; pip uninstall tensorrt-rtx-cu13, then pip install 'vlmrt[tensorrt]'"
        raise StartupError(
            f"--vit-engine tensorrt: {self.name} {self.version} does not run on {gpu}"
            + (other if runs_on("tensorrt", gpu.capability) else "")
        )


def runs_on(flavour: str, capability: tuple[int, int]) -> bool:
    if flavour == "tensorrt":
        return capability >= OLDEST
    return capability in RTX_AMPERE_AND_ADA or capability >= RTX_OLDEST_BLACKWELL


def load_flavour() -> Flavour:
    """The installed package, the full one if both are.

    Raises: StartupError naming the extras if there is none, or the library that it lacks.
    """
    for name in MODULES:
        if importlib.util.find_spec(name) is None:
            continue
        try:
            return Flavour(name, importlib.import_module(name))
        except (ImportError, OSError) as error:
            raise StartupError(f"--vit-engine tensorrt: the package {name} cannot be loaded: {error}") from None
    raise StartupError(
        "--vit-engine tensorrt: neither package is installed; pip install 'vlmrt[tensorrt]', "
        "or 'vlmrt[tensorrt-rtx]' for an RTX GPU"
    )
