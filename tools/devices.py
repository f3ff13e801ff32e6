"""How many GPUs there are, asked of the driver itself: no torch, no CUDA context."""

from __future__ import annotations

import ctypes

from vlmrt.actors.vit.engines.tensorrt_flavour import Gpu

CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # of CUdevice_attribute
MAX_NAME_BYTES = 256


def num_cuda_devices() -> int:
    """The number of visible CUDA devices; 0 without a driver."""
    driver = _driver()
    count = ctypes.c_int(0)
    if driver is None or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def cuda_gpu(index: int) -> Gpu:
    """Which GPU the visible CUDA device of this index is.  Raises: OSError if the driver does not say."""
    driver = _driver()
    device, major, minor = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)
    name = ctypes.create_string_buffer(MAX_NAME_BYTES)
    if (
        driver is None
        or driver.cuDeviceGet(ctypes.byref(device), index) != 0
        or driver.cuDeviceGetName(name, MAX_NAME_BYTES, device) != 0
        or driver.cuDeviceGetAttribute(ctypes.byref(major), CAPABILITY_MAJOR, device) != 0
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), CAPABILITY_MINOR, device) != 0
    ):
        raise OSError(f"the CUDA driver does not say what device {index} is")
    return Gpu(name.value.decode(), (major.value, minor.value))


def _driver() -> ctypes.CDLL | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return driver if driver.cuInit(0) == 0 else None
