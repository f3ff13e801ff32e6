"""Rotary position embedding of heads."""

import torch
from torch import Tensor


def rotary_tables(angles: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) of each token's angles as rotate takes them: sin is negated in its first half.

    Shapes: float32 [T, D/2] -> two float32 [T, D].
    """
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    swapped = x.roll(x.shape[-1] // 2, -1)  # the sign that this half-turn lacks is in sin
    return torch.addcmul(x * cos.unsqueeze(1), swapped, sin.unsqueeze(1)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of each head by its token's angles, computed in the wider dtype.

    Shapes: x [T, H, D], cos and sin [T, D] from rotary_tables -> [T, H, D], same dtype as x.
    Source: arXiv:2104.09864.
    """
    if x.device.type == "cpu" and x.dtype == cos.dtype == sin.dtype == torch.float32:
        from vlmrt.kernels.compiled.rotary import rotate_on_cpu

        return rotate_on_cpu(x, cos, sin)
    return rotate_reference(x, cos, sin)
