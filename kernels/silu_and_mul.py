"""The SwiGLU gate of a fused gate and up projection."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmrt.kernels.tracing import is_traced


def silu_and_mul_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU gate silu(gate) * up; on a GPU computed in float32 and rounded once.

    Shapes: gate_up [..., 2F], gate first -> [..., F], same dtype.   Source: arXiv:2002.05202.
    Raises: ValueError if the last dimension is odd.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up has {gate_up.shape[-1]} columns, expected an even number")
    if gate_up.device.type == "cuda":
        from vlmrt.kernels.triton.silu_and_mul import silu_and_mul_triton

        return silu_and_mul_triton(gate_up)
    if gate_up.device.type == "cpu" and gate_up.dtype == torch.float32 and not is_traced():
        from vlmrt.kernels.compiled.silu_and_mul import silu_and_mul_on_cpu

        return silu_and_mul_on_cpu(gate_up)
    if is_traced():  # as on a GPU
        return silu_and_mul_reference(gate_up.float()).to(gate_up.dtype)
    return silu_and_mul_reference(gate_up)
