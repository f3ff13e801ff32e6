"""The element-wise kernels on a GPU: first against float64 on fresh random inputs, then timed beside eager torch.

    python -m benchmarks.kernels.elementwise

Times are of calls captured in one CUDA graph, on buffers that stay where they are: below some 40 MB the L2 cache
serves them, as it does after the product before, and a time may lie under the floor that device memory sets.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.vision_shapes import PROCESSING
from vlmrt.kernels.embed_merge import embed_merge
from vlmrt.kernels.layer_norm import layer_norm, layer_norm_reference
from vlmrt.kernels.patchify import normalised_values, patchify_reference
from vlmrt.kernels.quick_gelu import quick_gelu, quick_gelu_reference
from vlmrt.kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from vlmrt.kernels.rope_and_cache import rope_and_cache
from vlmrt.kernels.rotary import mrope_tables, mrope_tables_reference, rotary_tables, rotate, rotate_reference
from vlmrt.kernels.silu_and_mul import silu_and_mul, silu_and_mul_reference
from vlmrt.kernels.triton.patchify import patchify_triton

BYTES_PER_S = 3.0e12  # of an H100's device memory, copying
CALLS = 50  # in one graph
REPLAYS = 7
DTYPE = torch.bfloat16
TOKENS = (1, 16, 64, 256, 2048)
MODELS = ((1536, 8960, 12, 2), (3584, 18944, 28, 4))  # hidden, ffn, heads, KV heads
HEAD_DIM, BLOCK_SIZE = 128, 16
PATCHES, VISION_WIDTH, VISION_FFN, VISION_HEADS = 8192, 1280, 5120, 16
EPS = 1e-6

Op = Callable[..., Tensor | tuple[Tensor, ...]]


class Case(NamedTuple):
    """One operation on one shape; fast and reference take the inputs and return what is compared."""

    name: str
    fast: Op
    reference: Op
    inputs: tuple[Tensor, ...]
    num_bytes: int  # that must at least be read and written


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DTYPE, device="cuda")


def language_cases() -> Iterator[Case]:
    size = DTYPE.itemsize
    for hidden, ffn, heads, kv_heads in MODELS:
        weight = random(hidden)
        for tokens in TOKENS:
            x, residual = random(tokens, hidden), random(tokens, hidden)
            yield Case(
                f"rms_norm [{tokens}, {hidden}]",
                partial(rms_norm, eps=EPS),
                partial(rms_norm_reference, eps=EPS),
                (x, weight),
                2 * x.numel() * size,
            )
            yield Case(
                f"add_rms_norm [{tokens}, {hidden}]",
                partial(add_rms_norm, eps=EPS),
                partial(add_rms_norm_reference, eps=EPS),
                (x, residual, weight),
                4 * x.numel() * size,
            )
            gate_up = random(tokens, 2 * ffn)
            yield Case(
                f"silu_and_mul [{tokens}, {ffn}]",
                silu_and_mul,
                silu_and_mul_reference,
                (gate_up,),
                3 * tokens * ffn * size,
            )
            yield rope_case(tokens, heads, kv_heads)


def rope_case(tokens: int, heads: int, kv_heads: int) -> Case:
    width = (heads + 2 * kv_heads) * HEAD_DIM
    cos, sin = rotary_tables(torch.rand(tokens, HEAD_DIM // 2, device="cuda") * 10)
    caches = random(2, tokens // BLOCK_SIZE + 1, BLOCK_SIZE, kv_heads, HEAD_DIM)
    slots = torch.randperm(caches[0, :, :, 0, 0].numel(), device="cuda")[:tokens]

    def fast(
        qkv: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, caches: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        return rope_and_cache(qkv, bias, cos, sin, caches[0], caches[1], slots, heads), caches

    def reference(
        qkv: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, caches: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Without the question whether a slot is skipped, which a graph cannot ask."""
        every = (qkv + bias).view(tokens, heads + 2 * kv_heads, HEAD_DIM)
        rotated = rotate_reference(every[:, :-kv_heads], cos, sin)
        for cache, rows in zip(caches, (rotated[:, heads:], every[:, -kv_heads:]), strict=True):
            cache.view(-1, kv_heads, HEAD_DIM).index_copy_(0, slots, rows)
        return rotated[:, :heads], caches

    inputs = (random(tokens, width), random(width), cos, sin, caches, slots)
    num_bytes = 2 * tokens * width * DTYPE.itemsize + tokens * HEAD_DIM * cos.itemsize
    return Case(f"rope_and_cache [{tokens}, {heads} + 2 x {kv_heads}, {HEAD_DIM}]", fast, reference, inputs, num_bytes)


