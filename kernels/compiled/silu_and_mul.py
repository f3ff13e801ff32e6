"""The SwiGLU gate on a CPU, in float32."""

import numpy as np
from torch import Tensor

from vlmrt.kernels.compiled.exponential import exponential
from vlmrt.kernels.compiled.jit import compiled, floats


def silu_and_mul_on_cpu(gate_up: Tensor) -> Tensor:
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    if out.numel():
        _silu_and_mul(gate_up.data_ptr(), out.data_ptr(), out.numel() // width, width)
    return out


@compiled(4)
def _silu_and_mul(gate_up: int, out: int, num_rows: int, width: int) -> None:
    for row in range(num_rows):
        gate = floats(gate_up, 2 * row * width)
        up = floats(gate_up, (2 * row + 1) * width)
        product = floats(out, row * width)
        for i in range(width):
            product[i] = gate[i] / (np.float32(1) + exponential(-gate[i])) * up[i]
