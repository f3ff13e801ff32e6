"""HostBuffer: host memory that a device copies to and from, a cache's second tier."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from vlmrt.runtime.errors import StartupError
from vlmrt.runtime.host_memory import available_gib

if TYPE_CHECKING:
    import torch

GIB = 1 << 30


class HostBuffer:
    """One tensor in host memory, pinned where the device is a GPU; nothing is copied any more when it is dropped."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, option: str) -> None:
        """option: of the command line, which says how large it is.

        Raises: StartupError naming the option if the host has not so much memory, or cannot pin it.
        """
        import torch

        num_bytes = dtype.itemsize
        for size in shape:
            num_bytes *= size
        asked, available = num_bytes / GIB, available_gib()
        if asked > available:
            raise StartupError(
                f"{option}: {asked:.2f} GiB are asked for, and the host has {available:.2f} GiB of memory to give"
            )
        self.tensor = torch.empty(shape, dtype=dtype)
        if device.type == "cuda" and num_bytes:
            torch.cuda.set_device(device)  # the thread's; pinning would make a context on the first GPU otherwise
            # In place: torch.empty(pin_memory=True) takes the next power of two of bytes.
            address = self.tensor.data_ptr()
            error = int(_cudart().cudaHostRegister(address, num_bytes, 0))
            if error:
                raise StartupError(f"{option}: {asked:.2f} GiB of host memory cannot be pinned (CUDA error {error})")
            # The tensor goes after this object, so that no address is given to others while it is pinned.
            weakref.finalize(self, _cudart().cudaHostUnregister, address).atexit = False


def _cudart() -> Any:
    import torch

    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
