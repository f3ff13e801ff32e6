"""Host arrays to the device without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 16  # bytes; of every array within a packed copy


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A tensor of an array: the same memory on a CPU, a copy through pinned memory on a GPU.

    The pinned block returns to torch's cache once the copy has run, so the array may be changed at once on a GPU only.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def all_to_device(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """As to_device of each, in one copy."""
    if device.type == "cpu":
        return [to_device(array, device) for array in arrays]
    starts, end = [], 0
    for array in arrays:
        starts.append(end)
        end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    packed = torch.empty(end, dtype=torch.uint8, pin_memory=True)
    host = packed.numpy()
    for start, array in zip(starts, arrays, strict=True):
        host[start : start + array.nbytes].view(array.dtype).reshape(array.shape)[...] = array
    copied = packed.to(device, non_blocking=True)
    return [
        copied[start : start + array.nbytes].view(torch.from_numpy(np.empty(0, array.dtype)).dtype).view(array.shape)
        for start, array in zip(starts, arrays, strict=True)
    ]
