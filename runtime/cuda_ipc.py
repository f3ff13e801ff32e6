"""CudaSlab: an EmbeddingSlab in device memory that other processes read in place.

One cudaMalloc outside torch's caching allocator, exported once as a CUDA IPC handle, opened once by each reader on the
reader's own device (opening it on the producer's device would build a second context there of about 500 MiB).  Ordering
between processes is the host's: EmbedsReady is sent once the host has seen the encode complete.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from vlmrt.runtime.errors import StartupError
from vlmrt.runtime.messages import CudaSlabExport
from vlmrt.runtime.slab import SlabDtype, slab_bytes

if TYPE_CHECKING:
    import torch

_BLOCK_BYTES = 2 << 20  # a smaller cudaMalloc may share its block, and the handle then means the whole block
_DLPACK_CUDA = 2  # kDLCUDA
_DLPACK_TYPES: dict[SlabDtype, tuple[int, int]] = {"float32": (2, 32), "float16": (2, 16), "bfloat16": (4, 16)}


class CudaSlab:
    """Created by a ViT with `create`, opened by LLM ranks with `open`."""

    def __init__(self, address: int, device: int, export: CudaSlabExport, *, is_owner: bool) -> None:
        self.num_pages = export.num_pages
        self.page_rows = export.page_rows
        self.width = export.width
        self.dtype = export.dtype
        self._address = address
        self._device = device  # where this process works; the memory lies on export.device
        self._export = export
        self._is_owner = is_owner
        self._tensor: torch.Tensor | None = None

    @classmethod
    def create(cls, device: int, *, num_pages: int, page_rows: int, width: int, dtype: SlabDtype) -> CudaSlab:
        """Allocate on this device.  Raises StartupError naming --embedding-cache-gib if there is no room."""
        cudart = _cudart()
        num_bytes = -(-slab_bytes(num_pages, page_rows, width, dtype) // _BLOCK_BYTES) * _BLOCK_BYTES
        _call(cudart, "cudaSetDevice", device)
        try:
            address = int(_call(cudart, "cudaMalloc", num_bytes))
        except CudaError as error:
            raise StartupError(f"no {num_bytes >> 20} MiB for embeddings on GPU {device}: {error}; "
                               "lower --embedding-cache-gib") from error  # fmt: skip
        try:
            handle = _call(cudart, "cudaIpcGetMemHandle", address)
            export = CudaSlabExport(bytes(handle.reserved), device, num_pages, page_rows, width, dtype)
        except Exception:
            _call(cudart, "cudaFree", address)
            raise
        return cls(address, device, export, is_owner=True)

    @classmethod
    def open(cls, device: int, export: CudaSlabExport) -> CudaSlab:
        """Map a ViT's slab for kernels on this process's own device; peer access is enabled lazily by the driver.

        Raises KeyError if the handle cannot be opened: that incarnation is gone.
        """
        cudart = _cudart()
        _call(cudart, "cudaSetDevice", device)
        handle = cudart.cudaIpcMemHandle_t()
        handle.reserved = export.handle
        try:
            address = int(_call(cudart, "cudaIpcOpenMemHandle", handle, cudart.cudaIpcMemLazyEnablePeerAccess))
        except CudaError as error:
            raise KeyError(f"slab on GPU {export.device}: {error}") from error
        return cls(address, device, export, is_owner=False)

    def tensor(self) -> torch.Tensor:
        """A view of the whole slab, [num_pages * page_rows, width], usable by kernels on this process's device."""
        assert self._address != 0, "the slab is closed"
        if self._tensor is None:
            shape = (self.num_pages * self.page_rows, self.width)
            self._tensor = tensor_at(self._address, shape, self.dtype, _DLPACK_CUDA, self._device)
        return self._tensor

    def export(self) -> CudaSlabExport:
        return self._export

    def close(self) -> None:
        """Free it (owner) or unmap it (reader) after the device has finished what it was given; twice is once."""
        if self._address == 0:
            return
        cudart = _cudart()
        address, self._address, self._tensor = self._address, 0, None
        _call(cudart, "cudaSetDevice", self._device)
        _call(cudart, "cudaDeviceSynchronize")
        _call(cudart, "cudaFree" if self._is_owner else "cudaIpcCloseMemHandle", address)


class _DLTensor(ctypes.Structure):
    """DLManagedTensor of the DLPack ABI (version 0, as PyCapsule "dltensor" carries it)."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype_code", ctypes.c_uint8),
        ("dtype_bits", ctypes.c_uint8),
        ("dtype_lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.c_void_p),  # none: row-major
        ("byte_offset", ctypes.c_uint64),
        ("manager_context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),  # none: the memory is the slab's
    )


def tensor_at(address: int, shape: tuple[int, int], dtype: SlabDtype, device_type: int, device_id: int) -> torch.Tensor:
    """A tensor over memory that is not torch's.

    DLPack, since it states the device: by __cuda_array_interface__ torch asks the driver, which names the device that
    holds peer memory instead of the one that mapped it, and `as_tensor` would then copy the slab.
    """
    from torch.utils.dlpack import from_dlpack

    code, bits = _DLPACK_TYPES[dtype]
    sizes = (ctypes.c_int64 * 2)(*shape)
    described = _DLTensor(address, device_type, device_id, 2, code, bits, 1, sizes, None, 0, None, None)
    python = ctypes.pythonapi
    python.Py_IncRef(ctypes.py_object(described))  # for good: torch reads it once more when the tensor goes
    python.PyCapsule_New.restype = ctypes.py_object
    python.PyCapsule_New.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    tensor: torch.Tensor = from_dlpack(python.PyCapsule_New(ctypes.addressof(described), b"dltensor", None))
    return tensor


class CudaError(RuntimeError):
    """A call of the CUDA runtime failed."""


def _cudart() -> Any:
    """cuda.bindings.runtime, which torch's CUDA builds depend on.  Raises StartupError without it."""
    try:
        from cuda.bindings import runtime  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise StartupError("--device cuda needs a CUDA build of torch (cuda-bindings is missing)") from error
    return runtime


def _call(cudart: Any, function: str, *arguments: Any) -> Any:
    """The result of a runtime call, without its status.  Raises CudaError."""
    status, *results = getattr(cudart, function)(*arguments)
    if status != cudart.cudaError_t.cudaSuccess:
        _, name = cudart.cudaGetErrorName(status)
        raise CudaError(f"{function}: {name.decode() if isinstance(name, bytes) else name}")
    return results[0] if results else None
