"""How many GPUs there are, asked of the driver itself: no torch, no CUDA context."""

from __future__ import annotations

import ctypes


def num_cuda_devices() -> int:
    """The number of visible CUDA devices; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value
