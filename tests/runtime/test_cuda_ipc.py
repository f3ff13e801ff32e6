"""CudaSlab against a fake CUDA runtime over host memory; the same hand-over on a real GPU where there is one."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from enum import IntEnum
from typing import Any

import msgspec
import pytest
import torch

from tests.runtime.services import ROOT
from vlmrt.runtime import cuda_ipc
from vlmrt.runtime.cuda_ipc import CudaSlab, tensor_at
from vlmrt.runtime.errors import StartupError
from vlmrt.runtime.messages import CudaSlabExport
from vlmrt.runtime.slab import SlabDtype

CPU = 1  # kDLCPU


class FakeHandle:
    reserved = b""


class FakeRuntime:
    """cuda.bindings.runtime over host memory: notes calls, hands out addresses, refuses what it does not know."""

    class cudaError_t(IntEnum):
        cudaSuccess = 0
        cudaErrorMemoryAllocation = 2
        cudaErrorMapBufferObjectFailed = 205

    cudaIpcMemHandle_t = FakeHandle
    cudaIpcMemLazyEnablePeerAccess = 1

    def __init__(self, room_bytes: int) -> None:
        self.room_bytes = room_bytes
        self.memory: dict[int, Any] = {}
        self.calls: list[str] = []

    def _ok(self, call: str, *results: object) -> tuple[object, ...]:
        self.calls.append(call)
        return (self.cudaError_t.cudaSuccess, *results)

    def cudaGetErrorName(self, error: IntEnum) -> tuple[IntEnum, bytes]:
        return self.cudaError_t.cudaSuccess, error.name.encode()

    def cudaSetDevice(self, device: int) -> tuple[object, ...]:
        return self._ok(f"set {device}")

    def cudaMalloc(self, num_bytes: int) -> tuple[object, ...]:
        if num_bytes > self.room_bytes:
            return self.cudaError_t.cudaErrorMemoryAllocation, 0
        block = ctypes.create_string_buffer(num_bytes)
        self.memory[ctypes.addressof(block)] = block
        return self._ok(f"malloc {num_bytes}", ctypes.addressof(block))

    def cudaIpcGetMemHandle(self, address: int) -> tuple[object, ...]:
        handle = FakeHandle()
        handle.reserved = address.to_bytes(64, "little")
        return self._ok("export", handle)

    def cudaIpcOpenMemHandle(self, handle: FakeHandle, flags: int) -> tuple[object, ...]:
        address = int.from_bytes(handle.reserved, "little")
        if address not in self.memory:
            return self.cudaError_t.cudaErrorMapBufferObjectFailed, 0
        return self._ok(f"open {flags}", address)

    def cudaDeviceSynchronize(self) -> tuple[object, ...]:
        return self._ok("synchronize")

    def cudaFree(self, address: int) -> tuple[object, ...]:
        del self.memory[address]
        return self._ok("free")

    def cudaIpcCloseMemHandle(self, address: int) -> tuple[object, ...]:
        return self._ok("close")


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    fake = FakeRuntime(room_bytes=8 << 20)
    monkeypatch.setattr(cuda_ipc, "_cudart", lambda: fake)
    monkeypatch.setattr(cuda_ipc, "_DLPACK_CUDA", CPU)
    return fake


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_reader_sees_in_place_what_the_owner_wrote(dtype: SlabDtype, runtime: FakeRuntime) -> None:
    slab = CudaSlab.create(0, num_pages=4, page_rows=2, width=3, dtype=dtype)
    opened = CudaSlab.open(0, slab.export())
    slab.tensor()[:] = torch.arange(24).view(8, 3)
    assert opened.tensor().tolist() == torch.arange(24).view(8, 3).tolist()
    assert opened.tensor().dtype == getattr(torch, dtype)
    opened.close()
    opened.close()
    slab.close()
    expected = ["set 0", f"malloc {2 << 20}", "export", "set 0", "open 1"]
    assert runtime.calls == [*expected, "set 0", "synchronize", "close", "set 0", "synchronize", "free"]
    assert runtime.memory == {}


def test_too_little_memory_names_the_flag(runtime: FakeRuntime) -> None:
    with pytest.raises(StartupError, match="--embedding-cache-gib"):
        CudaSlab.create(0, num_pages=1 << 20, page_rows=16, width=1024, dtype="bfloat16")


def test_a_slab_that_is_gone_is_a_key_error(runtime: FakeRuntime) -> None:
    slab = CudaSlab.create(1, num_pages=1, page_rows=2, width=3, dtype="float32")
    export = slab.export()
    slab.close()
    with pytest.raises(KeyError, match="slab on GPU 1: cudaIpcOpenMemHandle: cudaErrorMapBufferObjectFailed"):
        CudaSlab.open(0, export)


def test_a_tensor_over_foreign_memory_is_a_view_of_it() -> None:
    block = (ctypes.c_float * 6)(*range(6))
    tensor = tensor_at(ctypes.addressof(block), (2, 3), "float32", CPU, 0)
    assert tensor.data_ptr() == ctypes.addressof(block)
    tensor[1, 2] = 42
    assert block[5] == 42
    assert tensor.is_contiguous()


READER = """
import sys, msgspec, torch
from vlmrt.runtime.cuda_ipc import CudaSlab
from vlmrt.runtime.messages import CudaSlabExport
slab = CudaSlab.open(0, msgspec.msgpack.decode(sys.stdin.buffer.read(), type=CudaSlabExport))
print(slab.tensor().float().sum().item(), slab.tensor().device, flush=True)
slab.close()
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_another_process_reads_the_rows_in_device_memory() -> None:
    slab = CudaSlab.create(0, num_pages=64, page_rows=16, width=1536, dtype="bfloat16")
    slab.tensor().fill_(1.0)
    torch.cuda.synchronize()
    export: CudaSlabExport = slab.export()
    ran = subprocess.run(
        [sys.executable, "-c", READER], input=msgspec.msgpack.encode(export), capture_output=True, cwd=ROOT, check=True
    )
    assert ran.stdout.decode().split() == [str(float(64 * 16 * 1536)), "cuda:0"]
    slab.close()
