"""The vision tower as a TensorRT engine, on torch's tensors and in order with torch's work."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vlmrt.actors.vit.engines.engine_files import TENSORRT_FILE
from vlmrt.actors.vit.engines.tensorrt_build import row_lengths
from vlmrt.actors.vit.engines.tensorrt_flavour import Flavour
from vlmrt.actors.vit.engines.tower_inputs import TowerInputs
from vlmrt.actors.vit.engines.traced_tower import ROWS
from vlmrt.runtime.errors import StartupError


class TensorRtSession:
    """A TowerSession; its profiles are those of row_lengths."""

    def __init__(self, flavour: Flavour, directory: Path, device: torch.device, max_patches: int) -> None:
        """max_patches: that the engine was built for.  Raises: StartupError if it cannot be loaded."""
        trt = flavour.module
        file = directory / TENSORRT_FILE
        self.row_lengths = row_lengths(max_patches)
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._logger = trt.Logger(trt.Logger.WARNING)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(file.read_bytes())
        if self._engine is None:
            raise StartupError(f"{file}: {flavour.name} {flavour.version} cannot load it; see what it says above")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise StartupError(f"{file}: no GPU memory for its activations; lower --kv-cache-gib")
        self._profile = 0

    def run(self, inputs: TowerInputs, rows: Tensor) -> None:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            self._use_profile(self.row_lengths.index(inputs.frame_patch.shape[1]))
            for name, tensor in inputs.named().items():
                if not self._context.set_input_shape(name, tuple(tensor.shape)):
                    raise ValueError(f"{name} of shape {list(tensor.shape)} is outside the engine's profiles")
                self._context.set_tensor_address(name, tensor.data_ptr())
            self._context.set_tensor_address(ROWS, rows.data_ptr())
            if not self._context.execute_async_v3(self._stream.cuda_stream):
                raise RuntimeError("TensorRT did not take the batch")
        finally:  # the memory of inputs and rows is given out anew in the order of the current stream
            current.wait_stream(self._stream)

    def _use_profile(self, profile: int) -> None:
        if profile != self._profile:
            if not self._context.set_optimization_profile_async(profile, self._stream.cuda_stream):
                raise RuntimeError(f"TensorRT did not take profile {profile}")
            self._profile = profile
