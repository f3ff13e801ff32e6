"""RMSNorm on a CPU, in float32."""

import math

import numpy as np
import torch
from torch import Tensor

from vlmrt.kernels.compiled.jit import Floats, called, compiled, floats


def rms_norm_on_cpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.contiguous()
    width = x.shape[-1]
    out = torch.empty_like(x)
    if x.numel():
        _rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // width, width, eps)
    return out


def add_rms_norm_on_cpu(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    assert x.shape == residual.shape
    x, residual = x.contiguous(), residual.contiguous()
    width = x.shape[-1]
    out, new_residual = torch.empty_like(x), torch.empty_like(x)
    if x.numel():
        addresses = (x.data_ptr(), residual.data_ptr(), weight.data_ptr(), out.data_ptr(), new_residual.data_ptr())
        _add_rms_norm(*addresses, x.numel() // width, width, eps)
    return out, new_residual


@called
def _norm(row: Floats, weight: Floats, out: Floats, width: int, eps: float) -> None:
    total = np.float32(0)
    for i in range(width):
        total += row[i] * row[i]
    scale = np.float32(1 / math.sqrt(total / width + eps))
    for i in range(width):
        out[i] = row[i] * scale * weight[i]


@compiled(5, 1)
def _rms_norm(x: int, weight: int, out: int, num_rows: int, width: int, eps: float) -> None:
    for row in range(num_rows):
        _norm(floats(x, row * width), floats(weight, 0), floats(out, row * width), width, eps)


@compiled(7, 1)
def _add_rms_norm(
    x: int, residual: int, weight: int, out: int, new_residual: int, num_rows: int, width: int, eps: float
) -> None:
    for row in range(num_rows):
        first, second, total = floats(x, row * width), floats(residual, row * width), floats(new_residual, row * width)
        for i in range(width):
            total[i] = first[i] + second[i]
        _norm(total, floats(weight, 0), floats(out, row * width), width, eps)
