"""A product whose epilogue adds the bias and takes the quick GELU, in wgmma tiles that programs go through in turn."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vlmrt.kernels.triton.compile_spec import CompileSpec
from vlmrt.kernels.triton.overlap import overlap

MINUS_1_702_LOG2_E = tl.constexpr(-2.4554669595930156)


class Tiling(NamedTuple):
    """What a program takes, and how it goes on to its next tile.

    A "flat" program stays on its multiprocessor and asks for the operands of its next tile while it still stores the
    last. In "tiles" each tile has its program, and those that share a multiprocessor fill each other's gaps. "pointers"
    are the same without tensor descriptors.
    """

    tile_m: int
    tile_n: int
    tile_k: int
    num_warps: int
    num_stages: int
    schedule: Literal["flat", "tiles", "pointers"] = "flat"
    in_halves: bool = False  # a descriptor's tile is stored as two, which takes half of the memory to stage it
    group_m: int = 8  # row tiles that neighbouring programs have among them


@triton.jit
def _place(tile, num_rows, N: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of a tile: tiles go down GROUP_M row tiles, then on to the next columns."""
    column_tiles: tl.constexpr = (N + TILE_N - 1) // TILE_N
    group = tile // (GROUP_M * column_tiles)
    in_group = tile % (GROUP_M * column_tiles)
    size = tl.minimum(tl.cdiv(num_rows, TILE_M) - group * GROUP_M, GROUP_M)
    return (group * GROUP_M + in_group % size) * TILE_M, in_group // size * TILE_N


@triton.jit
def _biased_quick_gelu(product, bias, column, N: tl.constexpr):
    columns = column + tl.arange(0, product.shape[1])
    product += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    # as an exponent of 2 and one division, two multiplications less than product * tl.sigmoid(1.702 * product)
    return product / (1.0 + tl.exp2(product * MINUS_1_702_LOG2_E))


@triton.jit(do_not_specialize=["num_rows"])
def descriptor_kernel(
    x,
    weight,
    bias,
    out,
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    IN_HALVES: tl.constexpr,
    FLAT: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    num_tiles = tl.cdiv(num_rows, TILE_M) * tl.cdiv(N, TILE_N)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=FLAT):
        row, column = _place(tile, num_rows, N, TILE_M, TILE_N, GROUP_M)
        product = tl.zeros((TILE_M, TILE_N), tl.float32)
        for k in range(0, K, TILE_K):
            product = tl.dot(x.load([row, k]), weight.load([column, k]).T, product, input_precision="ieee")
        if IN_HALVES:
            HALF: tl.constexpr = TILE_N // 2
            left, right = tl.split(tl.permute(tl.reshape(product, (TILE_M, 2, HALF)), (0, 2, 1)))
            out.store([row, column], _biased_quick_gelu(left, bias, column, N).to(out.dtype))
            out.store([row, column + HALF], _biased_quick_gelu(right, bias, column + HALF, N).to(out.dtype))
        else:
            out.store([row, column], _biased_quick_gelu(product, bias, column, N).to(out.dtype))


@triton.jit(do_not_specialize=["num_rows"])
def pointer_kernel(
    x,
    weight,
    bias,
    out,
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, column = _place(tl.program_id(0), num_rows, N, TILE_M, TILE_N, GROUP_M)
    rows = row + tl.arange(0, TILE_M)
    columns = column + tl.arange(0, TILE_N)
    offsets_k = tl.arange(0, TILE_K)
    of_x = x + tl.minimum(rows, num_rows - 1).to(tl.int64)[:, None] * K + offsets_k[None, :]
    of_weight = weight + tl.minimum(columns, N - 1)[None, :] * K + offsets_k[:, None]
    product = tl.zeros((TILE_M, TILE_N), tl.float32)
    for k in range(0, K, TILE_K):
        if K % TILE_K == 0:
            chunk = tl.load(of_x + k)
            w = tl.load(of_weight + k)
        else:
            inside = k + offsets_k < K
            chunk = tl.load(of_x + k, mask=inside[None, :], other=0.0)
            w = tl.load(of_weight + k, mask=inside[:, None], other=0.0)
        product = tl.dot(chunk, w, product, input_precision="ieee")
    product = _biased_quick_gelu(product, bias, column, N)
    of_out = out + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(of_out, product.to(out.dtype.element_ty), mask=(rows < num_rows)[:, None] & (columns < N)[None, :])


def choose_tiling(num_rows: int) -> Tiling:
    """For Qwen2-VL's 5120 columns, which are 20 tiles of 256: few rows make more tiles of half the size."""
    if num_rows <= 2048:
        return Tiling(128, 128, 64, 4, 3, "tiles", in_halves=True)
    return Tiling(128, 256, 64, 8, 4, "flat", in_halves=True)


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _constants(tiling: Tiling, N: int, K: int) -> dict[str, object]:
    constants: dict[str, object] = {"N": N, "K": K, "TILE_M": tiling.tile_m, "TILE_N": tiling.tile_n}
    constants |= {"TILE_K": tiling.tile_k, "GROUP_M": tiling.group_m}
    if tiling.schedule != "pointers":
        constants |= {"FLAT": tiling.schedule == "flat", "IN_HALVES": tiling.in_halves}
    return constants


def _blocks(tiling: Tiling) -> dict[str, list[int]]:
    """What a descriptor moves at once, of each operand that has one."""
    if tiling.schedule == "pointers":
        return {}
    return {
        "x": [tiling.tile_m, tiling.tile_k],
        "weight": [tiling.tile_n, tiling.tile_k],
        "out": [tiling.tile_m, tiling.tile_n // (2 if tiling.in_halves else 1)],
    }


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor, tiling: Tiling | None = None) -> Tensor:
    """As vlmrt.kernels.gelu_linear.quick_gelu_linear, for contiguous tensors whose rows start at 16 bytes.

    A descriptor is a parameter of the launch: a CUDA graph keeps it by value.
    """
    (num_rows, K), N = x.shape, weight.shape[0]
    out = torch.empty((num_rows, N), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    if tiling is None:
        tiling = choose_tiling(num_rows)
    operands: dict[str, Tensor | TensorDescriptor] = {"x": x, "weight": weight, "out": out}
    for name, block in _blocks(tiling).items():
        operands[name] = TensorDescriptor.from_tensor(operands[name], block)
    num_tiles = triton.cdiv(num_rows, tiling.tile_m) * triton.cdiv(N, tiling.tile_n)
    grid = (min(num_tiles, _num_multiprocessors(x.device)) if tiling.schedule == "flat" else num_tiles,)
    kernel = pointer_kernel if tiling.schedule == "pointers" else descriptor_kernel
    options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages, **overlap(x.device)}
    kernel[grid](bias=bias, num_rows=num_rows, **operands, **_constants(tiling, N, K), **options)
    return out


def compile_specs() -> list[CompileSpec]:
    specs = []
    for num_rows in (1024, 8192):
        tiling = choose_tiling(num_rows)
        signature = dict.fromkeys(("x", "weight", "bias", "out"), "*bf16") | {"num_rows": "i32"}
        signature |= {name: f"tensordesc<bf16{block}>" for name, block in _blocks(tiling).items()}
        specs.append(
            CompileSpec(
                f"gelu_linear {num_rows} 5120",
                pointer_kernel if tiling.schedule == "pointers" else descriptor_kernel,
                signature,
                _constants(tiling, 5120, 1280),
                tiling.num_warps,
                tiling.num_stages,
                capabilities=(90,),
            )
        )
    return specs
