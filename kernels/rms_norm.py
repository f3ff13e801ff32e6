"""RMSNorm of rows, with or without an addition before it: of a residual, or of one shift to all rows."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmrt.kernels.tracing import is_traced


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, shift: Tensor | None = None) -> Tensor:
    shifted = x if shift is None else x + shift
    return F.rms_norm(shifted, (x.shape[-1],), weight.to(shifted.dtype), eps).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, shift: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x**2) + eps) * weight over the last dimension, computed in float32 and rounded once.

    shift is added to every row of x first. It must not be written by the kernels of the step, as weight is not: both
    are read before they have ended.
    Shapes: x [..., D], weight [D], shift float32 [D] or None -> [..., D], x's dtype.   Source: arXiv:1910.07467.
    """
    if x.device.type == "cuda":
        from vlmrt.kernels.triton.rms_norm import rms_norm_triton

        return rms_norm_triton(x, weight, eps, shift)
    is_float32 = x.dtype == weight.dtype == torch.float32 and (shift is None or shift.dtype == torch.float32)
    if x.device.type == "cpu" and is_float32 and not is_traced():
        from vlmrt.kernels.compiled.rms_norm import rms_norm_on_cpu

        return rms_norm_on_cpu(x if shift is None else x + shift, weight, eps)
    return rms_norm_reference(x, weight, eps, shift)


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
    if x.device.type == "cpu" and x.dtype == residual.dtype == weight.dtype == torch.float32:
        from vlmrt.kernels.compiled.rms_norm import add_rms_norm_on_cpu

        return add_rms_norm_on_cpu(x, residual, weight, eps)
    return add_rms_norm_reference(x, residual, weight, eps)
