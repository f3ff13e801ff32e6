"""Small-batch products on the GPU: checked against float64, then each config timed beside cuBLAS and the byte floor.

python -m benchmarks.kernels.decode_linear [--quick] [--seconds 110] [--out sweep.json]

Each product is timed as a chain in one CUDA graph over weights that lie apart in 3.2 GB, so that they come from HBM.
"""

from __future__ import annotations

import argparse
import json
import secrets
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmrt.kernels.triton.decode_linear import Config, decode_linear

BYTES_PER_S = 3.0e12
POOL_VALUES = 1_600_000_000
CHAIN_BYTES = 600_000_000
EPS = 1e-6


class Product(NamedTuple):
    name: str
    num_columns: int  # of the result: half the weight's rows where gated
    K: int
    is_gated: bool = False
    per_step: int = 28

    @property
    def weight_rows(self) -> int:
        return self.num_columns * (2 if self.is_gated else 1)

    @property
    def floor_us(self) -> float:
        return self.weight_rows * self.K * 2 / BYTES_PER_S * 1e6


MODELS = {
    "2B": [
        Product("qkv", 2048, 1536),
        Product("o", 1536, 1536),
        Product("gate_up", 8960, 1536, is_gated=True),
        Product("down", 1536, 8960),
        Product("head", 151936, 1536, per_step=1),
    ],
    "7B": [
        Product("qkv", 4608, 3584),
        Product("o", 3584, 3584),
        Product("gate_up", 18944, 3584, is_gated=True),
        Product("down", 3584, 18944),
        Product("head", 152064, 3584, per_step=1),
    ],
}
ROWS = (1, 8, 16, 2, 4, 32, 64)

# For up to 1, 2, 4 rows on CUDA cores; up to 16, 32, 64 rows on tensor cores. Few tiles are also tried in splits.
VECTOR_PLAIN = {
    1: [
        Config(False, 4, 1024, 1, 4),
        Config(False, 8, 512, 1, 2),
        Config(False, 4, 2048, 1, 8),
        Config(False, 8, 1024, 1, 4),
        Config(False, 4, 1024, 1, 4, prefetch_k=2048),
        Config(False, 4, 2048, 1, 8, prefetch_k=4096),
    ],
    2: [Config(False, 4, 1024, 1, 4), Config(False, 4, 2048, 1, 8), Config(False, 8, 512, 1, 2)],
    4: [Config(False, 4, 1024, 1, 4), Config(False, 4, 512, 1, 2)],
}
VECTOR_SPLIT = {
    1: [Config(False, 4, 1024, 1, 4), Config(False, 8, 512, 1, 2)],
    2: [Config(False, 4, 1024, 1, 4)],
    4: [Config(False, 4, 512, 1, 2)],
}
VECTOR_GATED = {
    1: [Config(False, 4, 512, 1, 2), Config(False, 4, 1024, 1, 4), Config(False, 2, 1024, 1, 4)],
    2: [Config(False, 4, 512, 1, 2), Config(False, 2, 1024, 1, 4)],
    4: [Config(False, 2, 1024, 1, 4)],
}
TENSOR_PLAIN = {
    16: [
        Config(True, 16, 256, 1, 4, 4),
        Config(True, 32, 128, 1, 4, 5),
        Config(True, 32, 256, 1, 4, 4),
        Config(True, 64, 128, 1, 4, 4),
        Config(True, 32, 128, 1, 4, 5, prefetch_k=512),
    ],
    32: [Config(True, 32, 128, 1, 4, 5), Config(True, 32, 256, 1, 4, 4), Config(True, 64, 128, 1, 4, 4)],
    64: [Config(True, 32, 128, 1, 4, 4), Config(True, 64, 128, 1, 4, 4), Config(True, 128, 64, 1, 4, 5)],
}
TENSOR_GATED = {
    16: [
        Config(True, 16, 256, 1, 4, 4),
        Config(True, 32, 128, 1, 4, 4),
        Config(True, 32, 128, 1, 4, 4, prefetch_k=512),
    ],
    32: [Config(True, 32, 128, 1, 4, 4), Config(True, 64, 64, 1, 4, 5)],
    64: [Config(True, 32, 128, 1, 4, 4), Config(True, 64, 64, 1, 4, 5)],
}


def bucket(num_rows: int, sizes: tuple[int, ...]) -> int | None:
    return next((size for size in sizes if num_rows <= size), None)


