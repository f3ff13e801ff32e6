"""The product with quick GELU in its epilogue against float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from tests.kernels.exactness import assert_as_exact_as_eager, normal
from tests.kernels.places import INTERPRETED, ON_GPU
from vlmrt.kernels.gelu_linear import MIN_FUSED_ROWS, quick_gelu_linear, quick_gelu_linear_reference
from vlmrt.kernels.triton.gelu_linear import Tiling, gelu_linear

SMALL_TILINGS = (Tiling(32, 64, 32, 4, 2, group_m=2), Tiling(32, 64, 32, 4, 2, in_halves=True, group_m=2))
SHAPES = ((1, 64, 32), (77, 128, 96), (32, 200, 64), (161, 136, 72))  # T, N, K: whole tiles, then parts of all three
MODEL_ROWS = (1, 127, 1024, 1025, 2049, 7820)


def inputs(num_rows: int, N: int, K: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = normal(num_rows, K), normal(N, K, seed=1) * 2 * K**-0.5, normal(N, seed=2)
    return x.to(device, dtype), weight.to(device, dtype), bias.to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tiling", SMALL_TILINGS, ids=("whole", "in-halves"))
@pytest.mark.parametrize(("num_rows", "N", "K"), SHAPES)
@pytest.mark.parametrize("place", [pytest.param("cpu", marks=INTERPRETED)])
def test_a_tile_at_the_edge_is_as_exact_as_eager(
    num_rows: int, N: int, K: int, tiling: Tiling, dtype: torch.dtype, place: str
) -> None:
    tensors = inputs(num_rows, N, K, dtype, place)
    assert gelu_linear(*tensors, tiling=tiling).shape == (num_rows, N)
    assert_as_exact_as_eager(partial(gelu_linear, tiling=tiling), quick_gelu_linear_reference, *tensors)


@pytest.mark.parametrize("num_rows", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_takes_the_product_and_then_the_activation(num_rows: int, dtype: torch.dtype) -> None:
    tensors = inputs(num_rows, 48, 40, dtype, "cpu")
    found = quick_gelu_linear(*tensors)
    assert found.shape == (num_rows, 48)
    assert found.dtype == dtype
    if num_rows:
        assert_as_exact_as_eager(quick_gelu_linear, quick_gelu_linear_reference, *tensors)


def test_no_rows_launch_nothing() -> None:
    assert gelu_linear(*inputs(0, 48, 40, torch.float16, "cpu")).shape == (0, 48)


@pytest.mark.parametrize("marked", [pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_rows", MODEL_ROWS)
def test_the_tower_s_product_is_as_exact_as_eager(num_rows: int, dtype: torch.dtype, marked: str) -> None:
    tensors = inputs(num_rows, 5120, 1280, dtype, marked)
    for run in (quick_gelu_linear, gelu_linear):
        assert_as_exact_as_eager(run, quick_gelu_linear_reference, *tensors)
        assert torch.equal(run(*tensors), run(*tensors))


@pytest.mark.parametrize("marked", [pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("num_rows", [MIN_FUSED_ROWS, 3001])
def test_a_captured_product_replays_on_new_rows(num_rows: int, marked: str) -> None:
    x, weight, bias = inputs(num_rows, 5120, 1280, torch.bfloat16, marked)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        quick_gelu_linear(x, weight, bias)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = quick_gelu_linear(quick_gelu_linear(x, weight, bias)[:, :1280].contiguous(), weight, bias)
    for _ in range(3):
        x.normal_()
        graph.replay()
        captured = out.clone()
        again = quick_gelu_linear(quick_gelu_linear(x, weight, bias)[:, :1280].contiguous(), weight, bias)
        assert torch.equal(captured, again)
        assert captured.isfinite().all()
