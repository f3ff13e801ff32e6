"""Rotary position embedding: tables of angles, and the rotation of heads by them."""

import torch
from torch import Tensor

from vlmrt.kernels.tracing import is_traced


def rotary_tables(angles: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) of each token's angles as rotate takes them: sin is negated in its first half.

    Shapes: float32 [T, D/2] -> two float32 [T, D].
    """
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def mrope_tables_reference(
    positions: Tensor, inverse_frequency: Tensor, component_of_pair: Tensor
) -> tuple[Tensor, Tensor]:
    return rotary_tables(positions.T.to(inverse_frequency.dtype)[:, component_of_pair] * inverse_frequency)


def mrope_tables(positions: Tensor, inverse_frequency: Tensor, component_of_pair: Tensor) -> tuple[Tensor, Tensor]:
    """rotary_tables of tokens with three positions each, a pair turning with the one that component_of_pair names.

    Shapes: positions int64 [3, T] (time, height, width), inverse_frequency float32 [D/2], component_of_pair int64
    [D/2] of 0, 1 and 2 -> cos, sin float32 [T, D].   Source: arXiv:2409.12191, section 2.1.
    """
    if positions.device.type == "cuda":
        from vlmrt.kernels.triton.rotary import mrope_tables_triton

        return mrope_tables_triton(positions, inverse_frequency, component_of_pair)
    return mrope_tables_reference(positions, inverse_frequency, component_of_pair)


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    swapped = x.roll(x.shape[-1] // 2, -1)  # the sign that this half-turn lacks is in sin
    return torch.addcmul(x * cos.unsqueeze(1), swapped, sin.unsqueeze(1)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of each head by its token's angles, computed in the wider dtype.

    Shapes: x [T, H, D], any strides, cos and sin [T, D] from rotary_tables, contiguous -> [T, H, D], same dtype as x.
    Source: arXiv:2104.09864.
    """
    if x.device.type == "cuda":
        from vlmrt.kernels.triton.rotary import rotate_triton

        return rotate_triton(x, cos, sin)
    is_float32 = x.dtype == cos.dtype == sin.dtype == torch.float32
    if x.device.type == "cpu" and is_float32 and not is_traced():
        from vlmrt.kernels.compiled.rotary import rotate_on_cpu

        return rotate_on_cpu(x, cos, sin)
    return rotate_reference(x, cos, sin)
