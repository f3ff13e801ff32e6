"""The vision tower in torch: the engine that is always there."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmrt.actors.models.config import ImageProcessing
from vlmrt.actors.models.vision_tower import VisionState, VisionTower
from vlmrt.actors.vit.engines.engine import GridThw, Pixels, pixels_on
from vlmrt.actors.vit.engines.tower_graphs import Recorded, TowerGraphs
from vlmrt.kernels.patchify import patchify


class Mark:
    """A point in the order of the device's work: when it was reached, and a wait for it."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.Event(device=device, enable_timing=True) if device.type == "cuda" else None
        self._reached_s = time.perf_counter()  # on a CPU what was called is done
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: Mark) -> float:
        """Both have been reached."""
        if self._event is None or earlier._event is None:
            return self._reached_s - earlier._reached_s
        return float(earlier._event.elapsed_time(self._event)) / 1e3


@dataclass(slots=True)
class TorchRun:
    state: VisionState
    recorded: Recorded | None  # the layers that it goes through; None: launched one by one
    layer_s: float  # as last measured
    reached: Mark  # the end of the last quantum that was waited for
    in_flight: deque[tuple[int, Mark]] = field(default_factory=deque)  # layers and end of each quantum after it


class TorchEngine:
    """A VisionEngine that keeps two half quanta on the device: one runs while the host prepares the next.

    Waiting for a half quantum costs no gap, since the other half is queued behind it. Batches that the graphs hold go
    through them: one by one, the launches of Qwen2-VL's layers took a host 25 ms where an H100 needs 2 for the products
    of 1,024 patches.
    """

    def __init__(
        self,
        tower: VisionTower,
        processing: ImageProcessing,
        device: torch.device,
        quantum_s: float,
        graphs: TowerGraphs | None = None,
    ) -> None:
        """graphs: of this tower."""
        self._tower = tower
        self._graphs = graphs
        self._processing = processing
        self._still = msgspec.structs.replace(processing, temporal_patch_size=1)
        self._device = device
        self._quantum_s = quantum_s
        self._patch_layer_s = quantum_s  # of the last quantum measured; at first so long that one layer is tried
        with torch.inference_mode():
            self._patch_embed_still = tower.patch_embed_still()

    def prepare(self, images: Sequence[Pixels], grids: Sequence[GridThw]) -> TorchRun:
        with torch.inference_mode():
            frames = pixels_on(self._device, images)
            embedded = [self._embed(list(run), still) for still, run in groupby(frames, lambda image: len(image) == 1)]
            state = self._tower.lay_out(embedded[0] if len(embedded) == 1 else torch.cat(embedded), grids)
        recorded = None if self._graphs is None else self._graphs.find(state)
        return TorchRun(state, recorded, self._patch_layer_s * len(state.x), Mark(self._device))

    def run_quantum(self, run: TorchRun) -> bool:
        first = run.state.next_layer
        num_layers = max(1, int(self._quantum_s / 2 / run.layer_s))
        last = min(first + num_layers, self._tower.num_layers)
        with torch.inference_mode():
            if run.recorded is None:
                self._tower.run_layers(run.state, first, last)
            else:
                run.recorded.run(run.state, last, self._tower.num_layers)
        last = run.state.next_layer
        if last == self._tower.num_layers:
            return True  # without a wait: the next batch is prepared behind these layers
        run.in_flight.append((last - first, Mark(self._device)))
        keep = 1 if (last - first) * run.layer_s <= self._quantum_s / 2 else 0
        while len(run.in_flight) > keep:
            self._wait_for_oldest(run)
        return False

    def rows(self, run: TorchRun) -> Tensor:
        with torch.inference_mode():
            return self._tower.finish(run.state)

    def _wait_for_oldest(self, run: TorchRun) -> None:
        num_layers, end = run.in_flight.popleft()
        end.wait()
        run.layer_s = max(end.seconds_since(run.reached) / num_layers, 1e-6)
        run.reached = end
        self._patch_layer_s = run.layer_s / len(run.state.x)

    def _embed(self, frames: Sequence[Tensor], still: bool) -> Tensor:
        """Still images take the summed kernel, whose patches hold their one frame once."""
        dtype = self._patch_embed_still.dtype
        if still:
            return F.linear(patchify(frames, self._still, dtype), self._patch_embed_still)
        return self._tower.embed(patchify(frames, self._processing, dtype))
