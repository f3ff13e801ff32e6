"""Norms, gates, rotations and merges against float64."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.exactness import DTYPES, assert_as_exact_as_eager, normal
from vlmrt.kernels.block_copies import gather_blocks, scatter_blocks
from vlmrt.kernels.embed_merge import embed_merge, embed_merge_reference
from vlmrt.kernels.layer_norm import layer_norm, layer_norm_reference
from vlmrt.kernels.quick_gelu import quick_gelu, quick_gelu_reference
from vlmrt.kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from vlmrt.kernels.rope_and_cache import rope_and_cache
from vlmrt.kernels.rotary import mrope_tables, rotary_tables, rotate, rotate_reference
from vlmrt.kernels.silu_and_mul import silu_and_mul, silu_and_mul_reference

SHAPES = ((1, 8), (7, 33), (3, 1280))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_is_as_exact_as_eager(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = normal(*shape, dtype=dtype), normal(shape[1], dtype=dtype, seed=1)
    assert_as_exact_as_eager(lambda a, w: rms_norm(a, w, 1e-6), lambda a, w: rms_norm_reference(a, w, 1e-6), x, weight)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    torch.testing.assert_close(rms_norm(x, weight, 1e-6).double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_shift_of_the_rows_is_added_before_the_rms_norm_without_rounding(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x, weight, shift = normal(*shape, dtype=dtype), normal(shape[1], dtype=dtype, seed=1), normal(shape[1], seed=2)
    assert_as_exact_as_eager(
        lambda a, w, s: rms_norm(a, w, 1e-6, s), lambda a, w, s: rms_norm_reference(a, w, 1e-6, s), x, weight, shift
    )
    shifted = x.double() + shift.double()
    exact = shifted / (shifted.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    normed = rms_norm(x, weight, 1e-6, shift)
    assert normed.dtype == dtype
    torch.testing.assert_close(normed.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_returns_the_norm_and_the_sum(dtype: torch.dtype) -> None:
    x, residual, weight = (normal(5, 40, dtype=dtype, seed=seed) for seed in range(3))
    normed, new_residual = add_rms_norm(x, residual, weight[0], 1e-6)
    assert torch.equal(new_residual, x + residual)
    assert_as_exact_as_eager(
        lambda a, b, w: add_rms_norm(a, b, w, 1e-6)[0],
        lambda a, b, w: add_rms_norm_reference(a, b, w, 1e-6)[0],
        x,
        residual,
        weight[0],
    )
    assert torch.equal(normed, rms_norm(x + residual, weight[0], 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (7, 66), (3, 512)])
def test_silu_and_mul_is_as_exact_as_eager(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert_as_exact_as_eager(silu_and_mul, silu_and_mul_reference, normal(*shape, dtype=dtype))


def test_silu_and_mul_refuses_an_odd_width() -> None:
    with pytest.raises(ValueError, match="3 columns"):
        silu_and_mul(torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotate_is_as_exact_as_eager_and_turns_pairs(dtype: torch.dtype) -> None:
    x, angles = normal(5, 3, 32, dtype=dtype), normal(5, 16).mul(10)
    cos, sin = rotary_tables(angles)
    assert_as_exact_as_eager(rotate, rotate_reference, x, cos, sin)
    pairs = torch.complex(x.double()[..., :16], x.double()[..., 16:])
    turned = pairs * torch.polar(torch.ones(5, 1, 16).double(), angles.double()[:, None])
    exact = torch.cat((turned.real, turned.imag), dim=-1)
    torch.testing.assert_close(rotate(x, cos, sin).double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps * 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("skipped", [(), (0, 3), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_rope_and_cache_writes_its_slots_and_no_others(
    dtype: torch.dtype, skipped: tuple[int, ...], has_bias: bool
) -> None:
    qkv = normal(5, 8 * 32, dtype=dtype)
    bias = normal(8 * 32, dtype=dtype, seed=1) if has_bias else None
    heads = (qkv if bias is None else qkv + bias).view(5, 8, 32)
    q, k, v = heads[:, :4], heads[:, 4:6], heads[:, 6:]
    cos, sin = rotary_tables(normal(5, 16))
    slots = torch.tensor([17, 0, 5, 11, 30])
    slots[list(skipped)] = -1
    k_cache, v_cache = (torch.full((4, 8, 2, 32), 7.0, dtype=dtype) for _ in range(2))
    rotated = rope_and_cache(qkv, bias, cos, sin, k_cache, v_cache, slots, 4)
    assert torch.equal(rotated, rotate(q, cos, sin))
    expected_k, expected_v = (torch.full((32, 2, 32), 7.0, dtype=dtype) for _ in range(2))
    kept = slots >= 0
    expected_k[slots[kept]] = rotate(k, cos, sin)[kept]
    expected_v[slots[kept]] = v[kept]
    assert torch.equal(k_cache.view(32, 2, 32), expected_k)
    assert torch.equal(v_cache.view(32, 2, 32), expected_v)


def test_mrope_tables_turn_each_pair_with_its_own_position() -> None:
    positions = torch.tensor([[0, 3, 70], [1, 3, 2], [2, 3, 900]])
    frequency, component = torch.tensor([1.0, 0.5, 0.25]), torch.tensor([0, 1, 2])
    cos, sin = mrope_tables(positions, frequency, component)
    angles = torch.tensor([[0.0, 0.5, 0.5], [3.0, 1.5, 0.75], [70.0, 1.0, 225.0]])
    assert torch.equal(cos, angles.cos().repeat(1, 2))
    assert torch.equal(sin, torch.cat((-angles.sin(), angles.sin()), dim=1))


def test_blocks_are_gathered_from_all_layers_and_put_back_elsewhere() -> None:
    cache = normal(6, 5, 4, 2, 8)
    before, blocks = cache.clone(), torch.zeros(2, 6, 4, 2, 8)
    gather_blocks(cache, torch.tensor([3, 0]), blocks)
    assert torch.equal(blocks[0], before[:, 3])
    assert torch.equal(blocks[1], before[:, 0])
    scatter_blocks(blocks, torch.tensor([0, 4]), cache)
    assert torch.equal(cache[:, [0, 1, 2, 3, 4]], before[:, [3, 1, 2, 3, 0]])


def test_blocks_of_another_shape_are_refused() -> None:
    cache, block_ids = torch.zeros(6, 5, 4, 2, 8), torch.tensor([3, 0])
    with pytest.raises(ValueError, match=r"expected \[2, 6, 4, 2, 8\]"):
        gather_blocks(cache, block_ids, torch.zeros(3, 6, 4, 2, 8))
    with pytest.raises(ValueError, match=r"expected \[2, 6, 4, 2, 8\]"):
        scatter_blocks(torch.zeros(2, 5, 4, 2, 8), block_ids, cache)


def test_embed_merge_overwrites_placeholders_in_place() -> None:
    hidden, rows, positions = normal(6, 8), normal(2, 8).double(), torch.tensor([4, 1])
    expected = embed_merge_reference(hidden, rows, positions)
    embed_merge(hidden, rows, positions)
    assert torch.equal(hidden, expected)
    assert torch.equal(hidden[4], rows[0].float())


def test_embed_merge_refuses_rows_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"expected \[2, 8\]"):
        embed_merge(torch.zeros(6, 8), torch.zeros(3, 8), torch.tensor([4, 1]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_shift", [True, False])
def test_layer_norm_is_as_exact_as_eager_and_its_shift_is_not_rounded(has_shift: bool, dtype: torch.dtype) -> None:
    x = normal(5, 40, dtype=dtype)
    weight, bias = (normal(40, dtype=dtype, seed=seed) for seed in (1, 2))
    shift = (normal(40, seed=3),) if has_shift else ()
    assert_as_exact_as_eager(
        lambda a, w, b, *s: layer_norm(a, w, b, 1e-6, *s),
        lambda a, w, b, *s: layer_norm_reference(a, w, b, 1e-6, *s),
        x,
        weight,
        bias,
        *shift,
    )
    normed = layer_norm(x, weight, bias, 1e-6, *shift)
    assert normed.dtype == dtype
    wide = x.double() + sum(each.double() for each in shift)
    centred = wide - wide.mean(-1, keepdim=True)
    exact = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double() + bias.double()
    torch.testing.assert_close(normed.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quick_gelu_adds_the_bias_first(dtype: torch.dtype) -> None:
    x, bias = normal(5, 40, dtype=dtype), normal(40, dtype=dtype, seed=1)
    assert_as_exact_as_eager(quick_gelu, quick_gelu_reference, x, bias)
    summed = x.double() + bias.double()
    exact = summed / (1 + (-1.702 * summed).exp())
    torch.testing.assert_close(
        quick_gelu(x, bias).double(), exact, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps
    )
