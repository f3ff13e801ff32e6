"""RMSNorm of rows, with or without the residual addition before it."""

import torch.nn.functional as F
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x**2) + eps) * weight over the last dimension, computed in float32 and rounded once.

    Shapes: x [..., D], weight [D] -> [..., D], same dtype.   Source: arXiv:1910.07467.
    """
    if x.device.type == "cuda":
        from vlmrt.kernels.triton.rms_norm import rms_norm_triton

        return rms_norm_triton(x, weight, eps)
    return rms_norm_reference(x, weight, eps)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    new_residual = x + residual
    return rms_norm_reference(new_residual, weight, eps), new_residual


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual): what follows every projection back into the residual stream.

    The sum is rounded to the dtype before it is normalised.
    Shapes: x and residual [..., D], weight [D] -> two of [..., D], same dtype.
    """
    if x.device.type == "cuda":
        from vlmrt.kernels.triton.rms_norm import add_rms_norm_triton

        return add_rms_norm_triton(x, residual, weight, eps)
    return add_rms_norm_reference(x, residual, weight, eps)
