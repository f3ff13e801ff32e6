"""CudaSlab: an EmbeddingSlab in device memory that other processes read in place.

One cudaMalloc outside torch's caching allocator, exported once as a CUDA IPC handle, opened once by each reader on the
reader's own device (opening it on the producer's device would build a second context there of about 500 MiB).  Ordering
between processes is the host's: EmbedsReady is sent once the host has seen the encode complete.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlmrt.runtime.errors import StartupError
from vlmrt.runtime.messages import CudaSlabExport
from vlmrt.runtime.slab import SlabDtype, slab_bytes

if TYPE_CHECKING:
    import torch

# what __cuda_array_interface__ can say; bfloat16 has no code of its own there and goes as 16-bit integers
_TYPESTR: dict[SlabDtype, str] = {"float32": "<f4", "float16": "<f2", "bfloat16": "<i2"}


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

    @classmethod
    def create(cls, device: int, *, num_pages: int, page_rows: int, width: int, dtype: SlabDtype) -> CudaSlab:
        """Allocate on this device.  Raises StartupError naming --embedding-cache-gib if there is no room."""
        cudart = _cudart()
        num_bytes = slab_bytes(num_pages, page_rows, width, dtype)
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
        import torch

        flat = torch.as_tensor(_DeviceArray(self), device=f"cuda:{self._device}")
        if self.dtype == "bfloat16":
            flat = flat.view(torch.bfloat16)
        return flat

    @property
    def address(self) -> int:
        return self._address

    def export(self) -> CudaSlabExport:
        return self._export

    def close(self) -> None:
        """Free it (owner) or unmap it (reader) after the device has finished what it was given; twice is once."""
        if self._address == 0:
            return
        cudart = _cudart()
        address, self._address = self._address, 0
        _call(cudart, "cudaSetDevice", self._device)
        _call(cudart, "cudaDeviceSynchronize")
        _call(cudart, "cudaFree" if self._is_owner else "cudaIpcCloseMemHandle", address)


class _DeviceArray:
    """What torch.as_tensor reads; it keeps the slab alive as long as the tensor."""

    def __init__(self, slab: CudaSlab) -> None:
        self._slab = slab
        self.__cuda_array_interface__ = {
            "shape": (slab.num_pages * slab.page_rows, slab.width),
            "typestr": _TYPESTR[slab.dtype],
            "data": (slab.address, False),
            "strides": None,
            "version": 3,
            "stream": None,
        }


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
