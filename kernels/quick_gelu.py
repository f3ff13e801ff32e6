"""The sigmoid form of GELU that CLIP's descendants are trained with."""

import torch
from torch import Tensor

from vlmrt.kernels.tracing import is_traced


def quick_gelu_reference(x: Tensor, bias: Tensor | None = None) -> Tensor:
    if bias is not None:
        x = x + bias
    return x * torch.sigmoid(1.702 * x)


def quick_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x * sigmoid(1.702 x); bias, the one of the projection that x comes from, is added to x first.

    On a GPU computed in float32 and rounded once.
    Shapes: x [..., D], bias [D] or None -> [..., D], same dtype.   Source: arXiv:1606.08415, section 2.
    """
    if x.device.type == "cuda":
        from vlmrt.kernels.triton.quick_gelu import quick_gelu_triton

        return quick_gelu_triton(x, bias)
    if is_traced():  # as on a GPU
        return quick_gelu_reference(x.float(), bias).to(x.dtype)
    return quick_gelu_reference(x, bias)
