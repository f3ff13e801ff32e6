"""Paged attention on the GPU: checked against float64, then timed beside its byte or FLOP floor and torch.

python -m benchmarks.kernels.paged_attention [--sweep]

Calls are timed as a chain in one CUDA graph, each with its own part of the cache, so that K and V come from HBM.
Block tables are as wide as a server's: they bound the context at 16,384 tokens whatever its length. --sweep times other
tilings of decode instead, in about half a minute, most of it their compilation.
"""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from vlmrt.kernels.paged_attention import PagedBatch, paged_attention, paged_attention_reference
from vlmrt.kernels.triton.paged_attention import paged_attention_triton
from vlmrt.kernels.triton.paged_decode import DecodeTiling, choose_splits

BYTES_PER_S = 3.0e12
FLOPS_PER_S = 785e12
BLOCK_SIZE = 16
TABLE_BLOCKS = 1024
HEAD_DIM = 128
SCALE = HEAD_DIM**-0.5
MAX_ERROR = 2
CHAIN_BYTES = 400_000_000
MAX_CHAIN = 28
MAX_EAGER_BYTES = 700_000_000  # torch gathers K and V before it attends


class Model(NamedTuple):
    name: str
    num_heads: int
    num_kv_heads: int

    @property
    def token_bytes(self) -> int:
        """K and V of one token in one layer."""
        return 2 * self.num_kv_heads * HEAD_DIM * 2


MODELS = (Model("2B", 12, 2), Model("7B", 28, 4))
DECODE_ROWS = (1, 8, 64, 256)
DECODE_CONTEXTS = (300, 1100, 8192)
CHUNKS = (512, 2048, 8192)
CHUNK_CONTEXTS = (0, 4096)  # tokens before the chunk

SWEPT_DECODES = ((1, 300), (1, 1000), (8, 300), (10, 1000), (16, 1000), (64, 600))  # rows, context
SWEPT_TILINGS = tuple(
    DecodeTiling(block_n, num_warps, num_stages, usual_context)
    for block_n, num_stages in ((32, 3), (64, 2))  # of the same shared memory
    for num_warps in (2, 4)
    for usual_context in (192, 384)
)
SWEPT_MS = 10  # of each


