"""Attention within segments, at the towers' shapes: our kernel, some of its launches, and what torch offers.

    python -m benchmarks.kernels.vision_attention

"first" is the time of the first call at a shape: what cuDNN's plans cost where almost every batch has its own.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from benchmarks.vision_shapes import BATCHES, FLOPS_PER_S, attention_lengths, vision_config
from vlmrt.kernels.triton.vision_attention import LAUNCHES, Launch, vision_attention_triton
from vlmrt.kernels.vision_attention import pack_segments, tile_table, vision_attention, vision_attention_reference

NUM_HEADS, HEAD_DIM = 16, 80
SCALE = HEAD_DIM**-0.5
REPEATS = 15
OTHERS = (
    (64, Launch(64, 4, 3)),
    (64, Launch(32, 4, 3)),
    (128, Launch(64, 8, 2)),
    (128, Launch(128, 8, 2)),
    (128, Launch(64, 4, 3)),
    (128, Launch(32, 4, 3)),
)
CHECKED = ((64,) * 30 + (32, 16), (1024, 1564, 6256), (1, 63, 130, 5))
Heads = tuple[Tensor, Tensor, Tensor]


def heads(num_patches: int) -> Heads:
    """Strided as in the tower: queries and keys rotated, values a slice of the projection."""
    rotated = torch.randn(num_patches, 2 * NUM_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    projected = torch.randn(num_patches, 3 * NUM_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    q, k = rotated.chunk(2, dim=1)
    return q, k, projected[:, 2 * NUM_HEADS :]


def is_exact(lengths: tuple[int, ...]) -> bool:
    """Ours is no further from float64 than twice torch's, and half a unit of rounding."""
    q, k, v = heads(sum(lengths))
    exact = vision_attention_reference(q.double(), k.double(), v.double(), lengths, SCALE)
    ours = vision_attention(q, k, v, pack_segments(lengths, q.device), SCALE)
    theirs = vision_attention_reference(q, k, v, lengths, SCALE)
    our_error, their_error = ((x.double() - exact).abs().max().item() for x in (ours, theirs))
    ok = our_error <= 2 * their_error + torch.finfo(q.dtype).eps / 2 * exact.abs().max().item()
    print(f"error of {len(lengths)} segments: {our_error:.2e}, torch's {their_error:.2e}{'' if ok else '  TOO LARGE'}")
    return ok


def candidates(lengths: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], object]]:
    segments = pack_segments(lengths, q.device)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=q.device)
    longest = max(lengths)

    def by_backend(backend: SDPBackend) -> Callable[[], object]:
        def run() -> object:
            with sdpa_kernel([backend]):
                return vision_attention_reference(q, k, v, lengths, SCALE)

        return run

    def by_launch(tile: int, launch: Launch) -> Callable[[], object]:
        tiles = torch.from_numpy(tile_table(lengths, tile)).to(q.device)
        return lambda: vision_attention_triton(q, k, v, tiles, tile, SCALE, launch)

    runs: dict[str, Callable[[], object]] = {
        f"ours {segments.tile} {tuple(LAUNCHES[segments.tile])}": lambda: vision_attention(q, k, v, segments, SCALE),
        "torch varlen": lambda: varlen_attn(q, k, v, bounds, bounds, longest, longest),
        "cuDNN by runs": by_backend(SDPBackend.CUDNN_ATTENTION),
        "flash by runs": by_backend(SDPBackend.FLASH_ATTENTION),
    }
    return runs | {f"     {tile} {tuple(launch)}": by_launch(tile, launch) for tile, launch in OTHERS}


def milliseconds(run: Callable[[], object]) -> tuple[float, float]:
    """(first call by the wall clock, median of later ones by events, launched back to back)."""
    torch.cuda.synchronize()
    started_s = time.perf_counter()
    run()
    torch.cuda.synchronize()
    first_ms = (time.perf_counter() - started_s) * 1e3
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]  # type: ignore[no-untyped-call]
    for mark in marks:
        mark.record()
        run()
    torch.cuda.synchronize()
    return first_ms, statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def print_times(name: str, lengths: Sequence[int]) -> None:
    floor_ms = sum(4 * length**2 for length in lengths) * NUM_HEADS * HEAD_DIM / FLOPS_PER_S * 1e3
    print(f"{name}: {len(lengths)} segments, {sum(lengths)} patches, floor {floor_ms:.3f} ms")
    for which, run in candidates(tuple(lengths), *heads(sum(lengths))).items():
        first_ms, median_ms = milliseconds(run)
        print(f"    {which:22} {median_ms:7.3f} ms, {median_ms / floor_ms:5.2f} of the floor, first {first_ms:8.1f} ms")


@torch.inference_mode()
def main() -> None:
    if not all(is_exact(lengths) for lengths in CHECKED):
        sys.exit(1)
    frames, windows = vision_config("qwen2-vl-2b"), vision_config("qwen2.5-vl-7b")
    for name, grids in BATCHES.items():
        print_times(name, attention_lengths(frames, grids, 0))
    for name in ("8 x 1024", "7 mixed"):
        print_times(f"windows of {name}", attention_lengths(windows, BATCHES[name], 0))


if __name__ == "__main__":
    main()
