"""Rotary position embedding of heads."""

import torch
from torch import Tensor


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    cos, sin = cos[:, None, :half], sin[:, None, :half]
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each head by its token's angles: x * cos + rotate_half(x) * sin, computed in the wider dtype.

    Shapes: x [T, H, D], cos and sin [T, D] with both halves alike -> [T, H, D], same dtype as x.
    Source: arXiv:2104.09864, with the pairs (i, i + D/2).
    """
    return rotate_reference(x, cos, sin)
