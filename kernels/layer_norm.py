"""LayerNorm of rows, with or without the residual addition before it."""

import torch.nn.functional as F
from torch import Tensor


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension, in float32 and rounded once.

    Shapes: x [..., D], weight and bias [D] -> [..., D], same dtype.   Source: arXiv:1607.06450.
    """
    if x.device.type == "cuda":
        from vlmrt.kernels.triton.layer_norm import layer_norm_triton

        return layer_norm_triton(x, weight, bias, eps)
    return layer_norm_reference(x, weight, bias, eps)


def add_layer_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    new_residual = x + residual
    return layer_norm_reference(new_residual, weight, bias, eps), new_residual


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + residual), x + residual), the sum rounded to the dtype before it is normalised.

    Shapes: x and residual [..., D], weight and bias [D] -> two of [..., D], same dtype.
    """
    if x.device.type == "cuda":
        from vlmrt.kernels.triton.layer_norm import add_layer_norm_triton

        return add_layer_norm_triton(x, residual, weight, bias, eps)
    return add_layer_norm_reference(x, residual, weight, bias, eps)
