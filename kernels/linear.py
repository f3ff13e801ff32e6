"""A projection: rows times a weight, and a bias."""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_FEW_ROWS = 32


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias.

    Shapes: x [T, K] contiguous, weight [N, K], bias [N] -> [T, N], same dtype.

    On a CPU, for a few rows of float32, the product is taken as weight @ x.T: MKL then goes along the weight, which is
    what there is to read, and shares it out among threads by its rows (the projections of 6 layers of width 256 and 768
    at 8 rows on an AMD EPYC: 5.6 ms instead of 6.5 on one core, 4.2 instead of 6.0 on two).
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and 1 < x.shape[0] <= MAX_FEW_ROWS:
        product = torch.mm(weight, x.t()).t().contiguous()
        return product if bias is None else product.add_(bias)
    return linear_reference(x, weight, bias)