class Cache:
    """K and V blocks of one model, handed out in a scattered order, each call's where the last one's end."""

    def __init__(self, model: Model) -> None:
        num_blocks = max(DECODE_ROWS) * -(-max(DECODE_CONTEXTS) // BLOCK_SIZE)
        shape = (num_blocks, BLOCK_SIZE, model.num_kv_heads, HEAD_DIM)
        self.k, self.v = (torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(2))
        self._order = torch.randperm(num_blocks, device="cuda", dtype=torch.int32)
        self._next = 0

    def batch(self, query_lens: Sequence[int], context_lens: Sequence[int]) -> PagedBatch:
        tables = torch.zeros(len(query_lens), TABLE_BLOCKS, dtype=torch.int32, device="cuda")
        for sequence, context in enumerate(context_lens):
            count = -(-context // BLOCK_SIZE)
            index = torch.arange(self._next, self._next + count, device="cuda") % len(self._order)
            tables[sequence, :count] = self._order[index]
            self._next += count
        starts = [sum(query_lens[:sequence]) for sequence in range(len(query_lens) + 1)]
        return PagedBatch(
            cu_seqlens=torch.tensor(starts, dtype=torch.int32, device="cuda"),
            context_lens=torch.tensor(context_lens, dtype=torch.int32, device="cuda"),
            block_tables=tables,
            slot_mapping=torch.zeros(sum(query_lens), dtype=torch.int64, device="cuda"),
            num_decodes=next((n for n, count in enumerate(query_lens) if count != 1), len(query_lens)),
            query_lens=tuple(query_lens),
            context_lens_host=tuple(context_lens),
        )

    def sequence(self, batch: PagedBatch, sequence: int) -> tuple[Tensor, Tensor]:
        """(k, v) [context, Hkv, D] of one sequence."""
        context = batch.context_lens_host[sequence]
        blocks = batch.block_tables[sequence, : -(-context // BLOCK_SIZE)].long()
        k, v = (cache[blocks].flatten(0, 1)[:context] for cache in (self.k, self.v))
        return k, v


def queries(model: Model, num_tokens: int) -> Tensor:
    """A slice of a fused projection."""
    width = (model.num_heads + 2 * model.num_kv_heads) * HEAD_DIM
    fused = torch.randn(num_tokens, width, dtype=torch.bfloat16, device="cuda")
    return fused[:, : model.num_heads * HEAD_DIM].view(num_tokens, model.num_heads, HEAD_DIM)


def exact_attention(model: Model, cache: Cache, batch: PagedBatch, q: Tensor) -> Tensor:
    """What paged_attention is to come close to, in float64."""
    exact = []
    start = 0
    for sequence, (count, context) in enumerate(zip(batch.query_lens, batch.context_lens_host, strict=True)):
        k, v = (
            x.double().repeat_interleave(model.num_heads // model.num_kv_heads, dim=1)
            for x in cache.sequence(batch, sequence)
        )
        scores = torch.einsum("qhd,khd->hqk", q[start : start + count].double(), k) * SCALE
        position = torch.arange(context - count, context, device="cuda")[:, None]
        scores.masked_fill_(torch.arange(context, device="cuda") > position, float("-inf"))
        exact.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
        start += count
    return torch.cat(exact)


def largest_error(attended: Tensor, exact: Tensor) -> float:
    """In units of bfloat16's eps and of each result's largest value."""
    error = (attended.double() - exact).abs().amax(-1) / exact.abs().amax(-1)
    return float(error.max() / torch.finfo(torch.bfloat16).eps)


def chain_us(calls: Sequence[Callable[[], Any]], rep_ms: int = 25) -> float:
    """Microseconds of one of the calls, all of them captured in one graph."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return median_us(graph.replay, rep_ms) / len(calls)


def median_us(call: Callable[[], Any], rep_ms: int = 25) -> float:
    return float(triton.testing.do_bench(call, warmup=5, rep=rep_ms, return_mode="median")) * 1e3


def report(name: str, time_us: float, floor_us: float, torch_us: float | None) -> None:
    beside = "-" if torch_us is None else f"{torch_us:9.1f}"
    print(f"{name:34} {time_us:9.1f} us   floor {floor_us:9.1f}   x{time_us / floor_us:6.2f}   torch {beside:>9}")


def decode_batches(model: Model, cache: Cache, rows: int, context: int) -> list[PagedBatch]:
    length = max(1, min(MAX_CHAIN, CHAIN_BYTES // (rows * context * model.token_bytes)))
    return [cache.batch((1,) * rows, (context,) * rows) for _ in range(length)]


def time_decode(model: Model, cache: Cache, rows: int, context: int) -> None:
    num_bytes = rows * context * model.token_bytes
    q = queries(model, rows)
    batches = decode_batches(model, cache, rows, context)
    time_us = chain_us([partial(paged_attention, q, cache.k, cache.v, batch, SCALE) for batch in batches])
    torch_us = None
    if num_bytes <= MAX_EAGER_BYTES:
        torch_us = median_us(lambda: paged_attention_reference(q, cache.k, cache.v, batches[0], SCALE))
    report(f"{model.name} decode {rows} x {context}", time_us, num_bytes / BYTES_PER_S * 1e6, torch_us)


def time_prefill(model: Model, cache: Cache, chunk: int, before: int) -> None:
    q = queries(model, chunk)
    batch = cache.batch((chunk,), (before + chunk,))
    time_us = chain_us([lambda: paged_attention(q, cache.k, cache.v, batch, SCALE)])
    k, v = (
        x.repeat_interleave(model.num_heads // model.num_kv_heads, dim=1).transpose(0, 1)[None].contiguous()
        for x in cache.sequence(batch, 0)
    )
    dense = q.transpose(0, 1)[None].contiguous()
    mask = causal_lower_right(chunk, before + chunk)
    torch_us = median_us(lambda: F.scaled_dot_product_attention(dense, k, v, attn_mask=mask, scale=SCALE))
    pairs = chunk * before + chunk * (chunk + 1) // 2
    flops = 4 * model.num_heads * HEAD_DIM * pairs
    report(f"{model.name} prefill {chunk} after {before}", time_us, flops / FLOPS_PER_S * 1e6, torch_us)


def sweep_decode(model: Model, cache: Cache, rows: int, context: int) -> bool:
    """Whether every tiling is right, before it is timed and after."""
    q = queries(model, rows)
    batches = decode_batches(model, cache, rows, context)
    exact = exact_attention(model, cache, batches[0], q)
    num_sms = torch.cuda.get_device_properties(q.device).multi_processor_count
    all_right = True
    for tiling in SWEPT_TILINGS:
        calls = [partial(paged_attention_triton, q, cache.k, cache.v, batch, SCALE, tiling=tiling) for batch in batches]
        attended = calls[0]()
        error = largest_error(attended, exact)
        time_us = chain_us(calls, SWEPT_MS)
        is_right = error <= MAX_ERROR and torch.equal(calls[0](), attended)
        all_right &= is_right
        splits = choose_splits(rows, model.num_kv_heads, TABLE_BLOCKS * BLOCK_SIZE, num_sms, tiling)
        name = f"{model.name} decode {rows:2} x {context:4}   block_n {tiling.block_n} warps {tiling.num_warps}"
        chosen = f"usual {tiling.usual_context}   {splits.num:2} splits of {splits.tokens_each:3}"
        verdict = f"error {error:.2f} eps{'' if is_right else ' WRONG'}"
        print(f"{name} stages {tiling.num_stages} {chosen}   {time_us:7.2f} us   {verdict}", flush=True)
    return all_right


def check(model: Model, cache: Cache) -> bool:
    all_right = True
    for query_lens, context_lens in (
        ((1,) * 8, (1100, 300, 17, 16, 1, 8192, 2048, 65)),
        ((1,) * 256, tuple(range(40, 296))),
        ((1, 1, 512, 30, 1, 1100), (300, 1100, 1000, 30, 77, 1100)),
        ((2048,), (2200,)),
    ):
        batch, q = cache.batch(query_lens, context_lens), queries(model, sum(query_lens))
        attended = paged_attention(q, cache.k, cache.v, batch, SCALE)
        error = largest_error(attended, exact_attention(model, cache, batch, q))
        all_right &= error <= MAX_ERROR
        print(f"{model.name} {len(query_lens)} sequences: error {error:.2f} eps, at most {MAX_ERROR} is right")
    return all_right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="time other tilings of decode")
    options = parser.parse_args()
    seed = secrets.randbelow(1 << 30)
    torch.manual_seed(seed)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, seed {seed}")
    all_right = True
    for model in MODELS:
        cache = Cache(model)
        if options.sweep:
            for rows, context in SWEPT_DECODES:
                all_right &= sweep_decode(model, cache, rows, context)
            del cache
            continue
        if not check(model, cache):
            return 1
        for rows in DECODE_ROWS:
            for context in DECODE_CONTEXTS:
                time_decode(model, cache, rows, context)
        for before in CHUNK_CONTEXTS:
            for chunk in CHUNKS:
                time_prefill(model, cache, chunk, before)
        del cache
    return 0 if all_right else 1


if __name__ == "__main__":
    sys.exit(main())
