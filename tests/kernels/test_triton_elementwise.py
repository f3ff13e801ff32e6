"""The Triton forms of norms, gates, rotations, merges and patches against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.exactness import assert_as_exact_as_eager, normal
from tests.kernels.places import PLACES
from vlmrt.kernels.layer_norm import add_layer_norm_reference, layer_norm_reference
from vlmrt.kernels.quick_gelu import quick_gelu_reference
from vlmrt.kernels.triton.layer_norm import add_layer_norm_triton, layer_norm_triton
from vlmrt.kernels.triton.quick_gelu import quick_gelu_triton

ROWS = ((1, 8), (7, 33), (3, 1280), (0, 64))


def strided(rows: int, width: int, device: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows that lie further apart than they are wide, as a slice of a fused projection does."""
    return normal(rows, width + 40, dtype=dtype, seed=seed).to(device)[:, 8 : 8 + width]


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize(("rows", "width"), ROWS)
def test_layer_norm_is_as_exact_as_eager(rows: int, width: int, device: str, dtype: torch.dtype) -> None:
    x, residual = (strided(rows, width, device, dtype, seed) for seed in (0, 7))
    weight, bias = (normal(width, dtype=dtype, seed=seed).to(device) for seed in (1, 2))
    normed, total = add_layer_norm_triton(x, residual, weight, bias, 1e-6)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, layer_norm_triton(total, weight, bias, 1e-6))
    if rows:
        assert_as_exact_as_eager(
            lambda a, w, b: layer_norm_triton(a, w, b, 1e-6),
            lambda a, w, b: layer_norm_reference(a, w, b, 1e-6),
            x,
            weight,
            bias,
        )
        assert_as_exact_as_eager(
            lambda a, r, w, b: add_layer_norm_triton(a, r, w, b, 1e-6)[0],
            lambda a, r, w, b: add_layer_norm_reference(a, r, w, b, 1e-6)[0],
            x,
            residual,
            weight,
            bias,
        )


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize(("rows", "width"), ROWS)
@pytest.mark.parametrize("has_bias", [True, False])
def test_quick_gelu_is_as_exact_as_eager(
    rows: int, width: int, has_bias: bool, device: str, dtype: torch.dtype
) -> None:
    x = strided(rows, width, device, dtype)
    bias = (normal(width, dtype=dtype, seed=3).to(device),) if has_bias else ()
    assert quick_gelu_triton(x, *bias).shape == (rows, width)
    if rows:
        assert_as_exact_as_eager(quick_gelu_triton, quick_gelu_reference, x, *bias)
