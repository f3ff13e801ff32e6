"""Time of the sampler's kernels beside the floor of one read of the logits and beside the torch reference.

Run on a GPU: python -m benchmarks.kernels.sampling
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import triton.testing
from torch import Tensor

from vlmrt.kernels.sampling import (
    LogitBias,
    SamplingBatch,
    logprobs,
    logprobs_reference,
    sample,
    sample_reference,
)

VOCAB_SIZE = 151_936
NUM_ROWS = (1, 16, 64, 256)
BANDWIDTH = 3.0e12
LARGEST_REFERENCE = 64  # rows; the reference's sort needs many times the memory of the logits

ASKED: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "greedy, penalties": {"temperature": 0.0, "repetition_penalty": 1.05},
    "greedy, grammar": {"temperature": 0.0, "grammar": 1.0},
    "temperature": {"temperature": 0.7},
    "top-k 20": {"temperature": 0.7, "top_k": 20},
    "top-p 0.9": {"temperature": 0.7, "top_p": 0.9},
    "min-p 0.05": {"temperature": 0.7, "min_p": 0.05},
    "top-k 20, top-p 0.8": {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
}


def random_logits(num_rows: int, peaked: bool) -> Tensor:
    """Like a model's, a few hundred tokens above the rest, or flat, so that top-p keeps much of the vocabulary."""
    logits = torch.randn(num_rows, VOCAB_SIZE, device="cuda")
    if peaked:
        logits[:, torch.randperm(VOCAB_SIZE, device="cuda")[:300]] += 14 * torch.rand(num_rows, 300, device="cuda")
    return logits.bfloat16()


def random_words(num_rows: int) -> Tensor:
    """A grammar's mask that allows about half of the tokens."""
    return torch.randint(-(2**31), 2**31, (num_rows, -(-VOCAB_SIZE // 32)), device="cuda").int()


def make_batch(num_rows: int, asked: dict[str, float]) -> SamplingBatch:
    def full(name: str, default: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((num_rows,), asked.get(name, default), dtype=dtype, device="cuda")

    penalties = "repetition_penalty" in asked
    shape = (num_rows, VOCAB_SIZE)
    return SamplingBatch(
        temperature=full("temperature", 1.0),
        top_p=full("top_p", 1.0),
        top_k=full("top_k", 0, torch.int64),
        min_p=full("min_p", 0.0),
        repetition_penalty=full("repetition_penalty", 1.0),
        frequency_penalty=full("frequency_penalty", 0.0),
        presence_penalty=full("presence_penalty", 0.0),
        seeds=torch.randint(-(2**63), 2**63 - 1, (num_rows,), device="cuda"),
        positions=torch.randint(0, 1000, (num_rows,), device="cuda"),
        prompt_mask=torch.rand(shape, device="cuda") < 0.01 if penalties else None,
        output_counts=torch.randint(0, 2, shape, dtype=torch.int32, device="cuda") if penalties else None,
        grammar_mask=random_words(num_rows) if "grammar" in asked else None,
        all_greedy=asked["temperature"] == 0.0,
        any_top_k="top_k" in asked,
        any_top_p="top_p" in asked,
        any_min_p="min_p" in asked,
    )


def check() -> int:
    """Rows whose token is not the reference's, and log-probabilities off float64; a near-tie in a thousand may be."""
    wrong = num_rows = 0
    for asked in ASKED.values():
        for peaked in (True, False):
            logits, batch = random_logits(32, peaked), make_batch(32, asked)
            ids = torch.randint(VOCAB_SIZE, (32, 5), device="cuda")
            before = torch.randint(0, 1500, (32, 5), device="cuda")
            bias = LogitBias(ids, torch.randn(32, 5, device="cuda") * 5, before)
            batch = replace(batch, logit_bias=bias, grammar_mask=random_words(32))
            wrong += int((sample(logits, batch) != sample_reference(logits, batch)).sum())
            num_rows += 32
    print(f"{wrong} of {num_rows} rows differ from the reference")
    logits, token_ids = random_logits(32, True), torch.arange(32, device="cuda")
    exact = logits.double().log_softmax(-1)
    chosen, top_ids, top_values = logprobs(logits, token_ids, 20)
    error = (chosen - exact.gather(1, token_ids[:, None])[:, 0]).abs().max()
    error = torch.maximum(error, (top_values - exact.gather(1, top_ids)).abs().max())
    print(f"log-probabilities: largest error {error.item():.1e}")
    return wrong * 1000 > num_rows or error.item() > 1e-5


def graph_us(run: Callable[[], object]) -> float:
    return float(triton.testing.do_bench_cudagraph(run, rep=10)) * 1e3


def eager_us(run: Callable[[], object]) -> float:
    return float(triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")) * 1e3


def report(name: str, num_rows: int, fast_us: float, floor_us: float, eager: float | None) -> None:
    beside = "      -" if eager is None else f"{eager:7.0f}"
    ratio = fast_us / floor_us
    print(f"{name:32s} R={num_rows:4d} {fast_us:8.1f} us  floor {floor_us:6.1f}  x{ratio:6.1f}  torch {beside} us")


def main() -> int:
    torch.manual_seed(0)
    failed = check()
    for name, asked in ASKED.items():
        kinds = (True, False) if asked.keys() & {"top_k", "top_p", "min_p"} else (True,)
        for peaked in kinds:
            for num_rows in NUM_ROWS:
                logits, batch = random_logits(num_rows, peaked), make_batch(num_rows, asked)
                read_bytes = logits.nbytes * (1 + (batch.prompt_mask is not None) * 5 / 2)
                small = num_rows <= LARGEST_REFERENCE
                report(
                    name + ("" if peaked else ", flat"),
                    num_rows,
                    graph_us(partial(sample, logits, batch)),
                    read_bytes / BANDWIDTH * 1e6,
                    eager_us(partial(sample_reference, logits, batch)) if small else None,
                )
    for num_rows in NUM_ROWS:
        logits, token_ids = random_logits(num_rows, True), torch.arange(num_rows, device="cuda")
        report(
            "logprobs of the chosen",
            num_rows,
            graph_us(partial(logprobs, logits, token_ids, 0)),
            logits.nbytes / BANDWIDTH * 1e6,
            eager_us(partial(logprobs_reference, logits.float(), token_ids, 0)),
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
