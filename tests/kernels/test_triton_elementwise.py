"""The Triton forms of norms, gates, rotations, merges, copies and patches against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels.exactness import assert_as_exact_as_eager, normal
from tests.kernels.places import PLACES
from tests.kernels.test_patchify import PROCESSING
from vlmrt.kernels.block_copies import gather_blocks_reference
from vlmrt.kernels.embed_merge import embed_merge_reference
from vlmrt.kernels.layer_norm import layer_norm_reference
from vlmrt.kernels.patchify import normalised_values, patchify_reference
from vlmrt.kernels.quick_gelu import quick_gelu_reference
from vlmrt.kernels.rms_norm import add_rms_norm_reference, rms_norm_reference
from vlmrt.kernels.rope_and_cache import rope_and_cache_reference
from vlmrt.kernels.rotary import mrope_tables_reference, rotary_tables, rotate_reference
from vlmrt.kernels.silu_and_mul import silu_and_mul_reference
from vlmrt.kernels.triton.block_copies import gather_blocks_triton, scatter_blocks_triton
from vlmrt.kernels.triton.embed_merge import embed_merge_triton
from vlmrt.kernels.triton.layer_norm import layer_norm_triton
from vlmrt.kernels.triton.patchify import patchify_triton
from vlmrt.kernels.triton.quick_gelu import quick_gelu_triton
from vlmrt.kernels.triton.rms_norm import add_rms_norm_triton, rms_norm_triton
from vlmrt.kernels.triton.rope_and_cache import rope_and_cache_triton
from vlmrt.kernels.triton.rotary import mrope_tables_triton, rotate_triton
from vlmrt.kernels.triton.silu_and_mul import silu_and_mul_triton

ROWS = ((1, 8), (7, 33), (3, 1280), (0, 64))


def strided(rows: int, width: int, device: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows that lie further apart than they are wide, as a slice of a fused projection does."""
    return normal(rows, width + 40, dtype=dtype, seed=seed).to(device)[:, 8 : 8 + width]


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize(("rows", "width"), ROWS)
@pytest.mark.parametrize("has_shift", [True, False])
def test_layer_norm_is_as_exact_as_eager(
    rows: int, width: int, has_shift: bool, device: str, dtype: torch.dtype
) -> None:
    x = strided(rows, width, device, dtype)
    weight, bias = (normal(width, dtype=dtype, seed=seed).to(device) for seed in (1, 2))
    shift = (normal(width, seed=3).to(device),) if has_shift else ()
    assert layer_norm_triton(x, weight, bias, 1e-6, *shift).shape == (rows, width)
    if rows:
        assert_as_exact_as_eager(
            lambda a, w, b, *s: layer_norm_triton(a, w, b, 1e-6, *s),
            lambda a, w, b, *s: layer_norm_reference(a, w, b, 1e-6, *s),
            x,
            weight,
            bias,
            *shift,
        )


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize(("rows", "width"), ROWS)
@pytest.mark.parametrize("has_bias", [True, False])
def test_quick_gelu_is_as_exact_as_eager(
    rows: int, width: int, has_bias: bool, device: str, dtype: torch.dtype
) -> None:
    x = strided(rows, width, device, dtype)
    bias = (normal(width, dtype=dtype, seed=3).to(device),) if has_bias else ()
    assert quick_gelu_triton(x, *bias).shape == (rows, width)
    if rows:
        assert_as_exact_as_eager(quick_gelu_triton, quick_gelu_reference, x, *bias)


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize(("rows", "width"), ROWS)
def test_rms_norm_is_as_exact_as_eager(rows: int, width: int, device: str, dtype: torch.dtype) -> None:
    x, residual = (strided(rows, width, device, dtype, seed) for seed in (0, 7))
    weight, shift = normal(width, dtype=dtype, seed=1).to(device), normal(width, seed=3).to(device)
    normed, total = add_rms_norm_triton(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, rms_norm_triton(total, weight, 1e-6))
    if rows:
        assert_as_exact_as_eager(
            lambda a, w: rms_norm_triton(a, w, 1e-6), lambda a, w: rms_norm_reference(a, w, 1e-6), x, weight
        )
        assert_as_exact_as_eager(
            lambda a, w, s: rms_norm_triton(a, w, 1e-6, s),
            lambda a, w, s: rms_norm_reference(a, w, 1e-6, s),
            x,
            weight,
            shift,
        )
        assert_as_exact_as_eager(
            lambda a, r, w: add_rms_norm_triton(a, r, w, 1e-6)[0],
            lambda a, r, w: add_rms_norm_reference(a, r, w, 1e-6)[0],
            x,
            residual,
            weight,
        )


