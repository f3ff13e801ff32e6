"""LayerNorm of rows, with or without the addition of one shift to all of them before it."""

import torch.nn.functional as F
from torch import Tensor


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float, shift: Tensor | None = None) -> Tensor:
    shifted = x if shift is None else x + shift
    weight, bias = weight.to(shifted.dtype), bias.to(shifted.dtype)
    return F.layer_norm(shifted, x.shape[-1:], weight, bias, eps).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, shift: Tensor | None = None) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension, in float32 and rounded once.

    shift is added to every row of x first.
    Shapes: x [..., D], weight and bias [D], shift float32 [D] or None -> [..., D], x's dtype.
    Source: arXiv:1607.06450.
    """
    if x.device.type == "cuda":
        from vlmrt.kernels.triton.layer_norm import layer_norm_triton

        return layer_norm_triton(x, weight, bias, eps, shift)
    return layer_norm_reference(x, weight, bias, eps, shift)
