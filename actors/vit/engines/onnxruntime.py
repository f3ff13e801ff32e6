"""The vision tower in ONNX Runtime, on tensors where they lie: nothing is copied between it and torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmrt.actors.vit.engines.engine_files import ONNX_FILE
from vlmrt.actors.vit.engines.tower_inputs import TowerInputs
from vlmrt.actors.vit.engines.traced_tower import ROWS
from vlmrt.runtime.errors import StartupError

GIB = 1 << 30
ELEMENT_TYPES = {torch.float32: 1, torch.int64: 7, torch.bfloat16: 16}  # onnx.TensorProto's numbers
OUT_OF_MEMORY = ("Failed to allocate memory", "out of memory")  # in what its errors say
CUDA = "CUDAExecutionProvider"


class OnnxRuntimeSession:
    """A TowerSession of the CPU's or the CUDA execution provider."""

    row_lengths: Sequence[int] = ()

    def __init__(self, directory: Path, device: torch.device, num_threads: int, memory_gib: float) -> None:
        """num_threads: on a CPU; memory_gib: all that the session may take of a GPU.

        Raises: StartupError if the file cannot be loaded, or the provider is not there.
        """
        onnxruntime = quiet_onnxruntime()
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the other processes want the cores
        provider: Any = "CPUExecutionProvider"
        if device.type == "cuda":
            if CUDA not in onnxruntime.get_available_providers():
                raise StartupError(
                    f"--vit-engine onnxruntime: onnxruntime {onnxruntime.__version__} has no CUDA provider; "
                    "pip uninstall onnxruntime, then pip install 'vlmrt[onnx-gpu]'"
                )
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            provider = (CUDA, cuda_options(device, self._stream, memory_gib))
        try:
            self._session = onnxruntime.InferenceSession(directory / ONNX_FILE, options, providers=[provider])
        except Exception as error:  # one of a tree of its own
            raise StartupError(f"{directory / ONNX_FILE}: ONNX Runtime cannot load it: {error}") from None
        if device.type == "cuda" and CUDA not in self._session.get_providers():
            raise StartupError(
                "--vit-engine onnxruntime: its CUDA provider cannot be loaded; --log-level warning says which library "
                "it lacks"
            )
        self._run_options = onnxruntime.RunOptions()
        if self._stream is not None:  # whoever needs the rows waits for the stream
            self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def run(self, inputs: TowerInputs, rows: Tensor) -> None:
        binding = self._session.io_binding()
        for name, tensor in inputs.named().items():
            binding.bind_input(name, *self._place(tensor))
        binding.bind_output(ROWS, *self._place(rows))
        if self._stream is None:
            self._call(binding)
            return
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            self._call(binding)
        finally:  # the memory of inputs and rows is given out anew in the order of the current stream
            current.wait_stream(self._stream)

    def _call(self, binding: Any) -> None:
        """Raises: torch.OutOfMemoryError where the session finds no memory, as torch does."""
        try:
            self._session.run_with_iobinding(binding, self._run_options)
        except Exception as error:  # one of a tree of its own
            if any(text in str(error) for text in OUT_OF_MEMORY):
                raise torch.OutOfMemoryError(str(error)) from None
            raise

    def _place(self, tensor: Tensor) -> tuple[str, int, int, list[int], int]:
        """(kind and number of its device, element type, shape, address)."""
        assert tensor.is_contiguous()
        kind, index = tensor.device.type, tensor.device.index or 0
        return kind, index, ELEMENT_TYPES[tensor.dtype], list(tensor.shape), tensor.data_ptr()


def quiet_onnxruntime() -> Any:
    """The package, which from 1.32 on otherwise reports to its vendor, and keeps files for that."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read at the import
    import onnxruntime

    return onnxruntime


def cuda_options(device: torch.device, stream: torch.cuda.Stream, memory_gib: float) -> dict[str, str]:
    """Of the CUDA provider: work in order with torch's, memory within a limit and in the sizes that are asked for."""
    return {
        "device_id": str(device.index or 0),
        "user_compute_stream": str(stream.cuda_stream),
        "gpu_mem_limit": str(int(memory_gib * GIB)),
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": "0",  # float32 is float32, as in torch
    }
