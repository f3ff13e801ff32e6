"""A rank's steps in process, without a server: decode by batch size, prefill by chunk, beside their floors.

python -m benchmarks.steps --preset qwen2-vl-2b              # one GPU, random weights made in place
python -m benchmarks.steps --preset qwen2-vl-2b --profile 1  # and which kernels a decode step of one row spends
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from vlmrt.actors.llm.kv_cache import KvCache, allocate, by_layer
from vlmrt.actors.llm.runner import PendingStep, Runner
from vlmrt.actors.llm.slots import Slots
from vlmrt.actors.llm.step_graphs import step_shapes
from vlmrt.actors.models.layers import TensorParallel
from vlmrt.actors.models.qwen2_vl.language import LanguageModel
from vlmrt.actors.models.registry import load_model_config
from vlmrt.runtime.messages import NewSequence, RequestId, Sampling, StepPlan, StepRow
from vlmrt.tools.checkpoint.make import make_checkpoint

BLOCK_SIZE = 16
BYTES_PER_S = 3.02e12  # a large copy on one H100, counting bytes read and written
FLOPS = 785e12  # a large bf16 product on one H100
STD = 0.02
MAX_BATCHED_TOKENS = 4096


class Line(NamedTuple):
    what: str
    ms: float
    floor_ms: float


class Bench:
    """One model, its cache and a Runner, driven by plans."""

    def __init__(self, preset: str, device: torch.device, num_seqs: int, num_blocks: int, layers: int | None) -> None:
        with tempfile.TemporaryDirectory() as directory:
            path = make_checkpoint(Path(directory), preset, weights=False, layers=layers)
            self.config = load_model_config(path)
        text = self.config.text
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = LanguageModel(text, TensorParallel(), self.dtype, device)
        for parameter in self.model.parameters():
            parameter.normal_(0.0, STD) if parameter.dim() > 1 else parameter.fill_(1.0)
        self.kv: KvCache = by_layer(allocate(num_blocks, BLOCK_SIZE, text, 1, self.dtype, device))
        for keys, values in self.kv:
            keys.normal_()
            values.normal_()
        slots = Slots(num_seqs, num_blocks * BLOCK_SIZE - 2, BLOCK_SIZE)
        self.num_blocks = num_blocks
        self.runner = Runner(self.model, self.kv, slots, self.config.vision.spatial_merge_size, device)
        self.step = 0

    def decode_s(self, num_rows: int, context: int, num_steps: int) -> float:
        """Median seconds of a step, launched one ahead as a rank does."""
        per_row = (context + num_steps) // BLOCK_SIZE + 1
        blocks = [tuple(b % self.num_blocks for b in range(r * per_row, (r + 1) * per_row)) for r in range(num_rows)]
        self.runner.clear()
        admit = tuple(
            NewSequence(r, RequestId(str(r)), (1,) * context, context, (), 0, Sampling(temperature=0.0), blocks[r])
            for r in range(num_rows)
        )
        times: list[float] = []
        last: PendingStep | None = None
        ended_s = time.perf_counter()
        for number in range(num_steps):
            start = context - 1 + number
            rows = tuple(StepRow(r, start, 1, (), True) for r in range(num_rows))
            launched = self.runner.launch(StepPlan(self._next(), (), admit if number == 0 else (), rows))
            if last is not None:
                self.runner.complete(last)
                times.append(time.perf_counter() - ended_s)
                ended_s = time.perf_counter()
            last = launched
        assert last is not None
        self.runner.complete(last)
        return statistics.median(times[len(times) // 4 :])

    def prefill_s(self, num_tokens: int, context: int) -> float:
        """Median seconds of one row of that many tokens behind a context."""
        blocks = tuple(b % self.num_blocks for b in range((num_tokens + context) // BLOCK_SIZE + 1))
        times = []
        for _ in range(6):
            self.runner.clear()
            token_ids = (1,) * (num_tokens + context)
            admit = NewSequence(0, RequestId("0"), token_ids, len(token_ids), (), 0, Sampling(temperature=0.0), blocks)
            plan = StepPlan(self._next(), (), (admit,), (StepRow(0, context, num_tokens, (), True),))
            began_s = time.perf_counter()
            self.runner.complete(self.runner.launch(plan))
            times.append(time.perf_counter() - began_s)
        return statistics.median(times[2:])

    def decode_floor_s(self, num_rows: int, context: int) -> float:
        text = self.config.text
        weights = sum(p.numel() * p.itemsize for p in self.model.parameters())
        if not text.tie_word_embeddings:
            weights -= text.vocab_size * text.hidden_size * self.dtype.itemsize  # only the head is read whole
        kv = 2 * text.num_layers * text.num_kv_heads * text.head_dim * self.dtype.itemsize * num_rows * context
        return (weights + kv) / BYTES_PER_S

    def prefill_floor_s(self, num_tokens: int, context: int) -> float:
        text = self.config.text
        products = 2 * num_tokens * sum(p.numel() for p in self.model.layers.parameters())
        seen = num_tokens * context + num_tokens * num_tokens / 2
        return (products + 4 * text.num_layers * text.num_heads * text.head_dim * seen) / FLOPS

    def _next(self) -> int:
        self.step += 1
        return self.step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", default="qwen2-vl-2b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, help="fewer layers than the preset's, to try the program out")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 16, 64, 256])
    parser.add_argument("--context", type=int, default=600, help="tokens of each decode row")
    parser.add_argument("--chunks", type=int, nargs="*", default=[64, 512, 2048, 4096])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--profile", type=int, nargs="*", default=[], help="rows of decode steps to profile")
    parser.add_argument("--eager", action="store_true", help="without recorded steps")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    most = max([*arguments.rows, *arguments.profile, 1])
    num_blocks = most * ((arguments.context + arguments.steps) // BLOCK_SIZE + 1) + 600
    with torch.inference_mode():
        bench = Bench(arguments.preset, device, most, num_blocks, arguments.layers)
        if device.type == "cuda" and not arguments.eager:
            began_s = time.perf_counter()
            shapes = step_shapes(most, MAX_BATCHED_TOKENS)
            bench.runner.record(shapes)
            print(f"recording {len(shapes)} shapes took {time.perf_counter() - began_s:.1f} s")
        lines = []
        for rows in arguments.rows:
            seconds = bench.decode_s(rows, arguments.context, arguments.steps)
            floor = bench.decode_floor_s(rows, arguments.context)
            lines.append(Line(f"decode {rows} rows", 1e3 * seconds, 1e3 * floor))
            print(f"{lines[-1].what:>20}: {lines[-1].ms:8.3f} ms, floor {lines[-1].floor_ms:8.3f} ms", flush=True)
        for chunk in arguments.chunks:
            seconds, floor = bench.prefill_s(chunk, 0), bench.prefill_floor_s(chunk, 0)
            lines.append(Line(f"prefill {chunk} tokens", 1e3 * seconds, 1e3 * floor))
            print(f"{lines[-1].what:>20}: {lines[-1].ms:8.3f} ms, floor {lines[-1].floor_ms:8.3f} ms", flush=True)
        for rows in arguments.profile:
            activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
            with profile(activities=[activity]) as profiler:
                bench.decode_s(rows, arguments.context, 20)
            table = profiler.key_averages().table(sort_by="self_device_time_total", row_limit=25)
            print(f"20 decode steps of {rows} rows\n{table}")
    if arguments.out:
        arguments.out.write_text(json.dumps([line._asdict() for line in lines], indent=2) + "\n")


if __name__ == "__main__":
    main()
