"""The measure of a kernel: no further from float64 than twice what eager torch is, and half a unit of rounding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def assert_as_exact_as_eager(fast: Callable[..., Tensor], reference: Callable[..., Tensor], *tensors: Tensor) -> None:
    """tensors: floating ones are widened for the exact result; integer ones stay as they are."""
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]
    exact = reference(*wide)
    dtype = next(tensor.dtype for tensor in tensors if tensor.is_floating_point())
    eager_error, fast_error = ((run(*tensors) - exact).abs().max() for run in (reference, fast))
    assert fast_error <= 2 * eager_error + torch.finfo(dtype).eps / 2 * exact.abs().max()
    assert fast_error <= 64 * torch.finfo(dtype).eps * exact.abs().max().clamp(min=1)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)
