"""The vision MLP's first product with its quick GELU on a GPU, checked against float64 and timed beside cuBLAS.

python -m benchmarks.kernels.gelu_linear [--sweep]

Times are of a chain in one CUDA graph over the weights of several layers, so that a weight comes from HBM. --sweep
times other tilings too.
"""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from benchmarks.kernels.decode_linear import MAX_ERROR, graph_us
from vlmrt.kernels.gelu_linear import quick_gelu_linear_reference
from vlmrt.kernels.quick_gelu import quick_gelu
from vlmrt.kernels.triton.gelu_linear import Tiling, choose_tiling, gelu_linear

N, K = 5120, 1280
NUM_LAYERS = 8  # 105 MB of weights, twice the L2
ROWS = (8192, 7820, 4096, 2048, 1024)
TILINGS = (
    Tiling(128, 256, 64, 8, 4, in_halves=True),
    Tiling(128, 256, 64, 8, 3),
    Tiling(128, 256, 64, 8, 3, group_m=16),
    Tiling(256, 128, 64, 8, 4, in_halves=True),
    Tiling(256, 128, 64, 8, 3),
    Tiling(128, 128, 64, 8, 5, in_halves=True),
)

Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def cublas(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


def cublas_and_quick_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return quick_gelu(F.linear(x, weight, bias))


def error_of(run: Run, x: Tensor, weight: Tensor, bias: Tensor, exact: Tensor) -> float:
    """Of the largest value. What is not written stays NaN: the result takes the memory that was just given back."""
    torch.full_like(exact, torch.nan, dtype=x.dtype)
    found = run(x, weight, bias)
    return float((found - exact).abs().max() / exact.abs().max())


def report(name: str, num_rows: int, run: Run, x: Tensor, layers: list[tuple[Tensor, Tensor]], exact: Tensor) -> bool:
    """One line; False where the result is wrong or there is none."""
    try:
        error = error_of(run, x, *layers[0], exact)
        time_us = graph_us([partial(run, x, *layer) for layer in layers]) / len(layers)
    except Exception as failure:  # of one tiling: out of shared memory, or the compiler's
        print(f"T={num_rows:<5} {name}: {type(failure).__name__}: {str(failure)[:200]}", flush=True)
        return False
    tflops = 2 * num_rows * N * K / time_us / 1e6
    is_right = error <= MAX_ERROR
    print(
        f"T={num_rows:<5} {time_us:7.1f} us {tflops:4.0f} TFLOPS   error {error:.1e} {'ok   ' if is_right else 'WRONG'}"
        f"   {name}",
        flush=True,
    )
    return is_right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="time other tilings too, about half a minute")
    options = parser.parse_args()
    seed = secrets.randbits(32)
    torch.manual_seed(seed)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, seed {seed}")
    make = {"dtype": torch.bfloat16, "device": "cuda"}
    layers = [
        (torch.randn(N, K, **make) * K**-0.5, torch.randn(N, **make))  # type: ignore[call-overload]
        for _ in range(NUM_LAYERS)
    ]
    are_right = []
    for num_rows in ROWS:
        x = torch.randn(num_rows, K, **make)  # type: ignore[call-overload]
        wide = [tensor.double() for tensor in (x, *layers[0])]
        product, exact = F.linear(*wide), quick_gelu_linear_reference(*wide)
        report("cuBLAS", num_rows, cublas, x, layers, product)
        report("cuBLAS and quick_gelu", num_rows, cublas_and_quick_gelu, x, layers, exact)
        served = choose_tiling(num_rows)
        others = [tiling for tiling in TILINGS if tiling != served] if options.sweep else []
        for tiling in (served, *others):
            name = " ".join(map(str, tiling)) + (" (served)" if tiling == served else "")
            are_right.append(report(name, num_rows, partial(gelu_linear, tiling=tiling), x, layers, exact))
    return 0 if all(are_right) else 1


if __name__ == "__main__":
    sys.exit(main())
