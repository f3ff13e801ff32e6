"""A projection and the quick GELU of it."""

import torch
from torch import Tensor

from vlmrt.kernels.linear import linear, linear_reference
from vlmrt.kernels.quick_gelu import quick_gelu, quick_gelu_reference

MIN_FUSED_ROWS = 1024  # below, cuBLAS and a kernel for the activation


def quick_gelu_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return quick_gelu_reference(linear_reference(x, weight, bias))


def quick_gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y * sigmoid(1.702 y) of y = x @ weight.T + bias.

    Shapes: x [T, K], weight [N, K], bias [N] or None -> [T, N], same dtype.

    On a Hopper GPU, MIN_FUSED_ROWS and more of float16 or bfloat16 with a bias take one kernel: y stays in float32, and
    only the result is rounded. Elsewhere y is rounded too.
    """
    if bias is not None and _is_fused(x, weight, bias):
        from vlmrt.kernels.triton.gelu_linear import gelu_linear

        return gelu_linear(x, weight, bias)
    return quick_gelu(linear(x, weight, bias))


def _is_fused(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """A tensor descriptor asks for rows that start at multiples of 16 bytes."""
    return (
        x.device.type == "cuda"
        and x.dim() == 2
        and x.shape[0] >= MIN_FUSED_ROWS
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.dtype == weight.dtype == bias.dtype
        and x.shape[1] % 8 == 0
        and weight.shape[0] % 8 == 0
        and all(tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 for tensor in (x, weight))
        and bias.is_contiguous()
        and torch.cuda.get_device_capability(x.device) == (9, 0)
    )
