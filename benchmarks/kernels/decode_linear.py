"""Products of few rows on the GPU: checked against float64, then what is served beside cuBLAS and the byte floor.

python -m benchmarks.kernels.decode_linear [--sweep]

Each product is timed as a chain in one CUDA graph over weights that lie apart in 3.2 GB, so that they come from HBM.
cuBLAS's time of a gated product has silu_and_mul in it. --sweep times every tiling of the Triton kernels instead.
"""

from __future__ import annotations

import argparse
import secrets
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from vlmrt.kernels.linear import gated_linear, gated_linear_reference, is_streamed, linear, linear_reference
from vlmrt.kernels.silu_and_mul import silu_and_mul
from vlmrt.kernels.triton.decode_linear import MAX_VECTOR_ROWS, Tiling, decode_linear

BYTES_PER_S = 3.0e12
POOL_VALUES = 1_600_000_000
CHAIN_BYTES = 600_000_000
MAX_ERROR = 2**-7  # of the largest value: two roundings
NUM_LAYERS = 28
ROWS = (1, 2, 8, 16, 64)
VECTOR_TILINGS = (Tiling(4, 512, 2), Tiling(4, 1024, 4), Tiling(4, 2048, 8), Tiling(8, 512, 2), Tiling(8, 1024, 4))
TENSOR_TILINGS = (
    Tiling(32, 128, 4, 4),
    Tiling(32, 256, 4, 3),
    Tiling(64, 64, 4, 5),
    Tiling(64, 128, 4, 3),
    Tiling(64, 128, 4, 4),
    Tiling(128, 64, 4, 5),
)


class Product(NamedTuple):
    name: str
    num_columns: int  # of the result: half the weight's rows where gated
    K: int
    is_gated: bool = False

    @property
    def weight_rows(self) -> int:
        return self.num_columns * (2 if self.is_gated else 1)

    @property
    def floor_us(self) -> float:
        return self.weight_rows * self.K * 2 / BYTES_PER_S * 1e6

    def cublas(self, x: Tensor, weight: Tensor) -> Tensor:
        product = F.linear(x, weight)
        return silu_and_mul(product) if self.is_gated else product

    def served(self, x: Tensor, weight: Tensor) -> Tensor:
        return gated_linear(x, weight) if self.is_gated else linear(x, weight)


MODELS = {  # a layer's products in their order, then the head
    "2B": (
        Product("qkv", 2048, 1536),
        Product("o", 1536, 1536),
        Product("gate_up", 8960, 1536, is_gated=True),
        Product("down", 1536, 8960),
        Product("head", 151936, 1536),
    ),
    "7B": (
        Product("qkv", 4608, 3584),
        Product("o", 3584, 3584),
        Product("gate_up", 18944, 3584, is_gated=True),
        Product("down", 3584, 18944),
        Product("head", 152064, 3584),
    ),
}


class Weights:
    """Weights out of one pool, each where the last one ends."""

    def __init__(self) -> None:
        self._pool = torch.empty(POOL_VALUES, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
        self._next = 0
        torch.cuda.synchronize()

    def take(self, product: Product) -> Tensor:
        size = product.weight_rows * product.K
        if self._next + size > POOL_VALUES:
            self._next = 0
        taken = self._pool[self._next : self._next + size].view(product.weight_rows, product.K)
        self._next += size
        return taken

    def chain(self, product: Product) -> list[Tensor]:
        return [self.take(product) for _ in range(max(2, CHAIN_BYTES // (product.weight_rows * product.K * 2)))]


def graph_us(calls: Sequence[Callable[[], Tensor]], repeats: int = 7) -> float:
    """Microseconds of the calls in one CUDA graph, the median of its replays."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):  # compiles, and lets cuBLAS have its workspace before the capture
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    times: list[float] = []
    for _ in range(repeats):
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[1:])


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


def check(weights: Weights, num_rows: int, product: Product) -> bool:
    """One product on a fresh input: near float64, and twice the same bits."""
    weight, x = weights.take(product), normal(num_rows, product.K)
    found, again = (product.served(x, weight) for _ in range(2))
    reference = gated_linear_reference if product.is_gated else linear_reference
    exact = reference(x.double(), weight.double())
    error = float((found - exact).abs().max() / exact.abs().max())
    passed = error <= MAX_ERROR and torch.equal(found, again)
    print(f"check {product.name:8} T={num_rows:<3} error {error:.1e} {'ok' if passed else 'WRONG'}")
    return passed


def report(model: str, num_rows: int, name: str, served_us: float, floor_us: float, cublas_us: float) -> None:
    print(
        f"{model} {name:8} T={num_rows:<3} {served_us:9.2f} us   floor {floor_us:9.2f}   x{served_us / floor_us:5.2f}"
        f"   cuBLAS {cublas_us:9.2f}",
        flush=True,
    )


def time_products(weights: Weights, model: str, num_rows: int) -> None:
    """A line for each product of the model, then one for all products of a decode step in their order."""
    *layer, head = MODELS[model]
    inputs = {product.K: normal(num_rows, product.K) for product in MODELS[model]}
    for product in MODELS[model]:
        chain, x = weights.chain(product), inputs[product.K]
        cublas_us, served_us = (
            graph_us([partial(run, x, weight) for weight in chain]) / len(chain)
            for run in (product.cublas, product.served)
        )
        is_ours = is_streamed(num_rows, product.num_columns, product.K, product.is_gated)
        report(model, num_rows, product.name + ("" if is_ours else "*"), served_us, product.floor_us, cublas_us)
    step = [(product, weights.take(product)) for product in (*layer * NUM_LAYERS, head)]
    cublas_us, served_us = (
        graph_us([partial(run, product, inputs[product.K], weight) for product, weight in step])
        for run in (Product.cublas, Product.served)
    )
    report(model, num_rows, "step", served_us, sum(product.floor_us for product, _ in step), cublas_us)


def sweep(weights: Weights, model: str, num_rows: int) -> None:
    for product in MODELS[model]:
        chain, x = weights.chain(product), normal(num_rows, product.K)
        found: list[tuple[float, Tiling]] = []
        for tiling in VECTOR_TILINGS if num_rows <= MAX_VECTOR_ROWS else TENSOR_TILINGS:
            run = partial(decode_linear, x, is_gated=product.is_gated, tiling=tiling)
            calls = [partial(run, weight=weight) for weight in chain]
            try:
                found.append((graph_us(calls) / len(chain), tiling))
            except triton.runtime.errors.OutOfResources:  # of shared memory
                continue
        best = "; ".join(f"{time_us:.2f} {tuple(tiling)}" for time_us, tiling in sorted(found)[:4])
        print(f"{model} {product.name:8} T={num_rows:<3} floor {product.floor_us:.2f}   {best}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="time every tiling, about a minute")
    options = parser.parse_args()
    seed = secrets.randbits(32)
    torch.manual_seed(seed)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, seed {seed}")
    weights = Weights()
    forms = (Product("plain", 1544, 1536), Product("wide", 33000, 1536), Product("gated", 18952, 1536, is_gated=True))
    checks = [check(weights, num_rows, product) for num_rows in (1, 2, 3, 50) for product in forms]
    if not all(checks):
        return 1
    print("* served by cuBLAS")
    for model in MODELS:
        for num_rows in ROWS:
            (sweep if options.sweep else time_products)(weights, model, num_rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
