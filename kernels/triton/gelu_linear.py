"""A product whose epilogue adds the bias and takes the quick GELU, in wgmma tiles that programs go through in turn."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vlmrt.kernels.triton.compile_spec import CompileSpec
from vlmrt.kernels.triton.overlap import overlap

MINUS_1_702_LOG2_E = tl.constexpr(-2.4554669595930156)


class Tiling(NamedTuple):
    """What a program takes at a time, of a loop over tiles that asks for the next one's operands while it stores."""

    tile_m: int
    tile_n: int
    tile_k: int
    num_warps: int
    num_stages: int
    in_halves: bool = False  # a tile is stored as two, which takes half of the memory to stage it
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
def gelu_linear_kernel(
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
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    num_tiles = tl.cdiv(num_rows, TILE_M) * tl.cdiv(N, TILE_N)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=True):
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


def choose_tiling(num_rows: int) -> Tiling:
    """Microseconds on an H100 of cuBLAS and quick_gelu, and of both tilings, for 5120 columns of K = 1280:

    T 1024  30.8  30.0  34.9    T 2048  55.8  51.3  52.9    T 4096  104  101  88.0    T 8192  210  207  170
    """
    return Tiling(128, 128, 64, 8, 5, in_halves=True) if num_rows <= 2048 else Tiling(128, 256, 64, 8, 3)


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _constants(tiling: Tiling, N: int, K: int) -> dict[str, object]:
    sizes = {"N": N, "K": K, "TILE_M": tiling.tile_m, "TILE_N": tiling.tile_n, "TILE_K": tiling.tile_k}
    return {**sizes, "GROUP_M": tiling.group_m, "IN_HALVES": tiling.in_halves}


def _blocks(tiling: Tiling) -> dict[str, list[int]]:
    """What a descriptor of each operand moves at once."""
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
    operands = {"x": x, "weight": weight, "out": out}
    descriptors = {name: TensorDescriptor.from_tensor(operands[name], block) for name, block in _blocks(tiling).items()}
    num_tiles = triton.cdiv(num_rows, tiling.tile_m) * triton.cdiv(N, tiling.tile_n)
    grid = (min(num_tiles, _num_multiprocessors(x.device)),)
    options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages, **overlap(x.device)}
    gelu_linear_kernel[grid](bias=bias, num_rows=num_rows, **descriptors, **_constants(tiling, N, K), **options)
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
                gelu_linear_kernel,
                signature,
                _constants(tiling, 5120, 1280),
                tiling.num_warps,
                tiling.num_stages,
                capabilities=(90,),
            )
        )
    return specs