@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_rms_norm_takes_rows_of_heads_and_the_widest_rows(device: str, dtype: torch.dtype) -> None:
    for shape in ((2, 3, 16), (2, 8192)):
        x, weight = normal(*shape, dtype=dtype).to(device), normal(shape[-1], dtype=dtype, seed=1).to(device)
        assert_as_exact_as_eager(
            lambda a, w: rms_norm_triton(a, w, 1e-6), lambda a, w: rms_norm_reference(a, w, 1e-6), x, weight
        )


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize(("rows", "width"), [(1, 130), (7, 66), (2, 2600), (0, 64)])
def test_silu_and_mul_is_as_exact_as_eager(rows: int, width: int, device: str, dtype: torch.dtype) -> None:
    gate_up = strided(rows, width, device, dtype)
    assert silu_and_mul_triton(gate_up).shape == (rows, width // 2)
    if rows:
        assert_as_exact_as_eager(silu_and_mul_triton, silu_and_mul_reference, gate_up)


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 18), (5, 80), (16, 32)])
def test_rotate_is_as_exact_as_eager(heads: int, head_dim: int, device: str, dtype: torch.dtype) -> None:
    fused = normal(3, heads + 2, head_dim, dtype=dtype).to(device)
    cos, sin = rotary_tables(normal(3, head_dim // 2).mul(10).to(device))
    assert_as_exact_as_eager(rotate_triton, rotate_reference, fused[:, :heads], cos, sin)
    assert_as_exact_as_eager(rotate_triton, rotate_reference, fused[:, 1::2], cos, sin)
    assert rotate_triton(fused[:0], cos[:0], sin[:0]).shape == (0, heads + 2, head_dim)


@pytest.mark.parametrize(("device", "dtype"), [place for place in PLACES if torch.float32 in place.values])
@pytest.mark.parametrize("sections", [(16, 24, 24), (2, 3, 1)])
def test_mrope_tables_are_as_exact_as_eager(sections: tuple[int, ...], device: str, dtype: torch.dtype) -> None:
    half = sum(sections)
    frequency = (1e6 ** (-torch.arange(half, dtype=dtype) / half)).to(device)
    component = torch.arange(3).repeat_interleave(torch.tensor(sections)).to(device)
    near = torch.randint(0, 40, (3, 17), generator=torch.Generator().manual_seed(half)).to(device)
    # a slice of a longer buffer, as a captured batch has; far tokens have angles past what a fast cosine can reduce
    for positions in (near[:, :5], near * 900, near[:, :0]):
        cos, sin = mrope_tables_triton(positions, frequency, component)
        expected = mrope_tables_reference(positions, frequency, component)
        torch.testing.assert_close(torch.stack((cos, sin)), torch.stack(expected), rtol=0, atol=3e-7)
    for index in range(2):
        assert_as_exact_as_eager(
            lambda p, f, c, i=index: mrope_tables_triton(p, f, c)[i],
            lambda p, f, c, i=index: mrope_tables_reference(p, f, c)[i],
            near,
            frequency,
            component,
        )


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "slots", "has_bias"),
    [
        (4, 2, 32, (17, 0, 5), True),
        (3, 1, 6, (-1, 40, 2), False),
        (3, 1, 6, (-1, -1), True),
        (4, 2, 32, (), True),
    ],
)
def test_rope_and_cache_is_as_exact_as_eager_and_writes_its_slots_and_no_others(
    heads: int, kv_heads: int, head_dim: int, slots: tuple[int, ...], has_bias: bool, device: str, dtype: torch.dtype
) -> None:
    tokens = len(slots)
    qkv = strided(tokens, (heads + 2 * kv_heads) * head_dim, device, dtype)
    bias = [normal(qkv.shape[1], dtype=dtype, seed=1).to(device)] if has_bias else []
    cos, sin = (table.to(device) for table in rotary_tables(normal(tokens, head_dim // 2).mul(10)))
    slot_mapping = torch.tensor(slots, dtype=torch.int64, device=device)
    stale = normal(2, 3, 16, kv_heads, head_dim, dtype=dtype, seed=2).to(device)

    def written(op: Callable[..., Tensor], qkv: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        *given, cos, sin = rest
        # both caches in one tensor, block by block: a block is not next to the one before
        caches = stale.to(qkv.dtype).transpose(0, 1).contiguous()
        k_cache, v_cache = caches[:, 0], caches[:, 1]
        if op is rope_and_cache_reference:
            k_cache, v_cache = k_cache.contiguous(), v_cache.contiguous()
        q = op(qkv, given[0] if given else None, cos, sin, k_cache, v_cache, slot_mapping, heads)
        return q, k_cache, v_cache

    q, k_cache, v_cache = written(rope_and_cache_triton, qkv, *bias, cos, sin)
    assert q.shape == (tokens, heads, head_dim)
    biased = qkv + bias[0] if has_bias else qkv
    v = biased.view(tokens, heads + 2 * kv_heads, head_dim)[:, heads + kv_heads :]
    expected_v = stale[1].reshape(-1, kv_heads, head_dim).clone()
    kept = slot_mapping >= 0
    expected_v[slot_mapping[kept]] = v[kept]
    assert torch.equal(v_cache.reshape(expected_v.shape), expected_v)
    untouched = torch.ones(48, dtype=torch.bool, device=device)
    untouched[slot_mapping[kept]] = False
    assert torch.equal(k_cache.reshape(48, -1)[untouched], stale[0].reshape(48, -1)[untouched])
    if tokens:
        assert_as_exact_as_eager(
            lambda *tensors: torch.cat([x.flatten() for x in written(rope_and_cache_triton, *tensors)]),
            lambda *tensors: torch.cat([x.flatten() for x in written(rope_and_cache_reference, *tensors)]),
            qkv,
            *bias,
            cos,
            sin,
        )


@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_embed_merge_casts_rows_and_overwrites_their_places_only(device: str, dtype: torch.dtype) -> None:
    for width, count in ((8, 2), (1100, 3), (64, 0)):
        hidden = strided(6, width, device, dtype)
        rows = strided(count, width, device, torch.float32, seed=1)
        positions = torch.tensor([4, 1, 5], device=device)[:count]
        expected = embed_merge_reference(hidden, rows, positions)
        embed_merge_triton(hidden, rows, positions)
        assert torch.equal(hidden, expected)


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("shape", [(4, 6, 4, 2, 8), (6, 5, 16, 3, 100), (2, 9, 1, 1, 3)])
def test_blocks_are_gathered_from_all_layers_and_scattered_to_their_places_only(
    shape: tuple[int, ...], device: str, dtype: torch.dtype
) -> None:
    layers, num_blocks, *rest = shape
    cache, fresh = (normal(*shape, dtype=dtype, seed=seed).to(device) for seed in (0, 1))
    cache[0, 0] = float("nan")
    for ids in ([4, 0, 2], [1], []):
        block_ids = torch.tensor(ids, dtype=torch.int64, device=device)
        expected = gather_blocks_reference(cache, block_ids)
        blocks = torch.zeros(len(ids), layers, *rest, dtype=dtype, device=device)
        gather_blocks_triton(cache, block_ids, blocks)
        assert torch.equal(blocks.nan_to_num(7.0), expected.nan_to_num(7.0))
        target = fresh.clone()
        scatter_blocks_triton(blocks, block_ids, target)
        others = [block_id for block_id in range(num_blocks) if block_id not in ids]
        assert torch.equal(target[:, others], fresh[:, others])
        assert torch.equal(gather_blocks_reference(target, block_ids).nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_patches_are_the_float32_ones_rounded_once(device: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 28, 28, 3), (3, 28, 56, 3))
    images = [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device) for shape in shapes]
    images.append(images[1][1:2, :, :28])  # of a larger picture
    values = normalised_values(PROCESSING).to(device)
    patches = patchify_triton(images, values, 14, 2, 2, dtype)
    expected = torch.cat([patchify_reference(image, PROCESSING, values) for image in images])
    assert torch.equal(patches, expected.to(dtype))
