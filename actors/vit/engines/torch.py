"""The vision tower in torch: the engine that is always there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlmrt.actors.models.config import ImageProcessing
from vlmrt.actors.models.vision_tower import VisionState, VisionTower
from vlmrt.actors.vit.engines.engine import GridThw, Pixels
from vlmrt.kernels.patchify import patchify

QUANTUM_S = {"cuda": 0.008, "cpu": 0.1}


@dataclass(slots=True)
class TorchRun:
    state: VisionState
    layer_s: float | None = None  # measured in this run; None before its first quantum


class TorchEngine:
    """A VisionEngine whose quanta hold as many layers as the last one's time per layer allows."""

    def __init__(self, tower: VisionTower, processing: ImageProcessing, device: torch.device) -> None:
        self._tower = tower
        self._processing = processing
        self._device = device
        self._quantum_s = QUANTUM_S[device.type]

    def prepare(self, images: Sequence[Pixels], grids: Sequence[GridThw]) -> TorchRun:
        with torch.inference_mode():
            patches = patchify([self._on_device(image) for image in images], self._processing)
            return TorchRun(self._tower.prepare(patches, grids))

    def run_quantum(self, run: TorchRun) -> bool:
        first = run.state.next_layer
        num_layers = 1 if run.layer_s is None else max(1, int(self._quantum_s / run.layer_s))
        last = min(first + num_layers, self._tower.num_layers)
        started_s = time.perf_counter()
        with torch.inference_mode():
            self._tower.run_layers(run.state, first, last)
        self._wait()
        run.layer_s = max((time.perf_counter() - started_s) / max(1, last - first), 1e-6)
        return last == self._tower.num_layers

    def rows(self, run: TorchRun) -> Tensor:
        with torch.inference_mode():
            return self._tower.finish(run.state)

    def _on_device(self, pixels: Pixels) -> Tensor:
        """A copy: the arena's pixels are read-only and leave with the answer."""
        copy = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        np.copyto(copy.numpy(), pixels)
        return copy.to(self._device, non_blocking=True)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