def candidates(product: Product, num_rows: int) -> list[Config]:
    vector, tensor = bucket(num_rows, (1, 2, 4)), bucket(num_rows, (16, 32, 64))
    found: list[Config] = []
    if product.is_gated:
        if vector:
            found += VECTOR_GATED[vector]
        return found + TENSOR_GATED[tensor or 64]
    if vector:
        found += VECTOR_PLAIN[vector]
    found += TENSOR_PLAIN[tensor or 64]
    splittable = (VECTOR_SPLIT[vector] if vector else []) + TENSOR_PLAIN[tensor or 64]
    for config in splittable:
        for num_splits in (2, 3, 4, 6, 8):
            num_programs = -(-product.num_columns // config.tile_n) * num_splits
            if num_programs <= 132 * 8 and product.K // config.tile_k >= 2 * num_splits:
                found.append(config._replace(num_splits=num_splits))
    return found


class Machine:
    """What every timing shares: a pool of weights, the semaphores, and the clock."""

    def __init__(self, seed: int, num_values: int = POOL_VALUES) -> None:
        torch.manual_seed(seed)
        self.pool = torch.empty(num_values, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
        self.semaphores = torch.zeros(4096, dtype=torch.int32, device="cuda")
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._offset = 0
        torch.cuda.synchronize()

    def weight(self, product: Product) -> Tensor:
        size = product.weight_rows * product.K
        if self._offset + size > self.pool.numel():
            self._offset = 0
        found = self.pool[self._offset : self._offset + size].view(product.weight_rows, product.K)
        self._offset += size
        return found

    def chain(self, product: Product) -> list[Tensor]:
        return [self.weight(product) for _ in range(max(2, int(CHAIN_BYTES / (product.weight_rows * product.K * 2))))]

    def time_us(self, run: Callable[[], None], repeats: int = 7) -> float:
        """Median of one CUDA graph of run."""
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):  # compiles, and lets cuBLAS have its workspace before the capture
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            run()
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


def exact_product(x: Tensor, weight: Tensor, is_gated: bool, residual: Tensor | None, norm: Tensor | None) -> Tensor:
    x, weight = x.double(), weight.double()
    if norm is not None:
        x = F.rms_norm(x, (x.shape[-1],), norm.double(), EPS)
    product = x @ weight.T
    if is_gated:
        gate, up = product.chunk(2, dim=-1)
        product = F.silu(gate) * up
    return product if residual is None else product + residual.double()


def check(machine: Machine) -> bool:
    """Every form on fresh inputs: within two roundings of float64, and twice the same bits."""
    is_right = True
    for num_rows, config, gated_config in (
        (1, VECTOR_SPLIT[1][0], VECTOR_GATED[1][0]),
        (3, VECTOR_SPLIT[4][0], VECTOR_GATED[4][0]),
        (8, TENSOR_PLAIN[16][1], TENSOR_GATED[16][1]),
        (50, TENSOR_PLAIN[64][1], TENSOR_GATED[64][0]),
    ):
        for name, is_gated, has_residual, has_norm, num_splits in (
            ("plain", False, False, False, 1),
            ("split", False, False, False, 4),
            ("gate_up", True, False, False, 1),
            ("add", False, True, False, 4),
            ("norm", False, False, True, 1),
        ):
            product = Product(name, 1000, 1536, is_gated)
            weight = machine.weight(product)
            x = torch.randn(num_rows, product.K, device="cuda").bfloat16()
            residual = torch.randn(num_rows, product.num_columns, device="cuda").bfloat16() if has_residual else None
            norm = torch.randn(product.K, device="cuda").bfloat16() if has_norm else None
            torch.cuda.synchronize()
            found, again = (
                decode_linear(
                    x,
                    weight,
                    machine.semaphores,
                    gated=is_gated,
                    residual=residual,
                    norm_weight=norm,
                    eps=EPS,
                    config=(gated_config if is_gated else config)._replace(num_splits=num_splits),
                )
                for _ in range(2)
            )
            exact = exact_product(x, weight, is_gated, residual, norm)
            error = float(((found - exact).abs().max() / exact.abs().max()).item())
            passed = error <= 2**-7 and torch.equal(found, again) and not machine.semaphores.any()
            is_right &= passed
            print(f"check T={num_rows:<3} {name:8} error {error:.1e} {'ok' if passed else 'WRONG'}", flush=True)
    return is_right


def sweep(machine: Machine, model: str, product: Product, num_rows: int) -> list[dict[str, Any]]:
    weights = machine.chain(product)
    x = torch.randn(num_rows, product.K, device="cuda").bfloat16()
    expected = exact_product(x.float(), weights[0][: product.weight_rows], product.is_gated, None, None)
    F.linear(x, weights[0])
    cublas_us = machine.time_us(lambda: each(lambda w: F.linear(x, w), weights)) / len(weights)
    rows: list[dict[str, Any]] = []
    for config in candidates(product, num_rows):

        def run(weight: Tensor, config: Config = config) -> Tensor:
            return decode_linear(x, weight, machine.semaphores, gated=product.is_gated, config=config)

        try:
            error = float(((run(weights[0]) - expected).abs().max() / expected.abs().max()).item())
            found_us = machine.time_us(lambda run=run: each(run, weights)) / len(weights)  # type: ignore[misc]
        except Exception as problem:  # a config the chip has no room for is a row of the table too
            print(f"  {config}: {type(problem).__name__} {str(problem)[:120]}", flush=True)
            continue
        if error > 2**-7:
            print(f"  {config}: WRONG, error {error:.1e}", flush=True)
            continue
        rows.append({"config": list(config), "us": round(found_us, 3)})
    rows.sort(key=lambda row: float(row["us"]))
    record = {"model": model, "product": product.name, "rows": num_rows, "N": product.num_columns, "K": product.K}
    record |= {"cublas_us": round(cublas_us, 3), "floor_us": round(product.floor_us, 3), "found": rows}
    if rows:
        best = rows[0]
        print(
            f"{model} {product.name:8} T={num_rows:<3} floor {product.floor_us:8.2f}  cuBLAS {cublas_us:8.2f}"
            f"  ours {best['us']:8.2f} us ({product.floor_us / best['us']:.0%} of the floor)  {best['config']}"
            + "".join(f"; {row['us']:.2f} {row['config']}" for row in rows[1:3]),
            flush=True,
        )
    return [record]


def each(run: Callable[[Tensor], Tensor], weights: list[Tensor]) -> None:
    for weight in weights:
        run(weight)


def step(machine: Machine, model: str, num_rows: int, best: dict[str, Config]) -> dict[str, Any]:
    """All products of a decode step in their order in one graph: with cuBLAS, and with the best configs."""
    products = MODELS[model]
    order = [product for _ in range(28) for product in products[:4]] + [products[4]]
    weights = [machine.weight(product) for product in order]
    inputs = {product.K: torch.randn(num_rows, product.K, device="cuda").bfloat16() for product in products}

    def cublas() -> None:
        for product, weight in zip(order, weights, strict=True):
            F.linear(inputs[product.K], weight)

    def ours() -> None:
        for product, weight in zip(order, weights, strict=True):
            x, config = inputs[product.K], best[product.name]
            decode_linear(x, weight, machine.semaphores, gated=product.is_gated, config=config)

    ours()
    floor_ms = sum(product.floor_us * product.per_step for product in products) / 1e3
    cublas_ms, ours_ms = machine.time_us(cublas) / 1e3, machine.time_us(ours) / 1e3
    print(
        f"{model} step T={num_rows:<3} floor {floor_ms:.3f}  cuBLAS {cublas_ms:.3f}  ours {ours_ms:.3f} ms"
        f" ({floor_ms / ours_ms:.0%} of the floor)",
        flush=True,
    )
    return {"model": model, "product": "step", "rows": num_rows, "cublas_ms": cublas_ms, "ours_ms": ours_ms}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2B at 1 and 8 rows only")
    parser.add_argument("--seconds", type=float, default=110.0, help="start no shape after so long")
    parser.add_argument("--out", help="where to write every timing as JSON")
    options = parser.parse_args()
    started = time.monotonic()
    seed = secrets.randbits(32)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, seed {seed}", flush=True)
    machine = Machine(seed)
    if not check(machine):
        return 1
    print(f"checked after {time.monotonic() - started:.0f} s", flush=True)
    records: list[dict[str, Any]] = []
    for num_rows in ROWS[:2] if options.quick else ROWS:
        for model in ("2B",) if options.quick else ("2B", "7B"):
            best: dict[str, Config] = {}
            for product in MODELS[model]:
                if time.monotonic() - started > options.seconds:
                    break
                found = sweep(machine, model, product, num_rows)
                records += found
                if found[0]["found"]:
                    best[product.name] = Config(*found[0]["found"][0]["config"])
            if len(best) == len(MODELS[model]):
                records.append(step(machine, model, num_rows, best))
    if options.out:
        with open(options.out, "w") as file:
            json.dump(records, file)
    print(f"{len(records)} records in {time.monotonic() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
