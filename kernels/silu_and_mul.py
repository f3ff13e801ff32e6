"""The SwiGLU gate of a fused gate and up projection."""

import torch.nn.functional as F
from torch import Tensor


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
    return silu_and_mul_reference(gate_up)
