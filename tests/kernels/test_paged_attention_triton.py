"""The Triton kernels of paged attention against float64 over the plain sequences."""

from __future__ import annotations

import secrets
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder

from tests.kernels.exactness import normal
from tests.kernels.places import INTERPRETED, PLACES
from tests.kernels.test_attention import SCALE, exact_attention
from vlmrt.kernels.paged_attention import PagedBatch, paged_attention
from vlmrt.kernels.triton.paged_attention import paged_attention_triton
from vlmrt.kernels.triton.paged_decode import DECODE, DecodeTiling, Splits, arrival_counters, choose_splits

BLOCK_SIZE = 16
PADDING = 3
# of a result's largest value: in float32 the rounding of scores up to 10, else that of weights and results
TOLERANCE = {torch.float32: 2**-17, torch.float16: 2 * 2**-10, torch.bfloat16: 2 * 2**-7}


class Step(NamedTuple):
    """A step's arguments and what must come out."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    batch: PagedBatch
    exact: Tensor

    def assert_exact(self, attended: Tensor) -> None:
        num_tokens = self.exact.shape[0]
        assert attended.shape == self.q.shape
        assert attended.dtype == self.q.dtype
        assert not attended[num_tokens:].any()
        error = (attended[:num_tokens].cpu().double() - self.exact).abs().amax(-1)
        assert (error <= TOLERANCE[self.q.dtype] * self.exact.abs().amax(-1)).all()


def make_step(
    heads: tuple[int, int],
    head_dim: int,
    rows: list[tuple[int, int]],
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Step:
    """rows: (query tokens, context) of each sequence, decode rows first.

    q is a slice of a fused projection; its rows of padding are not zero. Unwritten slots and block 0 are NaN, entries
    of block_tables past a sequence's blocks point outside the cache, and no lengths are told to the host.
    """
    num_heads, num_kv_heads = heads
    counts, contexts = zip(*rows, strict=True)
    tokens = sum(counts)
    num_blocks = sum(-(-context // BLOCK_SIZE) for context in contexts) + 1
    free = (1 + torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(seed))).tolist()
    shape = (num_blocks, BLOCK_SIZE, num_kv_heads, head_dim)
    k_cache, v_cache = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
    tables = torch.full((len(rows), -(-max(contexts) // BLOCK_SIZE) + 1), 1 << 30, dtype=torch.int32)
    fused = normal(tokens + PADDING, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype, seed=seed)
    q = fused[:, : num_heads * head_dim].view(-1, num_heads, head_dim)
    expected, start = [], 0
    for sequence, (count, context) in enumerate(rows):
        k, v = (normal(context, num_kv_heads, head_dim, dtype=dtype, seed=seed + 10 * n + sequence) for n in (1, 2))
        for index in range(0, context, BLOCK_SIZE):
            block, filled = free.pop(), min(BLOCK_SIZE, context - index)
            tables[sequence, index // BLOCK_SIZE] = block
            k_cache[block, :filled], v_cache[block, :filled] = k[index : index + filled], v[index : index + filled]
        queries = q[start : start + count]
        nothing = torch.zeros(queries.shape, dtype=torch.float64)
        expected.append(exact_attention(queries, k, v, context - count, window) if context else nothing)
        start += count
    num_decodes = next((n for n, count in enumerate(counts) if count != 1), len(rows))
    batch = PagedBatch(
        cu_seqlens=torch.tensor([sum(counts[:n]) for n in range(len(rows) + 1)], dtype=torch.int32, device=device),
        context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
        block_tables=tables.to(device),
        slot_mapping=torch.zeros(tokens, dtype=torch.int64, device=device),
        num_decodes=num_decodes,
        query_lens=(0,) * len(rows),
        context_lens_host=(),
    )
    q = fused.to(device)[:, : num_heads * head_dim].view(-1, num_heads, head_dim)
    return Step(q, k_cache.to(device), v_cache.to(device), batch, torch.cat(expected))


ROWS = {
    "decode": [(1, 1), (1, 75), (1, 48), (1, 0)],
    "chunks": [(12, 12), (3, 65), (1, 40)],  # 65: the first of the three sees all but one key of two whole tiles
    "nine sequences": [(1, 30), (1, 64), (13, 13), (1, 16), (2, 35), (3, 4), (7, 40), (0, 0), (0, 0)],
}
# Hq and Hkv, head_dim, window
MODELS = [((2, 2), 32, None), ((6, 2), 64, 20), ((4, 1), 80, None), ((6, 1), 128, 33), ((7, 1), 32, None)]


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize(("heads", "head_dim", "window"), MODELS)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_each_query_sees_its_sequence_up_to_itself(
    rows: list[tuple[int, int]],
    heads: tuple[int, int],
    head_dim: int,
    window: int | None,
    device: str,
    dtype: torch.dtype,
) -> None:
    step = make_step(heads, head_dim, rows, window, dtype, device)
    attended = paged_attention_triton(*step[:4], SCALE, window)
    step.assert_exact(attended)


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("splits", [Splits(1, 32), Splits(2, 32), Splits(8, 32), Splits(8, 96)])
def test_the_number_of_splits_changes_nothing_but_rounding(
    splits: Splits, window: int | None, device: str, dtype: torch.dtype
) -> None:
    step = make_step((3, 1), 32, [(1, 150), (1, 32), (1, 0)], window, dtype, device)
    attended = paged_attention_triton(*step[:4], SCALE, window, splits)
    step.assert_exact(attended)


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("tiling", [DECODE, DecodeTiling(block_n=64, num_warps=2, num_stages=2, usual_context=192)])
def test_more_splits_are_combined_than_are_read_at_once(tiling: DecodeTiling, device: str, dtype: torch.dtype) -> None:
    step = make_step((7, 1), 80, [(1, 10 * tiling.block_n), (1, 40)], None, dtype, device)
    attended = paged_attention_triton(*step[:4], SCALE, None, Splits(16, tiling.block_n), tiling)
    step.assert_exact(attended)


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("window", [None, 70])
def test_a_call_leaves_the_counts_at_zero_and_gives_the_same_bits_again(
    window: int | None, device: str, dtype: torch.dtype
) -> None:
    step = make_step((4, 2), 32, [(1, 150), (1, 32), (1, 0), (1, 33)], window, dtype, device)
    first, second = (paged_attention_triton(*step[:4], SCALE, window, Splits(8, 32)) for _ in range(2))
    assert not arrival_counters(step.q.device, 4 * 2).any()
    assert torch.equal(first, second)


@INTERPRETED
def test_whichever_split_is_the_last_the_bits_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    step = make_step((2, 1), 32, [(1, 200), (1, 97)])
    splits = Splits(8, 32)
    in_order = paged_attention_triton(*step[:4], SCALE, None, splits)
    place = interpreter_builder.set_grid_idx
    for seed in range(2):
        order = torch.randperm(splits.num, generator=torch.Generator().manual_seed(seed)).tolist()

        def shuffled(x: int, y: int, z: int, order: list[int] = order) -> None:
            is_decode = interpreter_builder.grid_dim[0] == splits.num  # the rows of padding are another launch
            place(order[x] if is_decode else x, y, z)

        monkeypatch.setattr(interpreter_builder, "set_grid_idx", shuffled)
        assert torch.equal(paged_attention_triton(*step[:4], SCALE, None, splits), in_order)
    step.assert_exact(in_order)


def test_counters_stay_where_they_are_and_are_enough_for_any_number_of_programs() -> None:
    device = torch.device("cpu")
    assert arrival_counters(device, 3).data_ptr() == arrival_counters(device, 4).data_ptr()
    for num_programs in (1, 8, 9, 1000):
        assert arrival_counters(device, num_programs).numel() >= num_programs


def test_splits_fill_the_gpu_and_never_outnumber_the_tiles_of_the_longest_context() -> None:
    assert choose_splits(num_decodes=1, num_kv_heads=2, max_context=8192, num_sms=132).num == 64
    assert choose_splits(num_decodes=1, num_kv_heads=2, max_context=300, num_sms=132).num == 4
    assert choose_splits(num_decodes=64, num_kv_heads=2, max_context=8192, num_sms=132).num == 4
    assert choose_splits(num_decodes=256, num_kv_heads=4, max_context=8192, num_sms=132).num == 1
    assert choose_splits(num_decodes=1, num_kv_heads=2, max_context=0, num_sms=132).num == 1


def test_the_more_rows_there_are_the_more_tokens_a_split_takes() -> None:
    each = [choose_splits(rows, num_kv_heads=4, max_context=8192, num_sms=132).tokens_each for rows in (1, 8, 16, 64)]
    assert each == [64, 64, 128, 384]
    assert all(tokens % DECODE.block_n == 0 for tokens in each)


GPU_ROWS = {
    "one stream": [(1, 1100)],
    "64 streams": [(1, 17 * n) for n in range(64)],
    "256 streams": [(1, 3 * n) for n in range(256)],
    "a chunk": [(2048, 2048)],
    "a chunk after a context": [(700, 4000)],
    "mixed": [*((1, 50 * n) for n in range(1, 33)), (512, 512), (20, 1500), (1, 900), (300, 300), (0, 0)],
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("heads", [(12, 2), (28, 4)])
@pytest.mark.parametrize("rows", GPU_ROWS.values(), ids=GPU_ROWS)
def test_a_real_step_is_exact_on_the_gpu(rows: list[tuple[int, int]], heads: tuple[int, int]) -> None:
    seed = secrets.randbelow(1 << 30)
    step = make_step(heads, 128, rows, None, torch.bfloat16, "cuda", seed)
    step.assert_exact(paged_attention(*step[:4], SCALE))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_call_follows_the_lengths_on_the_device() -> None:
    first = make_step((12, 2), 128, [(1, 40), (1, 700), (30, 90), (34, 34)], None, torch.bfloat16, "cuda", 1)
    second = make_step((12, 2), 128, [(1, 700), (1, 0), (60, 200), (4, 300)], None, torch.bfloat16, "cuda", 2)
    blocks = max(first.k_cache.shape[0], second.k_cache.shape[0])
    k_cache, v_cache = first.k_cache.new_zeros(2, blocks, *first.k_cache.shape[1:])
    paged_attention(first.q, k_cache, v_cache, first.batch, SCALE)  # compiled outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attended = paged_attention(first.q, k_cache, v_cache, first.batch, SCALE)
    for step in (first, second):
        for static, values in (
            (first.q, step.q),
            (k_cache[: step.k_cache.shape[0]], step.k_cache),
            (v_cache[: step.v_cache.shape[0]], step.v_cache),
            (first.batch.cu_seqlens, step.batch.cu_seqlens),
            (first.batch.context_lens, step.batch.context_lens),
            (first.batch.block_tables, step.batch.block_tables),
        ):
            static.copy_(values)
        graph.replay()
        step.assert_exact(attended)
