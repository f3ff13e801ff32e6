"""Muon for matrices: momentum made orthogonal by Newton-Schulz steps, scaled to the size of AdamW's updates."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def orthogonalised(x: Tensor) -> Tensor:
    """About the nearest matrix with all singular values near 1: [B, m, n] -> same.   Source: Muon (Jordan et al.)."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """The optimizer; matrices of one shape are updated as one batch."""

    def __init__(self, weights: list[nn.Parameter], weight_decay: float, momentum: float = 0.95) -> None:
        self._weight_decay, self._momentum = weight_decay, momentum
        self._groups: dict[tuple[int, int], list[nn.Parameter]] = {}
        for weight in weights:
            rows, columns = weight.flatten(1).shape
            self._groups.setdefault((rows, columns), []).append(weight)
        self._momenta = {
            shape: torch.zeros(len(group), *shape, device=group[0].device) for shape, group in self._groups.items()
        }

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Updates every matrix from its gradient."""
        for shape, group in self._groups.items():
            gradients = torch.stack([_gradient(weight).flatten(1) for weight in group])
            momentum = self._momenta[shape].mul_(self._momentum).add_(gradients)
            direction = gradients + self._momentum * momentum
            update = orthogonalised(direction.bfloat16() if direction.is_cuda else direction).float()
            update *= 0.2 * max(shape) ** 0.5
            torch._foreach_mul_(list(group), 1 - learning_rate * self._weight_decay)
            steps = [change.view_as(weight) for weight, change in zip(group, update, strict=True)]
            torch._foreach_add_(list(group), steps, alpha=-learning_rate)


def _gradient(weight: nn.Parameter) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad
