"""PyTorch's profiler of one thread: what it launches, and all that runs on the process's device meanwhile."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


class TorchProfiler:
    """`start` and `stop` in the thread that computes.  Perfetto and chrome://tracing read what is written."""

    suffix = ".trace.json.gz"

    def __init__(self, device: str) -> None:
        """Args: `device` is "cpu" or "cuda:<ordinal>"."""
        activities = [ProfilerActivity.CPU]
        if device != "cpu":
            activities.append(ProfilerActivity.CUDA)
        self._device = device
        self._profile = profile(activities=activities, record_shapes=True)

    def start(self) -> None:
        self._profile.start()

    def stop(self, path: Path) -> None:
        if self._device != "cpu":
            torch.cuda.synchronize(self._device)
        self._profile.stop()
        self._profile.export_chrome_trace(str(path))
