"""The projection is as exact as torch's, whichever way round it is taken."""

from __future__ import annotations

import pytest
import torch

from vlmrt.kernels.linear import MAX_FEW_ROWS, linear, linear_reference


@pytest.mark.parametrize("rows", [0, 1, 2, 7, MAX_FEW_ROWS, MAX_FEW_ROWS + 1])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_is_as_exact_as_eager(rows: int, has_bias: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 96, generator=generator).to(dtype)
    weight = torch.randn(130, 96, generator=generator).to(dtype)
    bias = torch.randn(130, generator=generator).to(dtype) if has_bias else None
    exact = linear_reference(x.double(), weight.double(), None if bias is None else bias.double())
    found = linear(x, weight, bias)
    assert found.shape == (rows, 130)
    assert found.dtype == dtype
    assert found.is_contiguous()
    if rows:
        eager_error, error = ((f(x, weight, bias) - exact).abs().max() for f in (linear_reference, linear))
        assert error <= 2 * eager_error + torch.finfo(dtype).eps / 2 * exact.abs().max()