def step_cases() -> Iterator[Case]:
    """What runs once in a step."""
    half = HEAD_DIM // 2
    frequency = 1e6 ** (-torch.arange(half, device="cuda") / half)
    component = torch.arange(3, device="cuda").repeat_interleave(torch.tensor([16, 24, 24], device="cuda"))
    for tokens in TOKENS:
        # positions low enough for float32's own rounding of an angle not to hide the cosine's
        positions = torch.randint(0, 64, (3, tokens), device="cuda")
        inputs = (positions, frequency, component)
        num_bytes = tokens * (2 * HEAD_DIM * 4 + 3 * 8)
        yield Case(f"mrope_tables [{tokens}, {HEAD_DIM}]", mrope_tables, mrope_tables_reference, inputs, num_bytes)

    def merge(hidden: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        embed_merge(hidden, rows, positions)
        return hidden

    for hidden, *_ in MODELS:
        rows = random(1024, hidden)
        yield Case(
            f"embed_merge [{rows.shape[0]}, {hidden}]",
            merge,
            lambda hidden, rows, positions: hidden.index_copy_(0, positions, rows),
            (random(2048, hidden), rows, torch.randperm(2048, device="cuda")[: rows.shape[0]]),
            2 * rows.numel() * rows.itemsize,
        )


def vision_cases() -> Iterator[Case]:
    size = DTYPE.itemsize
    x, weight, bias = random(PATCHES, VISION_WIDTH), random(VISION_WIDTH), random(VISION_WIDTH)
    shift = random(VISION_WIDTH).float()
    shape = f"[{PATCHES}, {VISION_WIDTH}]"
    yield Case(
        f"layer_norm {shape} with shift",
        lambda x, weight, bias, shift: layer_norm(x, weight, bias, EPS, shift),
        lambda x, weight, bias, shift: layer_norm_reference(x, weight, bias, EPS, shift),
        (x, weight, bias, shift),
        2 * x.numel() * size,
    )
    yield Case(
        f"rms_norm {shape} with shift",
        lambda x, weight, shift: rms_norm(x, weight, EPS, shift),
        lambda x, weight, shift: rms_norm_reference(x, weight, EPS, shift),
        (x, weight, shift),
        2 * x.numel() * size,
    )
    wide = random(PATCHES, VISION_FFN)
    for inputs in ((wide,), (wide, random(VISION_FFN))):
        name = f"quick_gelu [{PATCHES}, {VISION_FFN}]" + (" with bias" if len(inputs) > 1 else "")
        yield Case(name, quick_gelu, quick_gelu_reference, inputs, 2 * wide.numel() * size)
    yield Case(
        f"silu_and_mul [{PATCHES}, 3420]",
        silu_and_mul,
        silu_and_mul_reference,
        (random(PATCHES, 6840),),
        3 * PATCHES * 3420 * size,
    )
    head_dim = VISION_WIDTH // VISION_HEADS
    heads = random(PATCHES, 3 * VISION_HEADS, head_dim)[:, : 2 * VISION_HEADS]
    cos, sin = rotary_tables(torch.rand(PATCHES, head_dim // 2, device="cuda") * 10)
    num_bytes = 2 * heads.numel() * size + PATCHES * head_dim * cos.itemsize
    yield Case(f"rotate {list(heads.shape)}", rotate, rotate_reference, (heads, cos, sin), num_bytes)
    values = normalised_values(PROCESSING).cuda()
    for height, width in ((448, 448), (952, 1288)):
        pixels = torch.randint(0, 256, (1, height, width, 3), dtype=torch.uint8, device="cuda")
        yield Case(
            f"patchify {list(pixels.shape)}",
            lambda pixels, values: patchify_triton([pixels], values, 14, 2, 2, DTYPE),
            lambda pixels, values: patchify_reference(pixels, PROCESSING, values).to(DTYPE),
            (pixels, values),
            pixels.numel() * (1 + PROCESSING.temporal_patch_size * size),
        )


def outputs(op: Op, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What op returns for copies of its inputs, of which it may write to those that are no slices."""
    result = op(*(x.clone() if x.is_contiguous() else x for x in inputs))
    return (result,) if isinstance(result, Tensor) else result


def is_exact(case: Case) -> bool:
    """No further from float64 than twice what eager torch is, and half a unit of rounding."""
    wide = tuple(x.double() if x.is_floating_point() else x for x in case.inputs)
    results = (outputs(op, inputs) for op, inputs in ((case.reference, wide), (case.reference, case.inputs)))
    for exact, eager, fast in zip(*results, outputs(case.fast, case.inputs), strict=True):
        eager_error, fast_error = ((found - exact).abs().max() for found in (eager, fast))
        if not fast_error <= 2 * eager_error + torch.finfo(fast.dtype).eps / 2 * exact.abs().max():
            print(f"{case.name}: off by {fast_error:.2e}, eager torch by {eager_error:.2e}")
            return False
    return True


def time_us(op: Op, inputs: tuple[Tensor, ...]) -> float:
    """Median time of one call among those of a graph."""
    op(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            op(*inputs)
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)) * 1e3 / CALLS)
    return statistics.median(times)


def main() -> None:
    print(f"seed {torch.seed()}, {torch.cuda.get_device_name()}")
    exact = True
    for cases in (language_cases, step_cases, vision_cases):
        for case in cases():
            if not is_exact(case):
                exact = False
                continue
            fast_us, eager_us = (time_us(op, case.inputs) for op in (case.fast, case.reference))
            floor_us = case.num_bytes / BYTES_PER_S * 1e6
            print(
                f"{case.name:44} {fast_us:8.2f} us   floor {floor_us:7.2f}   {fast_us / floor_us:6.2f} x"
                f"   eager {eager_us:8.2f}"
            )
    sys.exit(0 if exact else 1)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
