"""The projection is as exact as torch's, whichever way round it is taken and whichever kernel serves it."""

from __future__ import annotations

import secrets

import pytest
import torch
from torch import Tensor

from tests.kernels.exactness import normal
from tests.kernels.places import ON_GPU, PLACES
from vlmrt.kernels.linear import (
    MAX_FEW_ROWS,
    gated_linear,
    gated_linear_reference,
    is_streamed,
    linear,
    linear_reference,
)
from vlmrt.kernels.rms_norm import add_rms_norm
from vlmrt.kernels.triton.decode_linear import MAX_ROWS, MAX_VECTOR_ROWS, Tiling, decode_linear

EPS = 1e-6
ROWS = (1, 2, 3, 8, 17, MAX_ROWS)
SHAPES = ((38, 144), (21, 1104), (70, 100))  # no N and K are multiples of a tile
STREAMED = [  # every row count with every shape, and each of both with and without a gate
    (rows, *shape, (row + column) % 2 == 1) for row, rows in enumerate(ROWS) for column, shape in enumerate(SHAPES)
]
PLAIN_SHAPES = {"2b": ((2048, 1536), (1536, 1536), (1536, 8960)), "7b": ((4608, 3584), (3584, 3584), (3584, 18944))}
GATED_SHAPES = {"2b": (8960, 1536), "7b": (18944, 3584)}
HEADS = {"2b": (151936, 1536), "7b": (152064, 3584)}


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


def assert_exact(found: Tensor, exact: Tensor, num_roundings: int = 1) -> None:
    """Within so many roundings of the largest value; one is what float32 sums rounded once have, and some to spare."""
    assert found.shape == exact.shape
    assert found.is_contiguous()
    error = (found.double() - exact).abs().max()
    unit = max(torch.finfo(found.dtype).eps, 2**-18)  # float32 sums of a thousand products
    assert error <= num_roundings * unit * exact.abs().max()


def fresh(*shape: int, dtype: torch.dtype, device: str, scale: float = 1.0) -> Tensor:
    """A normal tensor of a new seed. Written before what follows is launched, as decode_linear asks of a weight."""
    made = (normal(*shape, seed=secrets.randbits(30)) * scale).to(device, dtype)
    if made.is_cuda:
        torch.cuda.synchronize()
    return made


def small_tiling(rows: int, K: int, dtype: torch.dtype) -> Tiling | None:
    """Where the tiling that is served would take a row at once, or more memory than there is for float32."""
    if rows <= MAX_VECTOR_ROWS:
        return Tiling(8, 512, 2) if K > 1000 else None
    return Tiling(16, 64, 4, 2) if dtype == torch.float32 else None


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize(("rows", "num_columns", "K", "is_gated"), STREAMED)
def test_streamed_product_is_exact_and_twice_the_same(
    rows: int, num_columns: int, K: int, is_gated: bool, device: str, dtype: torch.dtype
) -> None:
    x = fresh(rows, K, dtype=dtype, device=device)
    weight = fresh(num_columns * (2 if is_gated else 1), K, dtype=dtype, device=device, scale=K**-0.5)
    reference = gated_linear_reference if is_gated else linear_reference
    tiling = small_tiling(rows, K, dtype)
    found, again = (decode_linear(x, weight, is_gated=is_gated, tiling=tiling) for _ in range(2))
    assert_exact(found, reference(x.double(), weight.double()))
    assert torch.equal(found, again)


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("order", ["slice", "columns"])
def test_rows_may_lie_apart(rows: int, order: str, device: str, dtype: torch.dtype) -> None:
    wide = fresh(rows, 200, dtype=dtype, device=device)
    x = wide[:, 16:160] if order == "slice" else wide[:, 16:160].t().contiguous().t()
    weight = fresh(40, 144, dtype=dtype, device=device, scale=1 / 12)
    tiling = small_tiling(rows, 144, dtype)
    assert_exact(decode_linear(x, weight, tiling=tiling), linear_reference(x.double(), weight.double()))


def test_a_gated_weight_has_two_halves() -> None:
    with pytest.raises(ValueError, match="weight has 7 rows, expected an even number"):
        gated_linear(normal(1, 4), normal(7, 4))


@pytest.mark.parametrize(
    ("num_columns", "is_gated", "most_rows"),
    [
        (1535, False, 0),
        (1536, False, 2),
        (4608, False, 2),
        (32767, False, 2),
        (152064, False, 64),
        (1535, True, 0),
        (4480, True, 2),
        (8960, True, 16),
        (18944, True, 64),
    ],
)
def test_few_rows_of_many_columns_are_streamed(num_columns: int, is_gated: bool, most_rows: int) -> None:
    served = [rows for rows in range(200) if is_streamed(rows, num_columns, 1536, is_gated)]
    assert served == list(range(1, most_rows + 1))
    assert not any(is_streamed(rows, num_columns, 1544, is_gated) for rows in range(200))


@pytest.mark.parametrize("marked", [pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("model", ["2b", "7b"])
@pytest.mark.parametrize("rows", [1, 2, 3, 16, 17, 64, 65])
def test_products_of_the_models_are_exact(model: str, rows: int, marked: str) -> None:
    make = {"dtype": torch.bfloat16, "device": marked}
    for num_columns, K in (*PLAIN_SHAPES[model], HEADS[model]):
        x, weight = torch.randn(rows, K, **make), torch.randn(num_columns, K, **make) * K**-0.5  # type: ignore[call-overload]
        torch.cuda.synchronize()
        found = linear(x, weight)
        assert_exact(found, torch.cat([x.double() @ part.double().T for part in weight.split(16384)], dim=1))
        assert torch.equal(found, linear(x, weight))
    F, K = GATED_SHAPES[model]
    x, weight = torch.randn(rows, K, **make), torch.randn(2 * F, K, **make) * K**-0.5  # type: ignore[call-overload]
    torch.cuda.synchronize()
    found = gated_linear(x, weight)
    assert_exact(found, gated_linear_reference(x.double(), weight.double()), 2)
    assert torch.equal(found, gated_linear(x, weight))


@pytest.mark.parametrize("marked", [pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("rows", [1, 2, 16])
def test_a_captured_layer_replays_on_new_rows(rows: int, marked: str) -> None:
    """Between and behind kernels without dependent launch too."""
    hidden, F = 1536, 8960
    make = {"dtype": torch.bfloat16, "device": marked}
    x = torch.randn(rows, hidden, **make)  # type: ignore[call-overload]
    norm_weight = torch.randn(hidden, **make)  # type: ignore[call-overload]
    gate_up = torch.randn(2 * F, hidden, **make) * hidden**-0.5  # type: ignore[call-overload]
    down = torch.randn(hidden, F, **make) * F**-0.5  # type: ignore[call-overload]

    def layer(x: Tensor) -> Tensor:
        residual = x
        for _ in range(8):
            x, residual = add_rms_norm(x, residual, norm_weight, EPS)
            x = linear(gated_linear(x, gate_up), down)
            x = x / x.float().square().mean(-1, keepdim=True).sqrt().to(x.dtype)
        return x

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = layer(x)
    for _ in range(5):
        x.normal_()
        graph.replay()
        captured = out.clone()
        assert torch.equal(captured, layer(x))
        assert captured.isfinite().all()
