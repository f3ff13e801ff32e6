"""The compiled CPU kernels where they part from the references: layouts, widths, special values, the cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.exactness import assert_as_exact_as_eager, normal
from tests.kernels.test_attention import exact_attention
from vlmrt.kernels.compiled.exponential import exponential
from vlmrt.kernels.paged_attention import PagedBatch, paged_attention, paged_attention_reference
from vlmrt.kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from vlmrt.kernels.rope_and_cache import rope_and_cache, rope_and_cache_reference
from vlmrt.kernels.rotary import rotary_tables, rotate, rotate_reference
from vlmrt.kernels.silu_and_mul import silu_and_mul, silu_and_mul_reference

SCALE = 0.17
NAN, INF = float("nan"), float("inf")


def test_the_exponential_is_within_two_units_in_the_last_place() -> None:
    x = np.random.default_rng().uniform(-86, 88.7, 20_000).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    computed = np.array([exponential(value) for value in x], np.float64)
    units = np.spacing(exact.astype(np.float32)).astype(np.float64)
    assert (np.abs(computed - exact) / units).max() <= 2


@pytest.mark.parametrize("value", [0.0, -0.0, -103.5, -104.0, -1e30, 88.72, 89.0, 1e30, INF, -INF, NAN])
def test_the_exponential_ends_where_exp_ends(value: float) -> None:
    with np.errstate(over="ignore", under="ignore"):
        expected = np.exp(np.float32(value))
    np.testing.assert_allclose(exponential(np.float32(value)), expected, rtol=3e-7, atol=3e-45)


def test_special_values_go_through_the_gate_as_through_eager() -> None:
    gate = torch.tensor([NAN, INF, -INF, 1e30, -1e30, -88.5, 1.0, 1.0, 0.0, 2.0])
    up = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, NAN, INF, INF, -INF])
    gate_up = torch.cat((gate, up))[None].repeat(3, 1)
    torch.testing.assert_close(silu_and_mul(gate_up), silu_and_mul_reference(gate_up), equal_nan=True)


@pytest.mark.parametrize("value", [NAN, INF, 1e25])
def test_special_values_go_through_the_norms_as_through_eager(value: float) -> None:
    x, weight = normal(3, 37), normal(37, seed=1)
    x[1, 5] = value
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6), equal_nan=True)
    both = add_rms_norm(x, x, weight, 1e-6), add_rms_norm_reference(x, x, weight, 1e-6)
    torch.testing.assert_close(*both, equal_nan=True)


def test_slices_and_transposes_of_rows_are_read_as_they_lie() -> None:
    whole, weight = normal(9, 2, 70), normal(70, seed=1)
    for x in (whole[:, 1], whole[::2, 0], normal(70, 9).T, whole):
        torch.testing.assert_close(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))
        normed, total = add_rms_norm(x, x, weight, 1e-6)
        assert torch.equal(total, x + x)
        assert torch.equal(normed, rms_norm(x + x, weight, 1e-6))
        torch.testing.assert_close(silu_and_mul(x), silu_and_mul_reference(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head_dim", [2, 34, 80, 128])
def test_rotations_of_slices_are_as_exact_as_eager(head_dim: int) -> None:
    heads = normal(7, 9, head_dim)
    cos, sin = rotary_tables(normal(7, head_dim // 2).mul(10))
    for x in (heads[:, 2:6], heads[::3], heads.transpose(0, 1)[:7].contiguous().transpose(0, 1), heads[:, ::2]):
        tables = cos[: x.shape[0]], sin[: x.shape[0]]
        assert_as_exact_as_eager(rotate, rotate_reference, x, *tables)


@pytest.mark.parametrize("num_tokens", [0, 1, 300])
@pytest.mark.parametrize("head_dim", [34, 80, 128])
def test_rope_and_cache_takes_q_k_and_v_from_one_projection(num_tokens: int, head_dim: int) -> None:
    qkv, bias = normal(num_tokens, 10 * head_dim), normal(10 * head_dim, seed=1)
    cos, sin = rotary_tables(normal(num_tokens, head_dim // 2))
    slots = torch.randperm(400)[:num_tokens]
    slots[::4] = -1
    caches = [torch.full((50, 8, 2, head_dim), NAN) for _ in range(4)]
    rotated = rope_and_cache(qkv, bias, cos, sin, caches[0], caches[1], slots, 6)
    if num_tokens:
        expected = rope_and_cache_reference(qkv, bias, cos, sin, caches[2], caches[3], slots, 6)
        torch.testing.assert_close(rotated, expected, rtol=0, atol=4e-6)
    assert rotated.shape == (num_tokens, 6, head_dim)
    torch.testing.assert_close(caches[0], caches[2], rtol=0, atol=4e-6, equal_nan=True)
    torch.testing.assert_close(caches[1], caches[3], rtol=0, atol=0, equal_nan=True)


def decode_batch(
    context_lens: tuple[int, ...], num_kv_heads: int, head_dim: int, block_size: int
) -> tuple[PagedBatch, list[Tensor], list[Tensor], Tensor, Tensor]:
    """(batch, keys and values of each sequence, caches in which only the sequences' slots are not NaN)."""
    tables_width = -(-max(context_lens) // block_size) + 1
    num_blocks = sum(-(-length // block_size) for length in context_lens) + 1
    blocks = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
    k_cache, v_cache = (torch.full((num_blocks, block_size, num_kv_heads, head_dim), NAN) for _ in range(2))
    tables = torch.full((len(context_lens), 2 * tables_width), 1 << 30, dtype=torch.int32)[:, :tables_width]
    keys, values = [], []
    for row, length in enumerate(context_lens):
        k, v = (normal(length, num_kv_heads, head_dim, seed=2 * row + part) for part in range(2))
        for index in range(0, length, block_size):
            block = blocks.pop()
            tables[row, index // block_size] = block
            part = slice(index, min(index + block_size, length))
            k_cache[block, : part.stop - index], v_cache[block, : part.stop - index] = k[part], v[part]
        keys.append(k)
        values.append(v)
    rows = len(context_lens)
    batch = PagedBatch(
        cu_seqlens=torch.arange(rows + 1, dtype=torch.int32),
        context_lens=torch.tensor(context_lens, dtype=torch.int32),
        block_tables=tables,
        slot_mapping=torch.zeros(rows, dtype=torch.int64),
        num_decodes=rows,
        query_lens=(1,) * rows,
        context_lens_host=context_lens,
    )
    return batch, keys, values, k_cache, v_cache


@pytest.mark.parametrize(
    ("context_lens", "heads", "head_dim", "block_size", "window"),
    [
        ((1, 2, 3, 4, 5, 6, 7), (4, 2), 32, 16, None),
        ((31, 700, 16), (12, 2), 128, 16, None),
        ((45, 80), (16, 16), 80, 16, None),
        ((45, 9, 200), (6, 2), 34, 5, 37),
        ((3, 64, 65), (3, 1), 7, 1, 64),
        (tuple(range(1, 131)), (2, 1), 16, 8, None),
    ],
)
def test_decode_rows_see_their_sequence_and_no_unwritten_slot(
    context_lens: tuple[int, ...], heads: tuple[int, int], head_dim: int, block_size: int, window: int | None
) -> None:
    batch, keys, values, k_cache, v_cache = decode_batch(context_lens, heads[1], head_dim, block_size)
    projected = normal(len(context_lens), heads[0] + 3, head_dim, seed=99)
    q = projected[:, 1 : heads[0] + 1]
    sequences = enumerate(zip(keys, values, strict=True))
    exact = torch.cat([exact_attention(q[i : i + 1], k, v, context_lens[i] - 1, window) for i, (k, v) in sequences])
    eager_error, error = (
        (attend(q, k_cache, v_cache, batch, SCALE, window) - exact).abs().max()
        for attend in (paged_attention_reference, paged_attention)
    )
    assert error <= 2 * eager_error + torch.finfo(torch.float32).eps / 2 * exact.abs().max()
    assert error <= 2e-5


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    batch, keys, values, k_cache, v_cache = decode_batch((50, 9), 2, 32, 16)
    q = normal(2, 4, 32, seed=9) * 300
    attended = paged_attention(q, k_cache, v_cache, batch, SCALE)
    for row, (k, v) in enumerate(zip(keys, values, strict=True)):
        exact = exact_attention(q[row : row + 1], k, v, batch.context_lens_host[row] - 1, None)
        torch.testing.assert_close(attended[row].double(), exact[0], rtol=0, atol=2e-3)  # of scores near 1,000


def test_a_row_without_context_gives_what_the_reference_gives() -> None:
    batch, _, _, k_cache, v_cache = decode_batch((5, 12), 2, 16, 8)
    padded = PagedBatch(
        cu_seqlens=torch.arange(4, dtype=torch.int32),
        context_lens=torch.tensor((5, 0, 12), dtype=torch.int32),
        block_tables=batch.block_tables[[0, 0, 1]],
        slot_mapping=torch.tensor((0, -1, 0)),
        num_decodes=3,
        query_lens=(1, 1, 1),
        context_lens_host=(5, 0, 12),
    )
    q = normal(3, 4, 16)
    for window in (None, 4):
        attended = paged_attention(q, k_cache, v_cache, padded, SCALE, window)
        expected = paged_attention_reference(q, k_cache, v_cache, padded, SCALE, window)
        torch.testing.assert_close(attended, expected, rtol=0, atol=1e-6)


def test_a_nan_in_a_query_or_a_key_reaches_its_own_row_alone() -> None:
    batch, _, _, k_cache, v_cache = decode_batch((9, 20, 6), 2, 16, 8)
    q = normal(3, 4, 16)
    clean = paged_attention(q, k_cache, v_cache, batch, SCALE)
    q[1, 2, 3] = NAN
    attended = paged_attention(q, k_cache, v_cache, batch, SCALE)
    assert attended[1, 2].isnan().all()
    attended[1, 2] = clean[1, 2]
    assert torch.equal(attended, clean)
    q[1, 2, 3] = 0.0
    k_cache[batch.block_tables[2, 0], 4, 1] = NAN
    attended = paged_attention(q, k_cache, v_cache, batch, SCALE)
    assert attended[2, 2:].isnan().all()
    assert torch.equal(attended[2, :2], clean[2, :2])


def test_kernels_run_where_no_cache_can_be_written(tmp_path: Path) -> None:
    """NUMBA_CACHE_DIR names a place under a file: no directory can be made there."""
    (tmp_path / "file").touch()
    program = (
        "import torch; from vlmrt.kernels.rms_norm import rms_norm;"
        "assert rms_norm(torch.ones(2, 8), torch.ones(8), 0.0).eq(1).all()"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "file" / "cache")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr


def test_tables_and_caches_of_another_dtype_take_the_way_of_the_reference() -> None:
    qkv, q = normal(3, 8 * 16), normal(3, 4, 16)
    cos, sin = rotary_tables(normal(3, 8))
    slots = torch.tensor([4, -1, 9])
    caches = [torch.zeros(2, 8, 2, 16, dtype=torch.bfloat16) for _ in range(4)]
    rotated = rope_and_cache(qkv, None, cos, sin, caches[0], caches[1], slots, 4)
    assert torch.equal(rotated, rope_and_cache_reference(qkv, None, cos, sin, caches[2], caches[3], slots, 4))
    assert torch.equal(caches[0], caches[2])
    assert torch.equal(caches[1], caches[3])
    assert torch.equal(rotate(q, cos.double(), sin.double()), rotate_reference(q, cos.double(), sin.double()))
